"""Sums of weights, or of gradients of scores, over heads, batch elements, queries or diagonals: the returned
weights, and the gradients of a broadcast bias and of a relative bias.

Weights and gradients are computed anew, and every sum has one order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .attention_call import SIZES, AttentionCall, Scores, attention_call, scores_of
from .attention_passes import ScorePass, gradient_tile, tile_by_itself
from .attention_rows import weight_pass
from .configs import ATTENTION_SUMS
from .launch import MULTIPLY_ADDS, TARGET, all_registers, ceil_div, on_device
from .masks import head_of, key_blocks

_sized = triton.jit(
    do_not_specialize=[*SIZES, "target_H", "members_b", "members_h", "tiles_m", "tiles_n", "row_tiles"]
)


@triton.jit
def _summand(
    call, scores, head, m0, n0, threshold, QUERY_SIGN: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr,
    D_v: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of weights or, where grad_out is given, of gradients of the logits."""
    terms, w, dw = tile_by_itself(
        call, scores, head, m0, n0, threshold, QUERY_SIGN, ALIGN, D, D_v, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N
    )
    if scores.grad_out is None:
        return w
    else:
        return gradient_tile(terms, w, dw - terms.delta, 1.0, True)


@_sized
def _score_sum_kernel(
    call,  # attention_call.Tensors
    scores,  # ScorePass; grad_out None: of weights
    target,  # Scores: [target_B, target_H, M or 1, N]
    factor,
    M, N, H, H_kv, left, right, lower_right, threshold,
    target_H, members_b, members_h, tiles_m, tiles_n, row_tiles,
    QUERY_SIGN: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D_v: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OVER_ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of target a program: factor times the sum over members_b batch elements and members_h heads
    and, with OVER_ROWS, over the queries, row_tiles tiles of them."""
    program = tl.program_id(0)
    n0 = program % tiles_n * BLOCK_N
    first_m = program // tiles_n % tiles_m * BLOCK_M
    slab = program // tiles_n // tiles_m
    b_target, h_target = slab // target_H, slab % target_H
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Addresses that are kept from step to step take more registers than there are.
    for member in tl.range(0, members_b * members_h, disable_licm=True):
        b = b_target + member // members_h
        head = head_of(call, b, h_target + member % members_h, M, N, H, H_kv, left, right, lower_right)
        end_m = tl.minimum(first_m + row_tiles * BLOCK_M, head.M)
        for m0 in tl.range(first_m, end_m, BLOCK_M, disable_licm=True):
            begin, _, _, end = key_blocks(head, m0, BLOCK_M, BLOCK_N)
            if (n0 >= begin) & (n0 < end):
                total += _summand(
                    call, scores, head, m0, n0, threshold,
                    QUERY_SIGN, ALIGN, D, D_v, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                )  # fmt: skip
    total *= factor
    at = target.ptr + b_target.to(tl.int64) * target.stride_b + h_target.to(tl.int64) * target.stride_h
    offs_n = n0 + tl.arange(0, BLOCK_N)
    columns = offs_n.to(tl.int64) * target.stride_n
    if OVER_ROWS:
        row = tl.sum(total, 0)
        tl.store(at + columns, row.to(target.ptr.dtype.element_ty), mask=offs_n < N)
    else:
        offs_m = first_m + tl.arange(0, BLOCK_M)
        pointers = at + offs_m.to(tl.int64)[:, None] * target.stride_m + columns[None, :]
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        tl.store(pointers, total.to(target.ptr.dtype.element_ty), mask=inside)


@_sized
def _relative_bias_kernel(
    call, scores,
    shares_ptr,  # float32 [B, H, tiles_m + tiles_n - 1, 2, BLOCK]
    M, N, H, H_kv, left, right, lower_right, threshold, tiles_m, tiles_n,
    QUERY_SIGN: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D_v: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the diagonals of the tiles [BLOCK, BLOCK] that lie on one diagonal of tiles, a program.

    Each row is rotated by its number, so that a diagonal becomes a column: column t then holds the diagonals
    t (of keys right of the tile's own diagonal) and t - BLOCK (left of it), which are two shares.
    """
    tile_diagonals = tiles_m + tiles_n - 1
    stream, diagonal = tl.program_id(0) // tile_diagonals, tl.program_id(0) % tile_diagonals
    ahead = diagonal - (tiles_m - 1)  # how many tiles the keys' lies beyond the queries'
    head = head_of(call, stream // H, stream % H, M, N, H, H_kv, left, right, lower_right)
    r = tl.arange(0, BLOCK)[:, None]
    t = tl.arange(0, BLOCK)[None, :]
    rotated = (t + r) & (BLOCK - 1)  # [BLOCK, BLOCK]
    is_right = t + r < BLOCK
    lower = tl.zeros([BLOCK], tl.float32)
    upper = tl.zeros([BLOCK], tl.float32)
    first = tl.maximum(0, -ahead)
    last = tl.minimum(tl.cdiv(head.M, BLOCK), tl.cdiv(head.N, BLOCK) - ahead)
    for tile in range(first, last):
        m0, n0 = tile * BLOCK, (tile + ahead) * BLOCK
        begin, _, _, end = key_blocks(head, m0, BLOCK, BLOCK)
        if (n0 >= begin) & (n0 < end):
            ds = _summand(
                call, scores, head, m0, n0, threshold,
                QUERY_SIGN, ALIGN, D, D_v, BLOCK_D, BLOCK_DV, BLOCK, BLOCK,
            )  # fmt: skip
            ds = tl.gather(ds, rotated, 1)
            upper += tl.sum(tl.where(is_right, ds, 0.0), 0)
            lower += tl.sum(tl.where(is_right, 0.0, ds), 0)
    share = shares_ptr + tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, BLOCK)
    tl.store(share, lower)
    tl.store(share + BLOCK, upper)


def _run_sum(
    call: AttentionCall, scores: ScorePass, target: Scores, sizes: tuple[int, ...], factor: float, flags: dict
) -> None:
    """sizes: target's B, H and M."""
    target_B, target_H, target_M = sizes
    config = ATTENTION_SUMS
    tiles_m, tiles_n = ceil_div(target_M, config.block), ceil_div(call.N, config.block)
    over_rows = target_M < call.M
    _score_sum_kernel[(target_B * target_H * tiles_m * tiles_n,)](
        call.tensors,
        scores,
        target,
        factor,
        *call.sizes,
        target_H,
        1 if target_B == call.B else call.B,
        1 if target_H == call.H else call.H,
        tiles_m,
        tiles_n,
        ceil_div(call.M, config.block) if over_rows else 1,
        **flags,
        BLOCK_M=config.block,
        BLOCK_N=config.block,
        OVER_ROWS=over_rows,
        num_warps=config.num_warps,
        num_stages=1,
        **MULTIPLY_ADDS,
        **all_registers(TARGET),  # else float32 with every argument spills 40 bytes
    )


def sum_bias(
    call: AttentionCall, scores: ScorePass, bias: torch.Tensor, flags: dict[str, Any]
) -> torch.Tensor:
    """The gradient of a bias [B or 1, H or 1, M or 1, N]."""
    grad = torch.empty_like(bias, memory_format=torch.contiguous_format)
    target = scores_of(grad)
    assert target is not None
    _run_sum(call, scores, target, tuple(grad.shape[:3]), 1.0, flags)
    return grad


def sum_relative_bias(
    call: AttentionCall, scores: ScorePass, rows: int, flags: dict[str, Any]
) -> torch.Tensor:
    """The gradient of relative_bias, float32 [rows, M + N - 1], where rows is H or 1."""
    config = ATTENTION_SUMS
    block = config.block
    tiles_m, tiles_n = ceil_div(call.M, block), ceil_div(call.N, block)
    diagonals = tiles_m + tiles_n - 1
    shares = scores.shift_ptr.new_empty(call.B, call.H, diagonals, 2, block)
    _relative_bias_kernel[(call.B * call.H * diagonals,)](
        call.tensors,
        scores,
        shares,
        *call.sizes,
        tiles_m,
        tiles_n,
        **flags,
        BLOCK=block,
        num_warps=config.num_warps,
        num_stages=1,
        **MULTIPLY_ADDS,
        **all_registers(TARGET),  # else float32 with biases, softcap and dropout spills 8 bytes on sm_90
    )
    # The lower half of a diagonal of tiles is the upper half of the one before.
    shares = shares.sum((0, 1) if rows == 1 else 0).view(rows, diagonals, 2, block)
    sums = shares.new_zeros(rows, diagonals + 1, block)
    sums[:, :-1] += shares[:, :, 0]
    sums[:, 1:] += shares[:, :, 1]
    first = tiles_m * block - call.M + 1
    # A copy, of one row too: `contiguous` would return that as a view from its middle.
    grad = sums.view(rows, -1)[:, first : first + call.M + call.N - 1]
    return grad.clone(memory_format=torch.contiguous_format)


def attention_weights(row_max: torch.Tensor, row_sum: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """The weights after dropout, in query's dtype: [B, H, M, N], or [B, M, N] averaged over heads.

    Args:
        row_max, row_sum: As attention_fwd gave them.
        arguments: Those of `attention_call`, and whether to average.
    """
    *arguments, mean = arguments  # type: ignore[assignment]
    call = attention_call(*arguments)
    B, H, M, N = call.B, call.H, call.M, call.N
    weights = arguments[0].new_empty((B, M, N) if mean else (B, H, M, N))
    if weights.numel() == 0 or H == 0:
        return weights.zero_()
    heads = 1 if mean else H
    target = Scores(weights, heads * M * N, M * N, N, 1)
    with on_device(weights):
        scores = weight_pass(call, row_max, row_sum, call.flags)
        _run_sum(call, scores, target, (B, heads, M), 1.0 / H if mean else 1.0, call.flags)
    return weights
