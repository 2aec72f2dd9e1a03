"""Attention: every width of tile, with the dtypes and arguments that change what its kernels hold."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from fastformer.triton_kernels import attention_bwd, attention_fwd, attention_sums

from .case import Case

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
B, H, LENGTH = 4, 16, 4096
# (D, D_v): of powers of two, which kernels need not mask, and of others.
POWERS, OTHERS = ((16, 16), (32, 32), (64, 64), (128, 128), (256, 256)), ((80, 80), (192, 128))
MODES = ("plain", "causal", "everything", "packed")


def _empty(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _arguments(dtype: torch.dtype, D: int, D_v: int, mode: str, M: int = LENGTH) -> tuple[Any, ...]:
    """Those of the raw operator."""
    N = LENGTH
    if mode == "packed":
        total, starts = B * N, _empty(B + 1, dtype=torch.int32)
        rows = (_empty(total, H, width, dtype=dtype) for width in (D, D, D_v))
        return *rows, *(None,) * 7, starts, starts, 0.1, None, 0, False, None, 0.0, M, N
    query, key, value = (
        _empty(B, heads, length, width, dtype=dtype)
        for heads, length, width in ((H, M, D), (H // 2, N, D), (H // 2, N, D_v))
    )
    right = 0 if mode == "causal" else None
    if mode != "everything":
        return query, key, value, *(None,) * 9, 0.1, None, right, False, None, 0.0, None, None
    more = (
        _empty(B, 1, M, N, dtype=torch.bool),
        _empty(B, N, dtype=torch.bool),
        _empty(B, dtype=torch.int64),
        _empty(1, H, M, N, dtype=dtype),
        _empty(H, M + N - 1, dtype=dtype),
        _empty(H, dtype=dtype),
        _empty(1, dtype=torch.int64),
    )
    return query, key, value, *more, None, None, 0.1, 1000, 500, True, 30.0, 0.1, None, None


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
    needs = (tensor is not None for tensor in arguments[6:9])
    attention_bwd.attention_bwd(out, None, None, out, *_statistics(arguments), *arguments, *needs)


def _weights(*given: Any) -> None:
    arguments = _arguments(*given)
    attention_sums.attention_weights(*_statistics(arguments), *arguments, False)


_LAUNCHERS = {"attention_fwd": _forward, "attention_bwd": _backward, "attention_weights": _weights}


def attention_cases(op: str, target: str) -> Iterator[Case]:
    """The plain bfloat16 calls are the gated ones, and causal ones, whose hot loop must be the same."""
    launch = _LAUNCHERS[op]
    for D, D_v in POWERS + OTHERS:
        for dtype in (BF16, F16, F32):
            for mode in MODES:
                if dtype is F16 and mode != "plain":
                    continue
                name = f"D={D} D_v={D_v} {str(dtype).removeprefix('torch.')} {mode}"
                gated = D if dtype is BF16 and mode in ("plain", "causal") and D_v == D else None
                yield Case(op, name, partial(launch, dtype, D, D_v, mode), gated)
    if op == "attention_fwd":
        for dtype in (BF16, F32):
            name = f"D=128 D_v=128 {str(dtype).removeprefix('torch.')} one query"
            yield Case(op, name, partial(launch, dtype, 128, 128, "plain", M=1))
