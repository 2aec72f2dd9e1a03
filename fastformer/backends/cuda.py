"""The CUDA C++ half of fastformer._C: norms so far, on CUDA tensors."""

from __future__ import annotations

import ctypes
import functools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import raw_ops

_SERVED = ("norm_fwd", "norm_bwd")
_OLDEST_CAPABILITY = (8, 0)
# Grids and row numbers are 32-bit.
_MAX_ROWS = 2**31 - 1
_MAX_COLUMNS = 2**30


def _driver_major() -> int:
    """The newest major release of CUDA that the driver serves; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int()
    return version.value // 1000 if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


@functools.cache
def _build() -> tuple[dict[str, Any] | None, str]:
    """Facts of the CUDA half that was compiled, or None and why there is none."""
    try:
        from .. import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the extension fastformer._C cannot be imported ({error})"
    facts = _C.build_info()
    return facts["cuda"], f"fastformer._C was built without CUDA: {facts['no_cuda']}"


@functools.cache
def ready() -> str | None:
    """None where CUDA tensors can be served on this machine, else the reason why not."""
    build, reason = _build()
    if build is None:
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    # The CUDA runtime is linked into _C. Within one major release it runs on any driver.
    built, driver = int(build["nvcc"].split(".")[0]), _driver_major()
    if driver < built:
        found = f"serves CUDA {driver} at most" if driver else "is not installed"
        return f"its kernels need a driver for CUDA {built}, and the driver {found}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return _device_refusal(torch.device("cuda", torch.cuda.current_device()))


@functools.cache
def _device_refusal(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    named = f"{device} has compute capability {capability[0]}.{capability[1]}"
    if capability < _OLDEST_CAPABILITY:
        return f"its kernels need compute capability 8.0, and {named}"
    build, _ = _build()
    assert build is not None
    return (
        None if _covers(build["archs"], capability) else f"{named}, built in are {', '.join(build['archs'])}"
    )


@raw_ops.constant_in_graphs
def _unusable(device: torch.device) -> str | None:
    return ready() or _device_refusal(device)


def _covers(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for `archs` ("8.0", "9.0a", "12.0+PTX") runs on `capability`.

    Machine code runs on later minor releases of its major one ("a": on its own alone), PTX on all later ones.
    """
    for arch in archs:
        plain = arch.removesuffix("+PTX")
        major, minor = (int(number) for number in plain.rstrip("af").split("."))
        if plain.endswith("a"):
            if (major, minor) == capability:
                return True
        elif (major == capability[0] and minor <= capability[1]) or (
            arch.endswith("+PTX") and (major, minor) <= capability
        ):
            return True
    return False


def why_not(op: str, spec: Any, tensors: tuple[Tensor | None, ...]) -> str | None:
    """None if `op` on these tensors can be served, else the reason in one sentence."""
    if op not in _SERVED:
        return f"it has no {op} yet"
    first = tensors[0]
    assert first is not None
    if first.device.type != "cuda":
        return f"it serves CUDA tensors, not {first.device.type}"
    refusal = _unusable(first.device) or raw_ops.dtype_refusal(tensors)
    if refusal is not None:
        return refusal
    columns = first.shape[-1]
    if columns > _MAX_COLUMNS:
        return f"its kernels take at most {_MAX_COLUMNS} columns"
    if first.numel() > _MAX_ROWS * columns:
        return f"its kernels take at most {_MAX_ROWS} rows"
    return None


norm_fwd = partial(raw_ops.norm_fwd, "cuda")
norm_bwd = partial(raw_ops.norm_bwd, "cuda")
attention_fwd = partial(raw_ops.attention_fwd, "cuda")
