"""Which tiles the launchers would choose for a call's tensors. Nothing runs, and no memory is read."""

from __future__ import annotations

import math

import torch

from .configs import NormConfig, norm_config
from .launch import TARGET, as_rows


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A stand-in that copies nothing where a launcher makes rows contiguous."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def norm_tile(op: str, x: torch.Tensor, residual: torch.Tensor | None) -> NormConfig | None:
    """The tile of `op`, "norm_fwd" or "norm_bwd", for a call of `norm_fwd`; None where there is nothing to do.

    x and residual: [..., C] as in `norm_fwd`. Backward's is that of contiguous incoming gradients.
    """
    C = x.shape[-1]
    if x.numel() == 0:
        return None
    read = [x] if residual is None else [x, residual]
    if op == "norm_bwd" and residual is not None:
        read = []  # the sum that forward wrote, contiguous
    strides = (as_rows(_without_memory(tensor))[1] for tensor in read)
    return norm_config(TARGET, op, C, math.gcd(C, 8, *strides))
