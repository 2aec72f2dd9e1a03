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
from .feed_forward import hidden_tile
from .feed_forward_bwd import hidden_bwd_tile
from .gemm import along_columns, along_rows, as_matrix, gemm_tile, weight_operands
from .launch import TARGET, arch, as_rows
from .norm_configs import norm_config


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


def _feed_forward(tensors: tuple[torch.Tensor | None, ...]) -> tuple[Any, ...]:
    """Device, rows of x [rows, E], w1, w_gate and w2, of the tensors of specs.FEED_FORWARD_TENSORS."""
    x, w1, _, w_gate, _, w2, *_ = (None if tensor is None else _without_memory(tensor) for tensor in tensors)
    assert x is not None and tensors[0] is not None
    return tensors[0].device, as_matrix(x), w1, w_gate, w2


def _feed_forward_fwd_tiles(spec: Any, *tensors: torch.Tensor | None) -> dict[str, NamedTuple]:
    device, x, w1, w_gate, w2 = _feed_forward(tensors)
    hidden = along_columns(x.new_empty(x.shape[0], w1.shape[0]))
    out = gemm_tile(device, x.shape[0], *w2.shape, hidden, *weight_operands(w2))[0]
    return {"hidden": hidden_tile(device, x, w1, w_gate)[0], "out": out}


def _feed_forward_bwd_tiles(spec: Any, *tensors: torch.Tensor | None) -> dict[str, NamedTuple]:
    device, x, w1, w_gate, w2 = _feed_forward(tensors)
    (rows, E), (E_out, F) = x.shape, w2.shape
    grad, hidden = x.new_empty(rows, E_out), x.new_empty(rows, F)
    weights = [w1] if w_gate is None else [w1, w_gate]
    b, *second = weight_operands(*weights, backward=True)
    a = along_columns(hidden)
    return {
        "hidden": hidden_bwd_tile(device, grad, F, E_out, w2, w_gate is not None)[0],
        "x": gemm_tile(device, rows, E, F, a, b, *second)[0],
        "w1": gemm_tile(device, F, E, rows, along_rows(hidden), along_rows(x))[0],
        "w2": gemm_tile(device, E_out, F, rows, along_rows(grad), along_rows(hidden))[0],
    }


# {operator and direction: (what is asked, tensors of the call) -> {kernel, where there are several: tile}}.
# Backward's is that of contiguous incoming gradients, all tensors wanting theirs; w_gate's is w1's.
TILES: dict[str, Callable[..., dict[str, NamedTuple]]] = {
    "norm_fwd": partial(_norm_tiles, "norm_fwd"),
    "norm_bwd": partial(_norm_tiles, "norm_bwd"),
    "attention_fwd": _attention_fwd_tiles,
    "attention_bwd": _attention_bwd_tiles,
    "feed_forward_fwd": _feed_forward_fwd_tiles,
    "feed_forward_bwd": _feed_forward_bwd_tiles,
}
