"""What a row gives by itself, before the passes over tiles: the constants of its weights, delta, and the
gradients of the sink and of a bias of one column.

    delta_i = grad_out_i . out_i = sum_j w_ij dw_ij

Where the returned weights have a gradient of their own, delta takes a pass over the keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .attention_call import SIZES, AttentionCall, Rows, Scores, stats_strides
from .attention_passes import ScorePass, stats_at, tile_by_itself
from .attention_tiles import LOG2_E, load_rows, query_at, row_pivots
from .configs import ATTENTION_SUMS
from .launch import MULTIPLY_ADDS, TARGET, all_registers, ceil_div
from .masks import head_of, key_blocks


class RowValues(NamedTuple):
    """Of every row, float32 and as the row statistics lie where not said; None where it is not wanted."""

    max_ptr: Any  # as forward left them
    sum_ptr: Any
    shift_ptr: Any  # the rest is written; see attention_tiles.row_pivots
    factor_ptr: Any
    delta_ptr: Any
    gain_ptr: Any  # see attention_passes.RowTerms
    bias_ptr: Any  # [B, H, M]: sum_j ds_ij, the gradient of a bias of one column
    sink_ptr: Any  # [B, H, tiles of queries]


@triton.jit
def _delta_over_keys(
    call, scores, head, m0, threshold, QUERY_SIGN: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr,
    D_v: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_j w_ij dw_ij of BLOCK queries, [BLOCK]."""
    delta = tl.zeros([BLOCK], tl.float32)
    blocks = key_blocks(head, m0, BLOCK, BLOCK)
    for n0 in range(blocks.begin, blocks.end, BLOCK):
        _, w, dw = tile_by_itself(
            call, scores, head, m0, n0, threshold, QUERY_SIGN, ALIGN, D, D_v, BLOCK_D, BLOCK_DV, BLOCK, BLOCK
        )
        delta += tl.sum(tl.where(w == 0, 0.0, w * dw), 1)
    return delta


@triton.jit
def _sees_one_key(head, offs_m):
    """bool, like offs_m; by window, lengths and padding, but not by a mask of queries and keys."""
    begin, end = head.key_begin + offs_m * 0, head.key_end + offs_m * 0
    if head.left is not None:
        begin = tl.maximum(begin, offs_m + head.offset - head.left)
    if head.right is not None:
        end = tl.minimum(end, offs_m + head.offset + head.right + 1)
    return end - begin == 1


