"""Triton's kernels: CUDA and HIP tensors, and CPU tensors while Triton's interpreter is on.

Importing this module does not import Triton: the kernels are imported by the first call that needs them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from ..specs import PagedAttentionSpec
from . import paged, raw_ops

# {raw operator: the module of its launcher, which the first call imports}.
_LAUNCHERS = {
    "norm_fwd": "norm_fwd",
    "norm_bwd": "norm_bwd",
    "attention_fwd": "attention_fwd",
    "attention_bwd": "attention_bwd",
    "attention_weights": "attention_sums",
    "feed_forward_fwd": "feed_forward",
    "feed_forward_bwd": "feed_forward_bwd",
}
_SERVED = (*_LAUNCHERS, "paged_attention_fwd")
# Grids and row numbers are 32-bit.
_MAX_ROWS = 2**31 - 1
# A product counts past the last row and the last column of k to the end of its tile.
_MAX_FEED_FORWARD_ROWS = 2**31 - 2**16
_MAX_HEAD_DIM = 256
_OLDEST_CAPABILITY = (8, 0)
# The first whose functions return None and constants as such.
_OLDEST_TRITON = (3, 7)


@functools.cache
def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@functools.cache
def _old_triton() -> str | None:
    """Imports Triton."""
    import triton

    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) >= _OLDEST_TRITON:
        return None
    wanted = ".".join(map(str, _OLDEST_TRITON))
    return (
        f"its kernels need triton {wanted}, which torch 2.12 brings along; {triton.__version__} is installed"
    )


def _interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter. That is settled once, when they are imported."""
    kernels = sys.modules.get("fastformer.triton_kernels")
    if kernels is not None:
        return kernels.INTERPRETED
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _device_refusal(device: torch.device) -> str | None:
    # Where torch sees no GPU only fake tensors are on one: nothing runs, and who will run it cannot be asked.
    if torch.version.hip or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        return f"its kernels need compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
    return None


def ready() -> str | None:
    """None where some tensors can be served on this machine, else the reason why not."""
    missing = _missing_triton()
    if missing is not None:
        return missing
    if _interpreting():
        return _old_triton()
    if not torch.cuda.is_available():
        return "torch sees no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    return _old_triton() or _device_refusal(torch.device("cuda", torch.cuda.current_device()))


@raw_ops.constant_in_graphs
def _unusable(device: torch.device) -> str | None:
    """None where tensors on `device` can be served, else the reason why not."""
    missing = _missing_triton()
    if missing is not None:
        return missing
    if device.type not in ("cuda", "cpu"):
        return f"it serves CUDA and HIP tensors, not {device.type}"
    if _interpreting():
        return _old_triton()
    if device.type == "cpu":
        return "it serves CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"
    return _old_triton() or _device_refusal(device)


def why_not(op: str, spec: Any, tensors: tuple[Tensor | None, ...]) -> str | None:
    """None if `op` on these tensors can be served, else the reason in one sentence."""
    if op not in _SERVED:
        return f"it has no {op} yet"
    first = tensors[0]
    assert first is not None
    return _size_refusal(op, tensors) or _unusable(first.device) or raw_ops.dtype_refusal(tensors)


def _size_refusal(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    first = tensors[0]
    assert first is not None
    most = _MAX_FEED_FORWARD_ROWS if op.startswith("feed_forward") else _MAX_ROWS
    if math.prod(first.shape[:-1]) > most:
        return f"its kernels take at most {most} rows"
    if "attention" in op:
        value = tensors[2]
        assert value is not None
        for name, width in (("query", first.shape[-1]), ("value", value.shape[-1])):
            if not 1 <= width <= _MAX_HEAD_DIM:
                return f"its attention takes head dims of 1 to {_MAX_HEAD_DIM}, and {name}'s is {width}"
    return paged.refusal(tensors) if op == "paged_attention_fwd" else None


def configuration(op: str, spec: Any, tensors: tuple[Tensor | None, ...]) -> str | None:
    """The tiles that `op`, which is served, chooses for these tensors, those of forward for backward too."""
    from ..triton_kernels.chosen import TILES

    if op == "paged_attention_fwd":
        return _packed_configuration(spec, tensors)
    if op not in TILES or any(tensor is not None and tensor.numel() == 0 for tensor in tensors):
        return None
    on_gpu = any(tensor is not None and tensor.device.type == "cuda" for tensor in tensors)
    if on_gpu and not torch.cuda.is_available():
        return None  # fake tensors, on who knows which GPU
    return "; ".join(
        (f"{kernel}: " if kernel else "") + ", ".join(f"{n}={value}" for n, value in tile._asdict().items())
        for kernel, tile in TILES[op](spec, *tensors).items()
    )


def _packed_configuration(spec: PagedAttentionSpec, tensors: tuple[Tensor | None, ...]) -> str | None:
    """That of attention on what is gathered. Nothing is: fake tensors have no memory."""
    from torch._subclasses import FakeTensor, FakeTensorMode

    if any(isinstance(tensor, FakeTensor) or tensor.numel() == 0 for tensor in tensors if tensor is not None):
        return None
    with FakeTensorMode() as mode:
        fakes = [None if tensor is None else mode.from_tensor(tensor) for tensor in tensors]
        arguments: list[Any] = [*fakes, spec.scale, spec.left, spec.right, spec.softcap]
        asked, gathered = paged.packed(*arguments)
    return configuration("attention_fwd", asked, gathered)


globals().update(raw_ops.functions("triton", _SERVED))


@functools.cache
def _launcher(op: str) -> Callable[..., Any]:
    module = importlib.import_module(f"..triton_kernels.{_LAUNCHERS[op]}", __package__)
    return getattr(module, op)


def _launch(op: str, *args: Any) -> Any:
    return _launcher(op)(*args)


_library = Library("fastformer", "IMPL")
for _key in ("CUDA", "CPU"):  # CPU: the interpreter
    for _op in _LAUNCHERS:
        _library.impl(f"{_op}_triton", partial(_launch, _op), _key)
    _library.impl("paged_attention_fwd_triton", partial(paged.paged_attention_fwd, "triton"), _key)
