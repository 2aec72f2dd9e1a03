"""Which tiles the launchers would choose for a call. Nothing runs, and no memory is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from .configs import norm_config
from .launch import TARGET, as_rows


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A stand-in that copies nothing where a launcher makes rows contiguous."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _norm_tiles(
    op: str, spec: Any, x: torch.Tensor, residual: torch.Tensor | None, *_: torch.Tensor | None
) -> dict[str, NamedTuple]:
    C = x.shape[-1]
    read = [x] if residual is None else [x, residual]
    if op == "norm_bwd" and residual is not None:
        read = []  # the sum that forward wrote, contiguous
    strides = (as_rows(_without_memory(tensor))[1] for tensor in read)
    return {"": norm_config(TARGET, op, C, math.gcd(C, 8, *strides))}


# {operator and direction: (what is asked, tensors of the call) -> {kernel, where there are several: tile}}.
# Backward's is that of contiguous incoming gradients.
TILES: dict[str, Callable[..., dict[str, NamedTuple]]] = {
    op: partial(_norm_tiles, op) for op in ("norm_fwd", "norm_bwd")
}
