"""Triton's kernels: CUDA and HIP tensors, and CPU tensors while Triton's interpreter is on.

Importing this module does not import Triton: the kernels are imported by the first call that needs them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from . import raw_ops

_SERVED = ("norm_fwd", "norm_bwd")
# {raw operator and launcher: its module in triton_kernels}
_LAUNCHERS = {"norm_fwd": "norm_fwd", "norm_bwd": "norm_bwd"}
# Grids and row numbers are 32-bit.
_MAX_ROWS = 2**31 - 1
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
    if missing is not None or _interpreting():
        return missing
    if not torch.cuda.is_available():
        return "torch sees no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    return _device_refusal(torch.device("cuda", torch.cuda.current_device()))


@raw_ops.constant_in_graphs
def _unusable(device: torch.device) -> str | None:
    """None where tensors on `device` can be served, else the reason why not."""
    missing = _missing_triton()
    if missing is not None:
        return missing
    if device.type == "cuda":
        return None if _interpreting() else _device_refusal(device)
    if device.type != "cpu":
        return f"it serves CUDA and HIP tensors, not {device.type}"
    return (
        None if _interpreting() else "it serves CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"
    )


def why_not(op: str, spec: Any, tensors: tuple[Tensor | None, ...]) -> str | None:
    """None if `op` on these tensors can be served, else the reason in one sentence."""
    if op not in _SERVED:
        return f"it has no {op} yet"
    first = tensors[0]
    assert first is not None
    refusal = _unusable(first.device) or raw_ops.dtype_refusal(tensors)
    if refusal is not None:
        return refusal
    if first.numel() > _MAX_ROWS * first.shape[-1]:
        return f"its kernels take at most {_MAX_ROWS} rows"
    return None


def configuration(op: str, spec: Any, tensors: tuple[Tensor | None, ...]) -> str | None:
    """The tiles that `op`, which is served, chooses for these tensors, those of forward for backward too."""
    from ..triton_kernels.chosen import TILES

    if op not in TILES or any(tensor is not None and tensor.numel() == 0 for tensor in tensors):
        return None
    return "; ".join(
        (f"{kernel}: " if kernel else "") + ", ".join(f"{n}={value}" for n, value in tile._asdict().items())
        for kernel, tile in TILES[op](spec, *tensors).items()
    )


norm_fwd = partial(raw_ops.norm_fwd, "triton")
norm_bwd = partial(raw_ops.norm_bwd, "triton")


def _launcher(module: str, name: str) -> Callable[..., Any]:
    """The launcher `name`, imported by its first call: an import statement costs each call a microsecond."""

    @functools.cache
    def imported() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"fastformer.triton_kernels.{module}"), name)

    return lambda *arguments: imported()(*arguments)


_library = Library("fastformer", "IMPL")
for _op, _module in _LAUNCHERS.items():
    for _key in ("CUDA", "CPU"):  # CPU: the interpreter
        _library.impl(f"{_op}_triton", _launcher(_module, _op), _key)
