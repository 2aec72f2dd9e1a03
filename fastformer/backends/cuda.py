"""The CUDA C++ half of fastformer._C: norms, attention and feed_forward, on CUDA tensors."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..specs import AttentionSpec
from . import raw_ops

_SERVED = (
    "norm_fwd",
    "norm_bwd",
    "attention_fwd",
    "attention_bwd",
    "paged_attention_fwd",
    "feed_forward_fwd",
    "feed_forward_bwd",
)
_OLDEST_CAPABILITY = (8, 0)
# Grids and row numbers are 32-bit.
_MAX_ROWS = 2**31 - 1
_MAX_COLUMNS = 2**30
# A product counts past its last row and column to the end of a tile.
_MAX_PRODUCT = 2**31 - 2**16
# Fewer rows of feed_forward, and as many queries, are little work.
_FEW_ROWS, _FEW_QUERIES = 128, 16
_MAX_HEAD_DIM = 256
# Queries and keys together, so that sums of positions stay 32-bit.
_MAX_POSITIONS = 2**29
# Major compute capabilities whose tensor cores take whole tiles from shared memory.
_FED_FROM_SHARED = (9, 10)
# Where tensor cores multiply float32, in three products of its parts, faster than multiply-adds do. Of these
# 16 x 8 x 8 take 64 cycles of a quarter of a multiprocessor on 8.0 and 32 on all others; the three products
# take 24 on 8.0 and about 19 on 9.0, but 48 or, of GeForce, 96 on 8.6, 8.9 and 12.x. (10.0: not measured.)
_FASTER_IN_PARTS = ((8, 0), (9, 0))


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
    if op.startswith("attention"):
        return _attention_refusal(spec, tensors)
    if op == "paged_attention_fwd":
        query, key_pages, value_pages, page_table = tensors[:4]
        assert query is not None and key_pages is not None
        assert value_pages is not None and page_table is not None
        return _rows_refusal(query, value_pages, query.shape[2], page_table.shape[1] * key_pages.shape[1])
    if op.startswith("feed_forward"):
        return _feed_forward_refusal(tensors)
    return _norm_refusal(first)


def _norm_refusal(x: Tensor) -> str | None:
    columns = x.shape[-1]
    if columns > _MAX_COLUMNS:
        return f"its kernels take at most {_MAX_COLUMNS} columns"
    if x.numel() > _MAX_ROWS * columns:
        return f"its kernels take at most {_MAX_ROWS} rows"
    return None


def _feed_forward_refusal(tensors: tuple[Tensor | None, ...]) -> str | None:
    x, w1, w2 = tensors[0], tensors[1], tensors[5]
    assert x is not None and w1 is not None and w2 is not None
    if max(math.prod(x.shape[:-1]), *w1.shape, w2.shape[0]) > _MAX_PRODUCT:
        return f"its feed_forward takes at most {_MAX_PRODUCT} rows, and such widths"
    return None


def _attention_refusal(spec: AttentionSpec, tensors: tuple[Tensor | None, ...]) -> str | None:
    query, key, value = tensors[:3]
    assert query is not None and key is not None and value is not None
    return _rows_refusal(query, value, *_lengths(spec, query, key))


def _rows_refusal(query: Tensor, value: Tensor, M: int, N: int) -> str | None:
    for name, width in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if not 1 <= width <= _MAX_HEAD_DIM:
            return f"its attention takes head dims of 1 to {_MAX_HEAD_DIM}, and {name}'s is {width}"
    if M + N >= _MAX_POSITIONS or math.prod(query.shape[:-1]) > _MAX_ROWS:
        return (
            f"its attention takes {_MAX_POSITIONS} queries and keys of a head, and {_MAX_ROWS} rows, at most"
        )
    return None


def _lengths(spec: AttentionSpec, query: Tensor, key: Tensor) -> tuple[int, int]:
    packed = query.dim() == 3
    M, N = (spec.max_seqlen_q, spec.max_seqlen_k) if packed else (query.shape[2], key.shape[2])
    assert M is not None and N is not None
    return M, N


def gives_way(op: str, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether "auto" should prefer Triton's kernel, where that serves the call: these take their operands
    from registers, which is half the rate of tensor cores that take tiles from shared memory. Not where
    little is to be done, which takes Triton longer to launch than to do: one query beside 8192 keys took an
    H100 41 us and Triton 300, feed_forward of 32 rows 226 and 423. Triton has no kernel for pages."""
    first = tensors[0]
    assert first is not None
    if op.startswith(("norm", "paged")):
        return False
    if first.dtype == torch.float32:
        return not _is_faster_in_parts(first.device)
    if op.startswith("feed_forward"):
        little = math.prod(first.shape[:-1]) < _FEW_ROWS
    else:
        little = op == "attention_fwd" and first.dim() == 4 and first.shape[2] <= _FEW_QUERIES
    return not little and _is_fed_from_shared(first.device)


@raw_ops.constant_in_graphs
def _is_faster_in_parts(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) in _FASTER_IN_PARTS


@raw_ops.constant_in_graphs
def _is_fed_from_shared(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] in _FED_FROM_SHARED


globals().update(raw_ops.functions("cuda", (*_SERVED, "attention_weights")))
