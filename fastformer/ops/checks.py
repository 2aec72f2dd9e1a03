"""Checks that operators share. Each names the argument, what came and what is wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import explaining

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; wanted a torch.Tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {tensor.dtype}; wanted float32, bfloat16, float16 or float64")


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; wanted {like.device}, where {like_name} is")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; wanted {shape}, which is {meaning}")


def check_dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; wanted a probability from 0 to 1")
    if dropout_p > 0 and round(dropout_p * 65536) == 0:
        raise ValueError(
            f"dropout_p is {dropout_p}; decisions have 16 bits, so that nothing would be dropped: "
            "pass 0, or more than 2**-17"
        )


def resolve_seed(seed: Tensor | int | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed of a call that drops: the caller's, or one drawn from the device's default generator."""
    check_dropout(dropout_p)
    if seed is not None and not isinstance(seed, Tensor):
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(
                f"seed is a {type(seed).__name__}; wanted an int64 tensor of one element, or an int"
            )
        seed = torch.tensor([seed], dtype=torch.int64, device=device)
    if seed is not None:
        if seed.dtype != torch.int64:
            raise TypeError(f"seed has dtype {seed.dtype}; wanted int64")
        if seed.numel() != 1:
            raise ValueError(f"seed has shape {tuple(seed.shape)}; wanted one element")
        if seed.device != device:
            raise ValueError(f"seed is on {seed.device}; wanted {device}, where the inputs are")
    if dropout_p == 0:
        return None
    if seed is None:
        if explaining():
            return torch.zeros(1, dtype=torch.int64, device=device)
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return seed.reshape(1)
