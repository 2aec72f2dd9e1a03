"""Which tiles the launchers would choose for a call. Nothing runs, and no memory is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from .attention_bwd import bwd_configs
from .attention_call import AttentionCall, attention_call
from .attention_fwd import fwd_config
from .configs import norm_config
from .launch import TARGET, arch, as_rows


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


def _call(spec: Any, *tensors: torch.Tensor | None) -> AttentionCall:
    visibility = (spec.left, spec.right, spec.lower_right)
    longest = (spec.max_seqlen_q, spec.max_seqlen_k)
    stand_ins: list[Any] = [None if tensor is None else _without_memory(tensor) for tensor in tensors]
    asked: list[Any] = [spec.scale, *visibility, spec.softcap, spec.dropout_p, *longest]
    return attention_call(*stand_ins, *asked)


def _attention_fwd_tiles(spec: Any, query: torch.Tensor, *more: torch.Tensor | None) -> dict[str, NamedTuple]:
    return {"": fwd_config(_call(spec, query, *more), arch(query.device))}


def _attention_bwd_tiles(spec: Any, query: torch.Tensor, *more: torch.Tensor | None) -> dict[str, NamedTuple]:
    keys, queries = bwd_configs(_call(spec, query, *more), arch(query.device))
    return {"keys": keys, "queries": queries}


# {operator and direction: (what is asked, tensors of the call) -> {kernel, where there are several: tile}}.
# Backward's is that of contiguous incoming gradients.
TILES: dict[str, Callable[..., dict[str, NamedTuple]]] = {
    "norm_fwd": partial(_norm_tiles, "norm_fwd"),
    "norm_bwd": partial(_norm_tiles, "norm_bwd"),
    "attention_fwd": _attention_fwd_tiles,
    "attention_bwd": _attention_bwd_tiles,
}
