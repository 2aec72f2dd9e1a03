"""Weights and gradients of scores computed anew, tile by tile, from what forward left of each row.

    w_ij = exp(s_ij - row_max_i) / row_sum_i
    ds_ij = w_ij (keep_ij (grad_out_i . v_j + grad_weights_ij) / (1 - p) - delta_i + grad_lse_i)

Every pass after forward runs over these tiles: dK and dV, dQ, the returned weights, and the sums of a
broadcast bias and of a relative bias.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_tiles import (
    hide,
    keep_tile,
    key_at,
    load_rows,
    query_at,
    score_tile_and_slope,
    signed_query,
    weights,
)
from .masks import real_keys


class ScorePass(NamedTuple):
    """What a pass reads beside the call itself; float32 [B, H, M] (packed [H, total]) where not said."""

    shift_ptr: Any  # see attention_tiles.row_pivots
    factor_ptr: Any
    delta_ptr: Any  # sum_j w_ij dw_ij; None where only weights are wanted
    gain_ptr: Any  # see RowTerms; the delta of such a row is 0
    grad_lse_ptr: Any  # or None
    stride_b: Any
    stride_h: Any
    grad_out: Any  # Rows, or None where only weights are wanted
    grad_weights: Any  # None or Scores
    grad_weights_scale: Any


# A tile is [BLOCK_M, BLOCK_N] or, in the pass that holds keys and runs over queries, transposed: then weights
# lie in registers as the products with them want them. What belongs to queries alone or to keys alone lies
# along the tile's dimension, [BLOCK_M, 1] and [1, BLOCK_N] or transposed, so that one code serves both.


class RowTerms(NamedTuple):
    """What `weights` and `gradient_tile` take off and multiply with, along the dimension of queries."""

    shift: Any
    factor: Any
    delta: Any
    gain: Any  # 0 in a row that sees one key alone, whose weight is 1 whatever its score; else 1
    grad_lse: Any


class Queries(NamedTuple):
    """BLOCK_M queries of a head."""

    m0: Any
    m: Any  # their numbers, along the tile's dimension
    query: Any  # [BLOCK_M, BLOCK_D], signed
    grad_out: Any  # None or [BLOCK_M, BLOCK_DV]
    terms: Any  # RowTerms


class Keys(NamedTuple):
    """BLOCK_N keys of a head."""

    n0: Any
    n: Any  # their numbers, along the tile's dimension
    real: Any  # bool, likewise; see masks.real_keys
    key: Any  # [BLOCK_N, BLOCK_D]
    value: Any  # None or [BLOCK_N, BLOCK_DV]


@triton.jit
def along(values, dim: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[BLOCK] to the tile's dimension `dim` (0: queries, 1: keys); None stays None."""
    if values is None:
        return None
    elif (dim == 0) != TRANSPOSED:
        return values[:, None]
    else:
        return values[None, :]


@triton.jit
def stats_at(scores, head, offs_m):
    """Where rows offs_m of the head lie in row statistics."""
    return head.b * scores.stride_b + head.h * scores.stride_h + head.first_query + offs_m


@triton.jit
def _load_terms(ptr, at, in_rows, other, TRANSPOSED: tl.constexpr):
    if ptr is None:
        return None
    elif in_rows is None:
        return along(tl.load(ptr + at), 0, TRANSPOSED)
    else:
        return along(tl.load(ptr + at, mask=in_rows, other=other), 0, TRANSPOSED)


