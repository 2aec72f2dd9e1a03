"""Triton's kernels: CUDA and HIP tensors, and CPU tensors while Triton's interpreter is on.

Importing this module does not import Triton: the kernels are imported by the first call that needs them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from . import raw_ops

_SERVED = ("norm_fwd", "norm_bwd", "attention_fwd", "attention_bwd")
# Grids and row numbers are 32-bit.
_MAX_ROWS = 2**31 - 1
_MAX_HEAD_DIM = 256
_OLDEST_CAPABILITY = (8, 0)


@functools.cache
def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def _interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter. That is settled once, when they are imported."""
    kernels = sys.modules.get("fastformer.triton_kernels")
    if kernels is not None:
        return kernels.INTERPRETED
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _device_refusal(device: torch.device) -> str | None:
    if torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        return f"its kernels need compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
    return None


def ready() -> str | None:
    """None where some tensors can be served on this machine, else the reason why not."""
    missing = _missing_triton()
    if missing is not None or _interpreting():
        return missing
    if not torch.cuda.is_available():
        return "torch sees no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    return _device_refusal(torch.device("cuda", torch.cuda.current_device()))


def why_not(op: str, spec: Any, tensors: tuple[Tensor | None, ...]) -> str | None:
    """None if `op` on these tensors can be served, else the reason in one sentence."""
    if op not in _SERVED:
        return f"it has no {op} yet"
    missing = _missing_triton()
    if missing is not None:
        return missing
    refusal = raw_ops.dtype_refusal(tensors)
    if refusal is not None:
        return refusal
    first = tensors[0]
    assert first is not None
    if op in ("attention_fwd", "attention_bwd"):
        refusal = _attention_refusal(tensors)
        if refusal is not None:
            return refusal
    if first.numel() > _MAX_ROWS * first.shape[-1]:
        return f"its kernels take at most {_MAX_ROWS} rows"
    if first.device.type == "cuda":
        return None if _interpreting() else _device_refusal(first.device)
    if first.device.type != "cpu":
        return f"it serves CUDA and HIP tensors, not {first.device.type}"
    return (
        None if _interpreting() else "it serves CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"
    )


def _attention_refusal(tensors: tuple[Tensor | None, ...]) -> str | None:
    query, _, value, *_ = tensors
    assert query is not None and value is not None
    for name, width in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if not 1 <= width <= _MAX_HEAD_DIM:
            return f"its attention takes head dims of 1 to {_MAX_HEAD_DIM}, and {name}'s is {width}"
    return None


norm_fwd = partial(raw_ops.norm_fwd, "triton")
norm_bwd = partial(raw_ops.norm_bwd, "triton")
attention_fwd = partial(raw_ops.attention_fwd, "triton")
attention_bwd = partial(raw_ops.attention_bwd, "triton")
attention_weights = partial(raw_ops.attention_weights, "triton")


def _norm_fwd_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..triton_kernels.norm_fwd import norm_fwd as launch

    return launch(*args)


def _norm_bwd_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..triton_kernels.norm_bwd import norm_bwd as launch

    return launch(*args)


def _attention_fwd_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..triton_kernels.attention_fwd import attention_fwd as launch

    return launch(*args)


def _attention_bwd_kernel(*args: Any) -> tuple[Tensor, ...]:
    from ..triton_kernels.attention_bwd import attention_bwd as launch

    return launch(*args)


def _attention_weights_kernel(*args: Any) -> Tensor:
    from ..triton_kernels.attention_sums import attention_weights as launch

    return launch(*args)


_library = Library("fastformer", "IMPL")
for _key in ("CUDA", "CPU"):  # CPU: the interpreter
    _library.impl("norm_fwd_triton", _norm_fwd_kernel, _key)
    _library.impl("norm_bwd_triton", _norm_bwd_kernel, _key)
    _library.impl("attention_fwd_triton", _attention_fwd_kernel, _key)
    _library.impl("attention_bwd_triton", _attention_bwd_kernel, _key)
    _library.impl("attention_weights_triton", _attention_weights_kernel, _key)
