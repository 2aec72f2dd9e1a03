"""Attention backward, over the tiles of attention_passes.py.

    dv_j = sum_i w_ij grad_out_i     dk_j = scale sum_i ds_ij q_i     dq_i = scale sum_j ds_ij k_j

One kernel holds a block of keys and runs over the queries (dK, dV), another holds queries and runs over keys
(dQ): seven products where one kernel would do with five, but no two programs add to one address.

(Dao, "FlashAttention-2", 2023; delta is its D.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .attention_call import (
    SIZES,
    AttentionCall,
    Rows,
    attention_call,
    rows_of,
    scores_of,
    with_contiguous_rows,
)
from .attention_passes import (
    Keys,
    ScorePass,
    along,
    dropped,
    gradient_tile,
    keep_of,
    load_keys,
    load_queries,
    over_delta,
    weight_tile,
)
from .attention_rows import gradient_pass
from .attention_sums import sum_bias, sum_relative_bias
from .attention_tiles import (
    add_rows,
    holds_products,
    key_at,
    load_pieces,
    load_rows,
    query_at,
    row_products,
    scaled_pieces,
    store_pieces,
    store_rows,
    zero_pieces,
)
from .configs import AttentionBwdConfig, attention_bwd_config
from .launch import MAX_GRID, MULTIPLY_ADDS, arch, ceil_div, on_device
from .masks import (
    Blocks,
    block_count,
    block_start,
    group_of,
    head_of,
    key_blocks,
    masks_keys,
    member_of,
    query_blocks,
    real_keys,
)

# bias, relative_bias and sink, None where the gradient is not needed.
Wanted = list[torch.Tensor | None]

_sized = triton.jit(do_not_specialize=[*SIZES, "first_b"])


@triton.jit
def _add_value_gradients(call, w, keep, grad_out, dv):
    kept = dropped(call, w, keep).to(grad_out.dtype)  # [BLOCK_N, BLOCK_M]
    return tl.dot(kept, grad_out, dv, input_precision="ieee")


@triton.jit
def _add_key_gradients(
    call, scores, first, k, v, n0, blocks, dk, dv, threshold, EDGE: tl.constexpr,
    QUERY_SIGN: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D_v: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """What the full blocks of a group's queries, or the others, add to the gradients of keys n0 on."""
    # In float32 calls that are not plain dv comes last: else queries come from shared memory number by
    # number, at up to 255 registers, and spill 8 to 264 bytes. In plain calls that would take 2 KB more.
    IS_FLOAT32: tl.constexpr = k.first.dtype.primitive_bitwidth == 32
    DV_LAST: tl.constexpr = IS_FLOAT32 and (call.seed_ptr is not None or not holds_products(call))
    offs_n = n0 + tl.arange(0, BLOCK_N)
    for index in range(block_count(blocks, EDGE, BLOCK_M) * GROUP):
        m0 = block_start(blocks, index // GROUP, EDGE, BLOCK_M)
        head = member_of(first, index % GROUP)
        real = None
        if EDGE:
            real = real_keys(call, head, offs_n)
        keys = Keys(n0, along(offs_n, 1, True), along(real, 1, True), k, v)
        queries = load_queries(
            call, scores, head, m0, EDGE, QUERY_SIGN, ALIGN, D, D_v, BLOCK_D, BLOCK_DV, BLOCK_M, True
        )
        products = row_products(k, queries.query)
        w, slope = weight_tile(call, head, products, queries, keys, EDGE)
        keep = keep_of(call, head, queries, keys, threshold, BLOCK_M, BLOCK_N, True)
        if not DV_LAST:
            dv = _add_value_gradients(call, w, keep, queries.grad_out, dv)
        over = over_delta(call, scores, head, queries, keys, keep, True)
        ds = gradient_tile(queries.terms, w, over, slope, EDGE)
        dk = add_rows(dk, ds.to(k.first.dtype), queries.query)
        if DV_LAST:
            dv = _add_value_gradients(call, w, keep, queries.grad_out, dv)
    return dk, dv


@_sized
def _key_gradients_kernel(
    call, scores, grad_key, grad_value,
    M, N, H, H_kv, left, right, lower_right, threshold, first_b,
    QUERY_SIGN: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D_v: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one key head a program, from the query heads that read them."""
    n0 = tl.program_id(0) * BLOCK_N
    b, h_kv = first_b + tl.program_id(2), tl.program_id(1)
    head = group_of(call, b, h_kv, M, N, H, left, right, lower_right, GROUP)
    in_keys = n0 + tl.arange(0, BLOCK_N) < head.N
    k = load_pieces(call, call.key, key_at(call.key, head, ALIGN), n0, in_keys, D, BLOCK_N, BLOCK_D, ALIGN)
    v = load_rows(call.value, key_at(call.value, head, ALIGN), n0, in_keys, D_v, BLOCK_N, BLOCK_DV, ALIGN)
    dk = zero_pieces(k)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    blocks = query_blocks(head, n0, BLOCK_M, BLOCK_N)
    if masks_keys(call):
        blocks = Blocks(blocks.begin, blocks.begin, blocks.begin, blocks.end)
    dk, dv = _add_key_gradients(
        call, scores, head, k, v, n0, blocks, dk, dv, threshold, True,
        QUERY_SIGN, ALIGN, D, D_v, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, GROUP,
    )  # fmt: skip
    if not masks_keys(call):
        dk, dv = _add_key_gradients(
            call, scores, head, k, v, n0, blocks, dk, dv, threshold, False,
            QUERY_SIGN, ALIGN, D, D_v, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, GROUP,
        )  # fmt: skip
    dk = scaled_pieces(dk, call.scale)
    store_pieces(grad_key, key_at(grad_key, head, ALIGN), n0, in_keys, dk, D, ALIGN)
    store_rows(grad_value, key_at(grad_value, head, ALIGN), n0, in_keys, dv, D_v, ALIGN)


@triton.jit
def _add_query_gradients(
    call, scores, head, queries, grad_bias, blocks, dq, threshold, EDGE: tl.constexpr,
    ALIGN: tl.constexpr, D: tl.constexpr, D_v: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the full blocks of keys, or the others, add to the gradient of `queries`; writes the gradient
    of their bias."""
    for index in range(block_count(blocks, EDGE, BLOCK_N)):
        n0 = block_start(blocks, index, EDGE, BLOCK_N)
        keys = load_keys(call, head, n0, EDGE, ALIGN, D, D_v, BLOCK_N, BLOCK_D, BLOCK_DV)
        products = row_products(queries.query, keys.key)
        w, slope = weight_tile(call, head, products, queries, keys, EDGE)
        keep = keep_of(call, head, queries, keys, threshold, BLOCK_M, BLOCK_N, False)
        over = over_delta(call, scores, head, queries, keys, keep, False)
        ds = gradient_tile(queries.terms, w, over, 1.0, EDGE)
        if grad_bias is not None:
            at = head.b * grad_bias.stride_b + head.h * grad_bias.stride_h
            offsets = queries.m.to(tl.int64) * grad_bias.stride_m
            offsets += keys.n.to(tl.int64) * grad_bias.stride_n
            inside = (queries.m < head.M) & (keys.n < head.N)
            tl.store(grad_bias.ptr + at + offsets, ds.to(grad_bias.ptr.dtype.element_ty), mask=inside)
        dq = add_rows(dq, (ds * slope).to(keys.key.first.dtype), keys.key)
    return dq


@_sized
def _query_gradients_kernel(
    call, scores, grad_query,
    grad_bias,  # None, or Scores of a bias that is broadcast over nothing, zeroed
    M, N, H, H_kv, left, right, lower_right, threshold, first_b,
    QUERY_SIGN: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D_v: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head a program."""
    tile = tl.program_id(0)
    if right is not None:
        tile = tl.num_programs(0) - 1 - tile  # the longest rows first, so that none is left over at the end
    b, h = first_b + tl.program_id(2), tl.program_id(1)
    head = head_of(call, b, h, M, N, H, H_kv, left, right, lower_right)
    m0 = tile * BLOCK_M
    if m0 >= head.M:
        return
    queries = load_queries(
        call, scores, head, m0, True, QUERY_SIGN, ALIGN, D, D_v, BLOCK_D, BLOCK_DV, BLOCK_M, False
    )
    dq = zero_pieces(queries.query)
    blocks = key_blocks(head, m0, BLOCK_M, BLOCK_N)
    if masks_keys(call):
        blocks = Blocks(blocks.begin, blocks.begin, blocks.begin, blocks.end)
    dq = _add_query_gradients(
        call, scores, head, queries, grad_bias, blocks, dq, threshold, True,
        ALIGN, D, D_v, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if not masks_keys(call):
        dq = _add_query_gradients(
            call, scores, head, queries, grad_bias, blocks, dq, threshold, False,
            ALIGN, D, D_v, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    dq = scaled_pieces(dq, call.scale * QUERY_SIGN)
    at, in_rows = query_at(grad_query, head, ALIGN), m0 + tl.arange(0, BLOCK_M) < head.M
    store_pieces(grad_query, at, m0, in_rows, dq, D, ALIGN)


def attention_bwd(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_weights: torch.Tensor | None,
    out: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    *arguments: Any,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key, value, bias, relative_bias and sink.

    Args:
        grad_out, grad_lse, grad_weights: Like what they are gradients of; None for zeros.
        out, row_max, row_sum: As attention_fwd gave them.
        arguments: Those of `attention_call`, and whether the gradients of bias, relative_bias and sink are
            needed.

    Returns:
        Gradients in the dtypes of their tensors, those of relative_bias and sink float32; the last three
        are empty [0] where they are not needed.
    """
    *arguments, need_bias, need_relative_bias, need_sink = arguments  # type: ignore[assignment]
    query, key, value = arguments[:3]
    bias = arguments[6]
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    call = attention_call(*arguments)
    wanted = [
        tensor if need else None
        for tensor, need in zip(arguments[6:9], (need_bias, need_relative_bias, need_sink), strict=True)
    ]
    if query.numel() == 0:
        return (
            *(grad.zero_() for grad in grads),
            _zeros(query, wanted[0], None if bias is None else bias.dtype),
            *(_zeros(row_max, tensor) for tensor in wanted[1:]),
        )
    grad_out = torch.zeros_like(out) if grad_out is None else with_contiguous_rows(grad_out)
    out_rows, *gradient_rows = (rows_of(t) for t in (with_contiguous_rows(out), grad_out, *grads))
    flags = flags_with(call, out_rows, *gradient_rows)
    bias, relative_bias, sink = wanted
    with on_device(query):
        scores, grad_column, grad_sink = gradient_pass(
            call, row_max, row_sum, out_rows, gradient_rows[0], grad_lse, grad_weights,
            bias if _is_column(bias) else None, sink, flags,
        )  # fmt: skip
        grad_bias = _matrix_gradients(call, scores, gradient_rows[1:], bias, flags)
        grad_relative = _relative_bias_gradient(call, scores, relative_bias, flags)
    return *grads, grad_column if grad_bias is None else grad_bias, grad_relative, grad_sink


def flags_with(call: AttentionCall, *rows: Rows) -> dict[str, Any]:
    """The call's flags, for kernels that read or write these rows too."""
    strides = (stride for each in rows for stride in each[1:4])
    return call.flags | {"ALIGN": math.gcd(call.flags["ALIGN"], *strides)}


def _zeros(like: torch.Tensor, tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor:
    return like.new_zeros(0 if tensor is None else tensor.shape, dtype=dtype)


def _is_column(bias: torch.Tensor | None) -> bool:
    return bias is not None and bias.shape[3] == 1


def _matrix_gradients(
    call: AttentionCall,
    scores: ScorePass,
    grads: list[Rows],
    bias: torch.Tensor | None,
    flags: dict[str, Any],
) -> torch.Tensor | None:
    """Fills the gradients of query, key and value; returns that of a bias of more than one column."""
    keys, queries = bwd_configs(call, arch(call.tensors.query.ptr.device))
    whole, grad_bias = None, None
    if bias is not None and not _is_column(bias):
        if bias.shape == (call.B, call.H, call.M, call.N):
            grad_bias = torch.zeros_like(bias, memory_format=torch.contiguous_format)
            whole = scores_of(grad_bias)
        else:
            grad_bias = sum_bias(call, scores, bias, flags)
    key_tiles, query_tiles = ceil_div(call.N, keys.block_n), ceil_div(call.M, queries.block_m)
    for first_b in range(0, call.B, MAX_GRID):
        batch = min(call.B - first_b, MAX_GRID)
        if key_tiles > 0:
            _key_gradients_kernel[(key_tiles, call.H_kv, batch)](
                call.tensors, scores, grads[1], grads[2], *call.sizes, first_b,
                **flags, BLOCK_M=keys.block_m, BLOCK_N=keys.block_n, GROUP=call.H // call.H_kv,
                num_warps=keys.num_warps, num_stages=keys.num_stages, **MULTIPLY_ADDS,
            )  # fmt: skip
        _query_gradients_kernel[(query_tiles, call.H, batch)](
            call.tensors, scores, grads[0], whole, *call.sizes, first_b,
            **flags, BLOCK_M=queries.block_m, BLOCK_N=queries.block_n,
            num_warps=queries.num_warps, num_stages=queries.num_stages, **MULTIPLY_ADDS,
        )  # fmt: skip
    return grad_bias


def _relative_bias_gradient(
    call: AttentionCall, scores: ScorePass, relative_bias: torch.Tensor | None, flags: dict[str, Any]
) -> torch.Tensor:
    if relative_bias is None or call.N == 0:
        return _zeros(scores.delta_ptr, relative_bias)
    return sum_relative_bias(call, scores, relative_bias.shape[0], flags)


def bwd_configs(call: AttentionCall, target: str) -> tuple[AttentionBwdConfig, AttentionBwdConfig]:
    """For the gradients of keys, and for those of queries."""
    return attention_bwd_config(
        target, call.dtype.itemsize, call.widest, call.kind == "plain", call.is_irregular
    )
