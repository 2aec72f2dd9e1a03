"""Attention: every tile that can be chosen, with the arguments that change what its kernels hold."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from fastformer.triton_kernels import attention_bwd, attention_fwd, attention_sums

from .case import Case

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
B, H, LENGTH = 4, 16, 4096
# Head dims of the entries in configs.py.
WIDTHS = (64, 128, 256)
# Those that leave the tile to the head dim alone bound as many sides of a query's keys.
SIDES = ("plain", "causal", "window")


def _empty(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _arguments(dtype: torch.dtype, D: int, D_v: int, mode: str, M: int = LENGTH) -> tuple[Any, ...]:
    """Those of the raw operator."""
    N = LENGTH
    left, right = {"causal": (None, 0), "packed": (None, 0), "window": (1000, 500)}.get(mode, (None, None))
    if mode == "packed":
        total, starts = B * N, _empty(B + 1, dtype=torch.int32)
        rows = (
            _empty(total, heads, width, dtype=dtype) for heads, width in ((H, D), (H // 2, D), (H // 2, D_v))
        )
        return *rows, *(None,) * 7, starts, starts, 0.1, left, right, False, None, 0.0, M, N
    query, key, value = (
        _empty(B, heads, length, width, dtype=dtype)
        for heads, length, width in ((H, M, D), (H // 2, N, D), (H // 2, N, D_v))
    )
    mask = padding = lengths = bias = relative_bias = sink = seed = None
    softcap = 30.0 if mode in ("softcap", "everything") else None
    if mode == "key mask":
        mask = _empty(B, 1, 1, N, dtype=torch.bool)
    if mode == "mask":
        mask = _empty(B, 1, M, N, dtype=torch.bool)
    if mode in ("lengths", "everything"):
        lengths, sink = _empty(B, dtype=torch.int64), _empty(H, dtype=dtype)
    if mode == "everything":
        mask, padding = _empty(B, 1, M, N, dtype=torch.bool), _empty(B, N, dtype=torch.bool)
        bias, relative_bias = _empty(1, H, M, N, dtype=dtype), _empty(H, M + N - 1, dtype=dtype)
        left, right = 1000, 500
    if mode in ("dropout", "everything"):
        seed = _empty(1, dtype=torch.int64)
    if mode == "relative bias":
        relative_bias = _empty(H, M + N - 1, dtype=dtype)
    if mode == "bias":  # broadcast over nothing
        bias = _empty(B, H, M, N, dtype=dtype)
    tensors = (mask, padding, lengths, bias, relative_bias, sink, seed, None, None)
    dropout_p = 0.0 if seed is None else 0.1
    return query, key, value, *tensors, 0.1, left, right, True, softcap, dropout_p, None, None


def _statistics(arguments: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    query = arguments[0]
    rows = query.shape[:-1] if query.dim() == 4 else (query.shape[1], query.shape[0])
    return _empty(*rows), _empty(*rows)


def _forward(*given: Any, **more: Any) -> None:
    attention_fwd.attention_fwd(*_arguments(*given, **more))


def _backward(*given: Any) -> None:
    arguments = _arguments(*given)
    query, value = arguments[0], arguments[2]
    out = _empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    grad_lse = grad_weights = None
    if given[-1] == "everything":
        grad_lse, grad_weights = _empty(B, H, LENGTH), _empty(B, H, LENGTH, LENGTH, dtype=query.dtype)
    needs = (tensor is not None for tensor in arguments[6:9])
    gradients = out, grad_lse, grad_weights
    attention_bwd.attention_bwd(*gradients, out, *_statistics(arguments), *arguments, *needs)


def _weights(*given: Any) -> None:
    arguments = _arguments(*given)
    attention_sums.attention_weights(*_statistics(arguments), *arguments, False)


_LAUNCHERS = {"attention_fwd": _forward, "attention_bwd": _backward, "attention_weights": _weights}


def _calls(op: str) -> Iterator[tuple[torch.dtype, int, int, str]]:
    """(dtype, D, D_v, mode). First what tiles are chosen by, then what else a kernel is compiled for."""
    for D in WIDTHS:
        if op != "attention_weights":  # whose one tile everything holds most registers in
            for mode in SIDES if op == "attention_fwd" else SIDES[:2]:
                yield BF16, D, D, mode
            yield F32, D, D, "plain"
        for dtype in (BF16, F32):
            yield dtype, D, D, "everything"
        if op == "attention_bwd":  # which writes the gradient of such a bias as it goes
            yield BF16, D, D, "bias"
    if op == "attention_bwd":  # alone these spilled where everything did not
        for D, mode in ((64, "softcap"), (64, "dropout"), (128, "relative bias")):
            yield BF16, D, D, mode
    # A tile narrower than the entry's width; columns past the head's, which are masked; rows that are not
    # aligned; and two widths.
    for D, D_v, mode in ((16, 16, "plain"), (80, 80, "causal"), (65, 31, "plain"), (192, 128, "plain")):
        yield BF16, D, D_v, mode
    if op != "attention_weights":
        for D in WIDTHS[:2]:
            yield BF16, D, D, "packed"
            yield BF16, D, D, "lengths"
        yield BF16, 128, 128, "key mask"
        yield BF16, 256, 256, "softcap"
        yield BF16, 128, 128, "mask"
        for dtype in (BF16, F32):  # which takes more registers and shared memory than everything at once
            yield dtype, 256, 256, "mask"
        yield F16, 128, 128, "plain"


def attention_cases(op: str, target: str) -> Iterator[Case]:
    """The plain bfloat16 calls are the gated ones; the figures of causal ones are told beside them."""
    launch = _LAUNCHERS[op]
    for dtype, D, D_v, mode in _calls(op):
        name = f"D={D} D_v={D_v} {str(dtype).removeprefix('torch.')} {mode}"
        told = dtype is BF16 and mode in SIDES[:2] and D_v == D
        dim = D if told else None
        call = partial(launch, dtype, D, D_v, mode)
        yield Case(op, name, call, dim, told and mode == "plain", tensor_cores=dtype is not F32)
    if op == "attention_fwd":
        for D in WIDTHS:
            for dtype, modes in ((BF16, (*SIDES, "everything")), (F32, ("plain", "everything"))):
                for mode in modes:
                    name = f"D={D} D_v={D} {str(dtype).removeprefix('torch.')} {mode}, one query"
                    call = partial(launch, dtype, D, D, mode, M=1)
                    yield Case(op, name, call, tensor_cores=dtype is not F32)
