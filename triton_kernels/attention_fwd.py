"""Attention forward: online softmax over blocks of keys, a tile of one head's queries a program.

    m' = max(m, max_j s_ij)                l' = l e^(m - m') + sum_j e^(s_ij - m')
    o' = o e^(m - m') + sum_j keep_ij e^(s_ij - m') v_j
    out = o / (l (1 - p))                  lse = m + ln(l)

(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023.)
Few queries of many keys are split over the keys: each program leaves its own o, m and l, which a second
kernel adds up in order.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .attention_call import SIZES, AttentionCall, Rows, RowStats, attention_call, rows_of, stats_strides
from .attention_tiles import (
    LOG2_E,
    Pieces,
    hide,
    holds_products,
    is_fused,
    keep_tile,
    key_at,
    load_pieces,
    load_rows,
    query_at,
    row_products,
    rows_apart,
    score_tile,
    signed_query,
    store_rows,
    tile_unit,
)
from .configs import FEW_QUERIES, AttentionFwdConfig, attention_fwd_config, combined_shares
from .descriptors import descriptors_of, fits_descriptor
from .launch import MAX_GRID, MULTIPLY_ADDS, arch, ceil_div, on_device
from .masks import head_of, heads_of_rows, key_blocks, masks_keys, real_keys

LN_2: tl.constexpr = tl.constexpr(math.log(2))
# Where every row's maximum begins: a number, and no larger than any other, so that the difference from a
# hidden score is -inf and never NaN. A row whose sum stays 0 has seen nothing.
LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)


class Shares(NamedTuple):
    """What the programs of a split call leave, float32: [rows, splits, D_v], and [rows, splits] twice, so
    that all of a row lies together."""

    out_ptr: Any
    max_ptr: Any
    sum_ptr: Any


@triton.jit
def _exponents(call, scores, row_max, FUSED: tl.constexpr):
    """What 2 is raised to for a tile's weights, what rescales all that went before, and the new row_max.

    FUSED tiles hold bare products, and row_max then is an exponent of 2: one multiply-add a score.
    """
    factor = tile_unit(call) * LOG2_E
    largest = tl.max(scores, 1)
    if FUSED:
        largest = tl.maximum(row_max, largest * factor)
        return scores * factor - largest[:, None], tl.exp2(row_max - largest), largest
    else:
        largest = tl.maximum(row_max, largest)
        return (scores - largest[:, None]) * factor, tl.exp2((row_max - largest) * factor), largest


@triton.jit
def _fold(call, head, exponents, rescale, acc, row_sum, offs_m, n0, threshold):
    """Fold one tile into the running softmax: (weights, acc rescaled, row_sum)."""
    p = tl.exp2(exponents)
    SUMS: tl.constexpr = row_sum.shape[1]
    row_sum = row_sum * rescale[:, None] + tl.sum(p.reshape([p.shape[0], p.shape[1] // SUMS, SUMS]), 1)
    if call.seed_ptr is not None:
        p = tl.where(keep_tile(call, head, threshold, offs_m, n0, p.shape[1]), p, 0.0)
    return p, acc * rescale[:, None], row_sum


@triton.jit
def _load_block(call, b, h, descriptor, first, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows first .. first + BLOCK - 1 of a head, [BLOCK, BLOCK_W] with zeros past the tensor's ends."""
    if call.starts_q_ptr is not None:
        b = b * 0
    return descriptor.load([b.to(tl.int32), h.to(tl.int32), first, 0]).reshape([BLOCK, BLOCK_W])


@triton.jit
def _load_queries(
    call, head, descriptors, m0, offs_m, ALIGN: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, OF_GROUP: tl.constexpr,
):  # fmt: skip
    """Queries offs_m, which but for OF_GROUP are those from m0 on, [BLOCK_M, BLOCK_D]."""
    if OF_GROUP:
        query, at = rows_apart(call.query, head, offs_m, ALIGN)
        return load_pieces(call, query, at, 0, offs_m < head.M, D, BLOCK_M, BLOCK_D, ALIGN)
    elif descriptors[0] is None:
        query = query_at(call.query, head, ALIGN)
        return load_pieces(call, call.query, query, m0, offs_m < head.M, D, BLOCK_M, BLOCK_D, ALIGN)
    else:  # rows past the last are of another sequence, or zeros
        first = head.first_query.to(tl.int32) + m0
        return Pieces(_load_block(call, head.b, head.h, descriptors[0], first, BLOCK_M, BLOCK_D), None)