@triton.jit(do_not_specialize=[*SIZES, "tiles"])
def _rows_kernel(
    call,  # attention_call.Tensors
    scores,  # ScorePass
    out,  # None or Rows: [B, H, M, D_v]
    rows,  # RowValues
    M, N, H, H_kv, left, right, lower_right, threshold, tiles,
    QUERY_SIGN: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D_v: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK queries of one head a program."""
    stream, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    head = head_of(call, stream // H, stream % H, M, N, H, H_kv, left, right, lower_right)
    m0 = tile * BLOCK
    offs_m = m0 + tl.arange(0, BLOCK)
    in_rows = offs_m < head.M
    at = stats_at(scores, head, offs_m)
    row_sum = tl.load(rows.sum_ptr + at, mask=in_rows, other=0.0)
    row_max = tl.load(rows.max_ptr + at, mask=in_rows, other=0.0)
    if rows.shift_ptr is not None:
        shift, factor = row_pivots(call, row_max, row_sum)
        tl.store(rows.shift_ptr + at, shift, mask=in_rows)
        tl.store(rows.factor_ptr + at, factor, mask=in_rows)
    if rows.delta_ptr is not None:
        if scores.grad_weights is None:
            o = load_rows(out, query_at(out, head, ALIGN), m0, in_rows, D_v, BLOCK, BLOCK_DV, ALIGN)
            first = query_at(scores.grad_out, head, ALIGN)
            grad_out = load_rows(scores.grad_out, first, m0, in_rows, D_v, BLOCK, BLOCK_DV, ALIGN)
            delta = tl.sum(o.to(tl.float32) * grad_out.to(tl.float32), 1)
        else:
            delta = _delta_over_keys(
                call, scores, head, m0, threshold, QUERY_SIGN, ALIGN, D, D_v, BLOCK_D, BLOCK_DV, BLOCK
            )
        is_constant = row_sum < 0
        if call.sink_ptr is None:
            is_constant = _sees_one_key(head, offs_m)
        tl.store(rows.delta_ptr + at, tl.where(is_constant, 0.0, delta), mask=in_rows)
        tl.store(rows.gain_ptr + at, tl.where(is_constant, 0.0, 1.0), mask=in_rows)
        sees_nothing = row_sum == 0
        grad_lse = tl.zeros([BLOCK], tl.float32)
        if scores.grad_lse_ptr is not None:
            grad_lse = tl.load(scores.grad_lse_ptr + at, mask=in_rows & (row_sum != 0), other=0.0)
        taken = tl.zeros([BLOCK], tl.float32)  # the sink's weight times what lies above lse
        if call.sink_ptr is not None:
            sink = tl.load(call.sink_ptr + head.h).to(tl.float32)
            weight = tl.exp2((sink - row_max) * LOG2_E) / tl.where(sees_nothing, 1.0, row_sum)
            taken = tl.where(sees_nothing, 0.0, weight * (delta - grad_lse))
        if rows.sink_ptr is not None:
            tl.store(rows.sink_ptr + stream.to(tl.int64) * tiles + tile, -tl.sum(taken, 0))
        if rows.bias_ptr is not None:
            # The gradients of a row's scores and of its sink add up to grad_lse.
            tl.store(rows.bias_ptr + stream.to(tl.int64) * M + offs_m, grad_lse + taken, mask=in_rows)


def weight_pass(
    call: AttentionCall, row_max: torch.Tensor, row_sum: torch.Tensor, flags: dict[str, Any]
) -> ScorePass:
    """For passes that want weights alone."""
    scores = ScorePass(
        torch.empty_like(row_max),
        torch.empty_like(row_max),
        None,
        None,
        None,
        *stats_strides(row_max),
        None,
        None,
        1.0,
    )
    _launch(call, scores, None, _values(scores, row_max, row_sum), flags)
    return scores


def gradient_pass(
    call: AttentionCall,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    out: Rows,
    grad_out: Rows,
    grad_lse: torch.Tensor | None,
    grad_weights: torch.Tensor | None,
    column_bias: torch.Tensor | None,
    sink: torch.Tensor | None,
    flags: dict[str, Any],
) -> tuple[ScorePass, torch.Tensor, torch.Tensor]:
    """For passes that want gradients of the scores; and the gradients of a bias [.., .., .., 1] and of the
    sink, empty where these are None.

    grad_weights: None, [B, H, M, N], or [B, M, N] of the mean over heads.
    """
    given, factor = None, 1.0
    if grad_weights is not None:
        b, *h, m, n = grad_weights.stride()
        given = Scores(grad_weights, b, h[0] if h else 0, m, n)
        factor = 1.0 if h else 1.0 / call.H
    delta = torch.empty_like(row_max)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    scores = ScorePass(
        torch.empty_like(row_max),
        torch.empty_like(row_max),
        delta,
        torch.empty_like(row_max),
        grad_lse,
        *stats_strides(row_max),
        grad_out,
        given,
        factor,
    )
    of_rows = None if column_bias is None else delta.new_zeros(call.B, call.H, call.M)
    tiles = ceil_div(call.M, ATTENTION_SUMS.block)
    shares = None if sink is None else delta.new_empty(call.B, call.H, tiles)
    values = _values(scores, row_max, row_sum)
    if given is not None:  # delta then takes weights, which take what is written here
        _launch(call, scores, None, values, flags)
        values = values._replace(shift_ptr=None, factor_ptr=None)
    _launch(
        call,
        scores,
        out,
        values._replace(delta_ptr=delta, gain_ptr=scores.gain_ptr, bias_ptr=of_rows, sink_ptr=shares),
        flags,
    )
    grad_column = delta.new_empty(0)
    if of_rows is not None:
        assert column_bias is not None
        broadcast = [dim for dim in range(3) if column_bias.shape[dim] == 1]
        of_rows = of_rows.sum(broadcast, keepdim=True) if broadcast else of_rows
        grad_column = of_rows[..., None].to(column_bias.dtype)
    return scores, grad_column, delta.new_empty(0) if shares is None else shares.sum((0, 2))


def _values(scores: ScorePass, row_max: torch.Tensor, row_sum: torch.Tensor) -> RowValues:
    return RowValues(row_max, row_sum, scores.shift_ptr, scores.factor_ptr, None, None, None, None)


def _launch(
    call: AttentionCall, scores: ScorePass, out: Rows | None, values: RowValues, flags: dict[str, Any]
) -> None:
    config = ATTENTION_SUMS
    tiles = ceil_div(call.M, config.block)
    _rows_kernel[(call.B * call.H * tiles,)](
        call.tensors,
        scores,
        out,
        values,
        *call.sizes,
        tiles,
        **flags,
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=1,
        **MULTIPLY_ADDS,
        **all_registers(TARGET),  # else float32 with every argument spills 56 bytes on sm_90, 48 on sm_120
    )