@triton.jit
def load_queries(
    call, scores, head, m0, EDGE: tl.constexpr, QUERY_SIGN: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Rows past the last come as zeros, with weights of 0 and no gradient; without EDGE there are none."""
    offs_m = m0 + tl.arange(0, BLOCK_M)
    in_rows = None
    if EDGE:
        in_rows = offs_m < head.M
    q = load_rows(call.query, query_at(call.query, head, ALIGN), m0, in_rows, D, BLOCK_M, BLOCK_D, ALIGN)
    grad_out = None
    if scores.grad_out is not None:
        from_row = query_at(scores.grad_out, head, ALIGN)
        grad_out = load_rows(scores.grad_out, from_row, m0, in_rows, D_v, BLOCK_M, BLOCK_DV, ALIGN)
    at = stats_at(scores, head, offs_m)
    terms = RowTerms(
        _load_terms(scores.shift_ptr, at, in_rows, float("inf"), TRANSPOSED),
        _load_terms(scores.factor_ptr, at, in_rows, 0.0, TRANSPOSED),
        _load_terms(scores.delta_ptr, at, in_rows, 0.0, TRANSPOSED),
        _load_terms(scores.gain_ptr, at, in_rows, 0.0, TRANSPOSED),
        _load_terms(scores.grad_lse_ptr, at, in_rows, 0.0, TRANSPOSED),
    )
    return Queries(m0, along(offs_m, 0, TRANSPOSED), signed_query(q, QUERY_SIGN), grad_out, terms)


@triton.jit
def load_keys(
    call, scores, head, n0, EDGE: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D_v: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Keys that no query sees come as zeros, whatever they hold; without EDGE there are none."""
    offs_n = n0 + tl.arange(0, BLOCK_N)
    real = None
    if EDGE:
        real = real_keys(call, head, offs_n)
    k = load_rows(call.key, key_at(call.key, head, ALIGN), n0, real, D, BLOCK_N, BLOCK_D, ALIGN)
    v = None
    if scores.grad_out is not None:
        from_value = key_at(call.value, head, ALIGN)
        v = load_rows(call.value, from_value, n0, real, D_v, BLOCK_N, BLOCK_DV, ALIGN)
    return Keys(n0, along(offs_n, 1, TRANSPOSED), along(real, 1, TRANSPOSED), k, v)


@triton.jit
def _products(of_queries, of_keys, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        return tl.dot(of_keys, tl.trans(of_queries), input_precision="ieee")
    else:
        return tl.dot(of_queries, tl.trans(of_keys), input_precision="ieee")


@triton.jit
def weight_tile(call, head, queries, keys, EDGE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The weights before dropout, and softcap's slope (1.0 without one)."""
    products = _products(queries.query, keys.key, TRANSPOSED)
    scores, slope = score_tile_and_slope(call, head, products, queries.m, keys.n)
    if EDGE:
        scores = hide(call, head, scores, queries.m, keys.n, keys.real)
    return weights(call, scores, queries.terms.shift, queries.terms.factor), slope


@triton.jit
def keep_of(
    call, head, queries, keys, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which weights of a tile dropout keeps; None without dropout."""
    if call.seed_ptr is None:
        return None
    else:
        keep = keep_tile(call, head, threshold, queries.m0 + tl.arange(0, BLOCK_M), keys.n0, BLOCK_N)
        if TRANSPOSED:
            keep = tl.trans(keep)
        return keep


@triton.jit
def dropped(call, values, keep):
    """What dropout leaves of weights, or of their gradients."""
    if call.seed_ptr is None:
        return values
    else:
        return tl.where(keep, values * call.dropout_scale, 0.0)


@triton.jit
def weights_gradient(call, scores, head, queries, keys, keep, TRANSPOSED: tl.constexpr):
    """The gradient of the weights before dropout."""
    dw = _products(queries.grad_out, keys.value, TRANSPOSED)
    if scores.grad_weights is not None:
        given = scores.grad_weights
        at = head.b * given.stride_b + head.h * given.stride_h
        offsets = queries.m.to(tl.int64) * given.stride_m + keys.n.to(tl.int64) * given.stride_n
        inside = (queries.m < head.M) & (keys.n < head.N)
        grads = tl.load(given.ptr + at + offsets, mask=inside, other=0.0).to(tl.float32)
        dw += grads * scores.grad_weights_scale
    return dropped(call, dw, keep)


@triton.jit
def gradient_tile(
    call, scores, head, queries, keys, weights, keep, EDGE: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """The gradient of the logits before softcap's slope joins it."""
    dw = weights_gradient(call, scores, head, queries, keys, keep, TRANSPOSED)
    if EDGE:
        below = dw * queries.terms.gain - queries.terms.delta
    else:
        below = dw - queries.terms.delta
    if queries.terms.grad_lse is not None:
        below += queries.terms.grad_lse
    grads = weights * below
    if EDGE:
        grads = tl.where(weights == 0, 0.0, grads)  # whatever dw holds where a key is hidden
    return grads