@triton.jit
def _edge_blocks(
    call, head, descriptors, q, acc, row_max, row_sum, offs_m, begin, end, threshold,
    FUSED: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D_v: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Blocks of keys in which some may be hidden."""
    # What lies past a tensor's end comes as zeros; other keys that are not real must be made so.
    BY_DESCRIPTOR: tl.constexpr = (
        descriptors[0] is not None and call.lengths_ptr is None and call.starts_k_ptr is None
    )
    key, value = key_at(call.key, head, ALIGN), key_at(call.value, head, ALIGN)
    for n0 in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        real = real_keys(call, head, offs_n)
        if BY_DESCRIPTOR:
            k = Pieces(_load_block(call, head.b, head.h_kv, descriptors[1], n0, BLOCK_N, BLOCK_D), None)
        else:
            k = load_pieces(call, call.key, key, n0, real, D, BLOCK_N, BLOCK_D, ALIGN)
        products = row_products(q, k)
        scores = score_tile(call, head, products, offs_m[:, None], offs_n[None, :])
        scores = hide(call, head, scores, offs_m[:, None], offs_n[None, :], real[None, :])
        exponents, rescale, row_max = _exponents(call, scores, row_max, FUSED)
        p, acc, row_sum = _fold(call, head, exponents, rescale, acc, row_sum, offs_m, n0, threshold)
        if BY_DESCRIPTOR:
            v = _load_block(call, head.b, head.h_kv, descriptors[2], n0, BLOCK_N, BLOCK_DV)
        else:
            v = load_rows(call.value, value, n0, real, D_v, BLOCK_N, BLOCK_DV, ALIGN)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def _full_blocks(
    call, head, descriptors, q, acc, row_max, row_sum, offs_m, begin, end, threshold,
    FUSED: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D_v: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Blocks of keys that every query of the tile sees. With descriptors a block's products are issued
    before the softmax of the block before, so that tensor cores work while exponentials are computed."""
    key, value = key_at(call.key, head, ALIGN), key_at(call.value, head, ALIGN)
    if descriptors[0] is None:
        for n0 in range(begin, end, BLOCK_N):
            offs_n = n0 + tl.arange(0, BLOCK_N)
            k = load_pieces(call, call.key, key, n0, None, D, BLOCK_N, BLOCK_D, ALIGN)
            products = row_products(q, k)
            scores = score_tile(call, head, products, offs_m[:, None], offs_n[None, :])
            exponents, rescale, row_max = _exponents(call, scores, row_max, FUSED)
            p, acc, row_sum = _fold(call, head, exponents, rescale, acc, row_sum, offs_m, n0, threshold)
            v = load_rows(call.value, value, n0, None, D_v, BLOCK_N, BLOCK_DV, ALIGN)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    elif begin < end:
        first = head.first_key.to(tl.int32)
        k = _load_block(call, head.b, head.h_kv, descriptors[1], first + begin, BLOCK_N, BLOCK_D)
        products = tl.dot(q.first, tl.trans(k))
        scores = score_tile(call, head, products, offs_m[:, None], (begin + tl.arange(0, BLOCK_N))[None, :])
        exponents, rescale, row_max = _exponents(call, scores, row_max, FUSED)
        for n0 in range(begin, end - BLOCK_N, BLOCK_N):
            n1 = n0 + BLOCK_N
            k = _load_block(call, head.b, head.h_kv, descriptors[1], first + n1, BLOCK_N, BLOCK_D)
            v = _load_block(call, head.b, head.h_kv, descriptors[2], first + n0, BLOCK_N, BLOCK_DV)
            products = tl.dot(q.first, tl.trans(k))
            p, acc, row_sum = _fold(call, head, exponents, rescale, acc, row_sum, offs_m, n0, threshold)
            acc = tl.dot(p.to(v.dtype), v, acc)
            scores = score_tile(call, head, products, offs_m[:, None], (n1 + tl.arange(0, BLOCK_N))[None, :])
            exponents, rescale, row_max = _exponents(call, scores, row_max, FUSED)
        n0 = end - BLOCK_N
        v = _load_block(call, head.b, head.h_kv, descriptors[2], first + n0, BLOCK_N, BLOCK_DV)
        p, acc, row_sum = _fold(call, head, exponents, rescale, acc, row_sum, offs_m, n0, threshold)
        acc = tl.dot(p.to(v.dtype), v, acc)
    return acc, row_max, row_sum


@triton.jit
def _in_logits(row_max, row_sum, unit):
    """The largest score in logits as float32 rounds it, the factor that makes sums refer to that, and the
    row's sum times this."""
    largest = row_max * unit
    rounding = tl.fma(row_max, tl.zeros_like(row_max) + unit, -largest)
    nothing = row_sum == 0
    largest = tl.where(nothing, float("-inf"), largest)
    return largest, 1.0 + rounding, tl.where(nothing, 0.0, row_sum * (1.0 + rounding))


@triton.jit
def _finish_rows(
    call, head, h, out, stats, acc, factor, row_max, row_sum, m0, offs_m, D_v: tl.constexpr,
    OF_GROUP: tl.constexpr,
):  # fmt: skip
    """The sink joins the sum; writes out, lse and the statistics. h: each row's head; factor: of acc, so that
    it refers to row_max, in logits, as row_sum does; in a row of one key it is row_sum, and the weight 1."""
    in_rows = offs_m < head.M
    rescale = call.dropout_scale * factor
    if call.sink_ptr is not None:
        sink = tl.load(call.sink_ptr + h).to(tl.float32)
        largest = tl.maximum(row_max, sink)
        pivot = tl.where(largest == float("-inf"), 0.0, largest)
        share = tl.exp2((row_max - pivot) * LOG2_E)
        row_sum = row_sum * share + tl.exp2((sink - pivot) * LOG2_E)
        row_max = largest
        rescale = rescale * share
    nothing = row_sum == 0
    divisor = tl.where(nothing, 1.0, row_sum)
    acc = acc * tl.where(nothing, 0.0, rescale / divisor)[:, None]
    at = head.b * stats.stride_b + h * stats.stride_h + head.first_query + offs_m
    tl.store(stats.max_ptr + at, row_max, mask=in_rows)
    tl.store(stats.sum_ptr + at, row_sum, mask=in_rows)
    tl.store(stats.lse_ptr + at, tl.where(nothing, float("-inf"), row_max + tl.log(divisor)), mask=in_rows)
    if OF_GROUP:
        out, at = rows_apart(out, head, offs_m, 1)
        store_rows(out, at, 0, in_rows, acc, D_v, 1)
    else:
        store_rows(out, query_at(out, head, 1), m0, in_rows, acc, D_v, 1)


_sized = triton.jit(do_not_specialize=[*SIZES, "first_b", "tiles", "splits", "group"])


@_sized
def _attention_fwd_kernel(
    call,  # attention_call.Tensors
    out,  # Rows: [B, H, M, D_v]
    stats,  # RowStats
    query_tiles, key_tiles, value_tiles,  # descriptors or None; Triton 3.7 launches none inside a tuple
    shares,  # None or Shares: then out and stats are left to _combine_kernel
    M, N, H, H_kv, left, right, lower_right, threshold, first_b, tiles, splits, group,
    QUERY_SIGN: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D_v: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, EDGE_STAGES: tl.constexpr, OF_GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head a program, or its share of their keys; writes out, lse and statistics.

    Programs are (tile of a split, head, batch element from first_b on). With OF_GROUP a tile holds queries of
    `group` heads that read one key head, so that few queries fill it and read their keys together.
    """
    FUSED: tl.constexpr = is_fused(call)
    descriptors = (query_tiles, key_tiles, value_tiles)
    tile = tl.program_id(0)
    if shares is not None:
        tile = tile % tiles
    if right is not None:
        tile = tiles - 1 - tile  # the longest rows first, so that none is left over at the end
    b, h = first_b + tl.program_id(2), tl.program_id(1)
    m0 = tile * BLOCK_M
    if OF_GROUP:
        h *= group
        m0 = m0 // group
    head = head_of(call, b, h, M, N, H, H_kv, left, right, lower_right)
    if m0 >= head.M:
        return
    offs_m = m0 + tl.arange(0, BLOCK_M)
    h = head.h
    if OF_GROUP:  # rows of a tile are the first query of every head, then the second, and so on
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_m = row // group
        h += row % group  # [BLOCK_M]
        head = heads_of_rows(head, (row % group)[:, None])
    in_rows = offs_m < head.M
    q = _load_queries(call, head, descriptors, m0, offs_m, ALIGN, D, BLOCK_M, BLOCK_D, OF_GROUP)
    q = signed_query(q, QUERY_SIGN)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    # In narrow heads every thread adds up its own columns, and threads are added after the loops. Others have
    # no registers left for it.
    row_sum = tl.zeros([BLOCK_M, 8 if FUSED and BLOCK_DV <= 64 else 1], tl.float32)
    begin, full_begin, full_end, end = key_blocks(head, m0, BLOCK_M, BLOCK_N)
    if shares is not None:
        split = tl.program_id(0) // tiles
        share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
        begin = tl.minimum(begin + split * share, end)
        end = tl.minimum(begin + share, end)
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    if masks_keys(call):
        acc, row_max, row_sum = _edge_blocks(
            call, head, descriptors, q, acc, row_max, row_sum, offs_m, begin, end, threshold, FUSED, ALIGN,
            D, D_v, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES,
        )  # fmt: skip
    else:
        if left is not None:
            acc, row_max, row_sum = _edge_blocks(
                call, head, descriptors, q, acc, row_max, row_sum, offs_m, begin, full_begin, threshold,
                FUSED, ALIGN, D, D_v, BLOCK_N, BLOCK_D, BLOCK_DV, EDGE_STAGES,
            )  # fmt: skip
        acc, row_max, row_sum = _full_blocks(
            call, head, descriptors, q, acc, row_max, row_sum, offs_m, full_begin, full_end, threshold,
            FUSED, ALIGN, D, D_v, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        acc, row_max, row_sum = _edge_blocks(
            call, head, descriptors, q, acc, row_max, row_sum, offs_m, full_end, end, threshold,
            FUSED, ALIGN, D, D_v, BLOCK_N, BLOCK_D, BLOCK_DV, EDGE_STAGES,
        )  # fmt: skip
    row_sum = tl.sum(row_sum, 1)
    row_max, factor, row_sum = _in_logits(row_max, row_sum, LN_2 if FUSED else tile_unit(call))
    # Logits do not round again, and 16-bit results round by far more.
    ROUNDS: tl.constexpr = holds_products(call) and not FUSED
    if not ROUNDS:
        factor = 1.0
    if shares is None:
        _finish_rows(call, head, h, out, stats, acc, factor, row_max, row_sum, m0, offs_m, D_v, OF_GROUP)
    else:
        split = tl.program_id(0) // tiles
        first = head.b * stats.stride_b + h * stats.stride_h + head.first_query
        at = (first + offs_m) * splits + split
        tl.store(shares.max_ptr + at, row_max, mask=in_rows)
        tl.store(shares.sum_ptr + at, row_sum, mask=in_rows)
        if ROUNDS:
            acc *= tl.where(row_sum == 0, 1.0, factor)[:, None]
        columns = tl.arange(0, BLOCK_DV)
        pointers = shares.out_ptr + at[:, None] * D_v + columns[None, :]
        tl.store(pointers, acc, mask=in_rows[:, None] & (columns < D_v)[None, :])


@_sized
def _combine_kernel(
    call, out, stats, shares,
    M, N, H, H_kv, left, right, lower_right, threshold, first_b, splits,
    D_v: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Second stage of a split call: one query of one head a program, its shares always in one order, BLOCK_S
    of them a step, each read once."""
    b, h = first_b + tl.program_id(2), tl.program_id(1)
    head = head_of(call, b, h, M, N, H, H_kv, left, right, lower_right)
    m0 = tl.program_id(0)
    if m0 >= head.M:
        return
    first = (head.b * stats.stride_b + head.h * stats.stride_h + head.first_query + m0) * splits
    columns = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        real = offs_s < splits
        at = first + offs_s
        share_max = tl.load(shares.max_ptr + at, mask=real, other=float("-inf"))
        share_sum = tl.load(shares.sum_ptr + at, mask=real, other=0.0)
        inside = real[:, None] & (columns < D_v)[None, :]
        share = tl.load(shares.out_ptr + at[:, None] * D_v + columns[None, :], mask=inside, other=0.0)
        largest = tl.maximum(row_max, tl.max(share_max, 0))
        pivot = tl.where(largest == float("-inf"), 0.0, largest)
        rescale = tl.exp2((row_max - pivot) * LOG2_E)
        weight = tl.exp2((share_max - pivot) * LOG2_E)
        row_sum = row_sum * rescale + tl.sum(share_sum * weight, 0)
        acc = acc * rescale[:, None] + tl.sum(share * weight[:, None], 0)[None, :]
        row_max = largest
    offs_m = m0 + tl.arange(0, 1)
    _finish_rows(call, head, head.h, out, stats, acc, 1.0, row_max, row_sum, m0, offs_m, D_v, False)


def attention_fwd(
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out = dropout(softmax(score)) value, and of each row what backward needs.

    Args:
        arguments: Those of `attention_call`: query [B, H, M, D], key [B, H_kv, N, D] and value
            [B, H_kv, N, D_v] of one dtype (float32, bfloat16, float16), D and D_v at most 256, and all that
            docs/contract.md lets join them.

    Returns:
        out [B, H, M, D_v], contiguous, in query's dtype. Float32 [B, H, M]: lse, the largest score and the
        sum of exp(score - largest), the sink included; -inf, -inf and 0 where nothing is visible. Packed, out
        is [total, H, D_v] and the rest [H, total].
    """
    query, value = arguments[0], arguments[2]
    call = attention_call(*arguments)
    out = query.new_empty((*query.shape[:-1], call.D_v))
    rows = (query.shape[1], query.shape[0]) if call.packed else query.shape[:-1]
    lse, row_max, row_sum = (query.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if lse.numel() == 0 or value.shape[-1] == 0:
        return out, lse, row_max, row_sum
    stats = RowStats(lse, row_max, row_sum, *stats_strides(lse))
    with on_device(query):
        _launch(call, rows_of(out), stats, arch(query.device))
    return out, lse, row_max, row_sum


def fwd_config(call: AttentionCall, target: str) -> AttentionFwdConfig:
    kind = call.kind
    if call.dtype.itemsize == 4 and (call.D, call.D_v) != (call.flags["BLOCK_D"], call.flags["BLOCK_DV"]):
        kind = "more"
    of_target, of_call = (target, call.dtype.itemsize, call.widest), (call.sides, call.M)
    config = attention_fwd_config(*of_target, kind, *of_call)
    if config.ahead and not all(fits_descriptor(rows) for rows in call.tensors[:3]):
        config = attention_fwd_config(*of_target, "light", *of_call)
    return config


def _launch(call: AttentionCall, out: Rows, stats: RowStats, target: str) -> None:
    config = fwd_config(call, target)
    # With few queries the heads that read one key head, which all see the same keys, share tiles.
    of_group, group = call.M <= FEW_QUERIES, 1
    key_mask = call.tensors.key_mask
    if of_group and (key_mask is None or key_mask.stride_h == 0):
        group = call.H // call.H_kv
    tiles, heads = ceil_div(call.M * group, config.block_m), call.H // group
    programs = call.B * heads * tiles
    splits = config.splits(programs, _visible_keys(call))
    shares = None
    if splits > 1:
        total = stats.lse_ptr.numel()
        new = stats.lse_ptr.new_empty
        shares = Shares(new(total, splits, call.D_v), new(total, splits), new(total, splits))
    blocks = descriptors_of(call, config.block_m, config.block_n) if config.ahead else (None, None, None)
    for first_b in range(0, call.B, MAX_GRID):
        batch = min(call.B - first_b, MAX_GRID)
        _attention_fwd_kernel[(tiles * splits, heads, batch)](
            call.tensors, out, stats, *blocks, shares, *call.sizes, first_b, tiles, splits, group,
            **call.flags, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages,
            EDGE_STAGES=config.edge_stages, OF_GROUP=of_group, num_warps=config.num_warps,
            num_stages=config.num_stages, **MULTIPLY_ADDS,
        )  # fmt: skip
        if shares is not None:
            width = call.flags["BLOCK_DV"]
            _combine_kernel[(call.M, call.H, batch)](
                call.tensors, out, stats, shares, *call.sizes, first_b, splits,
                D_v=call.D_v, BLOCK_DV=width, BLOCK_S=combined_shares(width), num_warps=1, **MULTIPLY_ADDS,
            )  # fmt: skip


def _visible_keys(call: AttentionCall) -> int:
    """How many keys a query may see at most, masks and lengths apart."""
    left, right = call.sizes[4:6]
    return call.N if left is None or right is None else min(call.N, call.M + left + right)
