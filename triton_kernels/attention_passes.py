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
    add_products,
    chain,
    hide,
    keep_tile,
    key_at,
    load_pieces,
    load_rows,
    query_at,
    score_tile_and_slope,
    signed_query,
    weights,
)
from .masks import real_keys

# Bits of a row that registers hold at a time where its products serve one tile alone: whole rows spill, and
# twice as many of float32 up to 180 bytes.
MOST_BITS: tl.constexpr = tl.constexpr(1024)


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
    query: Any  # Pieces of [BLOCK_M, BLOCK_D], signed
    grad_out: Any  # None or [BLOCK_M, BLOCK_DV]
    terms: Any  # RowTerms


class Keys(NamedTuple):
    """BLOCK_N keys of a head."""

    n0: Any
    n: Any  # their numbers, along the tile's dimension
    real: Any  # bool, likewise; see masks.real_keys
    key: Any  # Pieces of [BLOCK_N, BLOCK_D]
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
def _terms_of(scores, head, offs_m, in_rows, TRANSPOSED: tl.constexpr):
    """The RowTerms of rows offs_m; weights of 0 and no gradient where in_rows, bool or None, is False."""
    at = stats_at(scores, head, offs_m)
    return RowTerms(
        _load_terms(scores.shift_ptr, at, in_rows, float("inf"), TRANSPOSED),
        _load_terms(scores.factor_ptr, at, in_rows, 0.0, TRANSPOSED),
        _load_terms(scores.delta_ptr, at, in_rows, 0.0, TRANSPOSED),
        _load_terms(scores.gain_ptr, at, in_rows, 0.0, TRANSPOSED),
        _load_terms(scores.grad_lse_ptr, at, in_rows, 0.0, TRANSPOSED),
    )


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
    q = load_pieces(
        call, call.query, query_at(call.query, head, ALIGN), m0, in_rows, D, BLOCK_M, BLOCK_D, ALIGN
    )
    from_row = query_at(scores.grad_out, head, ALIGN)
    grad_out = load_rows(scores.grad_out, from_row, m0, in_rows, D_v, BLOCK_M, BLOCK_DV, ALIGN)
    terms = _terms_of(scores, head, offs_m, in_rows, TRANSPOSED)
    return Queries(m0, along(offs_m, 0, TRANSPOSED), signed_query(q, QUERY_SIGN), grad_out, terms)


@triton.jit
def load_keys(
    call, head, n0, EDGE: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D_v: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Keys that no query sees come as zeros, whatever they hold; without EDGE there are none."""
    offs_n = n0 + tl.arange(0, BLOCK_N)
    real = None
    if EDGE:
        real = real_keys(call, head, offs_n)
    k = load_pieces(call, call.key, key_at(call.key, head, ALIGN), n0, real, D, BLOCK_N, BLOCK_D, ALIGN)
    v = load_rows(call.value, key_at(call.value, head, ALIGN), n0, real, D_v, BLOCK_N, BLOCK_DV, ALIGN)
    return Keys(n0, along(offs_n, 1, False), along(real, 1, False), k, v)


@triton.jit
def _products_by_columns(
    queries, query, m0, in_rows, keys, key, n0, real, CHAIN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Products [BLOCK_M, BLOCK_N] of rows of which registers hold few columns at a time. The rows begin at
    elements `query` of queries and `key` of keys; CHAIN columns are a chain, the last of which come first, as
    row_products adds them up."""
    LAST: tl.constexpr = (WIDTH - 1) // CHAIN * CHAIN if WIDTH > CHAIN else 0
    products = _chain_by_columns(
        queries, query + LAST, m0, in_rows, keys, key + LAST, n0, real, WIDTH - LAST, BLOCK_W, BLOCK_M,
        BLOCK_N, ALIGN,
    )  # fmt: skip
    for after in range(0, LAST, CHAIN):
        at = LAST - CHAIN - after
        of_chain = _chain_by_columns(
            queries, query + at, m0, in_rows, keys, key + at, n0, real, CHAIN, BLOCK_W, BLOCK_M, BLOCK_N,
            ALIGN,
        )  # fmt: skip
        products = add_products(of_chain, products)
    return products


@triton.jit
def _chain_by_columns(
    queries, query, m0, in_rows, keys, key, n0, real, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Of WIDTH columns, in one chain."""
    BITS: tl.constexpr = queries.ptr.dtype.element_ty.primitive_bitwidth
    # ptxas keeps the loop over two pieces of 128 columns; that over four of 64 it unrolls, and spills up to
    # 32 bytes.
    MOST: tl.constexpr = 128 if BITS == 16 and BLOCK_W > 128 else MOST_BITS // BITS
    COLUMNS: tl.constexpr = BLOCK_W if BLOCK_W < MOST else MOST
    WHOLE: tl.constexpr = WIDTH // COLUMNS * COLUMNS
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for column in range(0, WHOLE, COLUMNS):
        q = load_rows(queries, query + column, m0, in_rows, COLUMNS, BLOCK_M, COLUMNS, ALIGN)
        k = load_rows(keys, key + column, n0, real, COLUMNS, BLOCK_N, COLUMNS, ALIGN)
        products = tl.dot(q, tl.trans(k), products, input_precision="ieee")
    if WIDTH > WHOLE:
        q = load_rows(queries, query + WHOLE, m0, in_rows, WIDTH - WHOLE, BLOCK_M, COLUMNS, ALIGN)
        k = load_rows(keys, key + WHOLE, n0, real, WIDTH - WHOLE, BLOCK_N, COLUMNS, ALIGN)
        products = tl.dot(q, tl.trans(k), products, input_precision="ieee")
    return products


@triton.jit
def tile_by_itself(
    call, scores, head, m0, n0, threshold, QUERY_SIGN: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr,
    D_v: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a tile whose queries and keys serve no other: its RowTerms, weights before dropout, and the weights'
    gradient; where no grad_out is given, the weights after dropout in place of both."""
    offs_m, offs_n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    in_rows, real = offs_m < head.M, real_keys(call, head, offs_n)
    queries = Queries(m0, offs_m[:, None], None, None, _terms_of(scores, head, offs_m, in_rows, False))
    keys = Keys(n0, offs_n[None, :], real[None, :], None, None)
    products = _products_by_columns(
        call.query, query_at(call.query, head, ALIGN), m0, in_rows, call.key, key_at(call.key, head, ALIGN),
        n0, real, chain(call, BLOCK_D), D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN,
    )  # fmt: skip
    w, _ = weight_tile(call, head, products * QUERY_SIGN, queries, keys, True)
    if scores.grad_out is None:
        kept = dropped(call, w, keep_of(call, head, queries, keys, threshold, BLOCK_M, BLOCK_N, False))
        return queries.terms, kept, kept
    else:
        dw = _products_by_columns(
            scores.grad_out, query_at(scores.grad_out, head, ALIGN), m0, in_rows, call.value,
            key_at(call.value, head, ALIGN), n0, real, D_v, D_v, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN,
        )  # fmt: skip
        keep = keep_of(call, head, queries, keys, threshold, BLOCK_M, BLOCK_N, False)
        return queries.terms, w, weights_gradient(call, scores, head, dw, queries, keys, keep)


@triton.jit
def weight_tile(call, head, products, queries, keys, EDGE: tl.constexpr):
    """The weights before dropout, and softcap's slope (1.0 without one)."""
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
def weights_gradient(call, scores, head, dw, queries, keys, keep):
    """The gradient of the weights before dropout; dw: products of grad_out and values."""
    if scores.grad_weights is not None:
        given = scores.grad_weights
        at = head.b * given.stride_b + head.h * given.stride_h
        offsets = queries.m.to(tl.int64) * given.stride_m + keys.n.to(tl.int64) * given.stride_n
        inside = (queries.m < head.M) & (keys.n < head.N)
        grads = tl.load(given.ptr + at + offsets, mask=inside, other=0.0).to(tl.float32)
        dw += grads * scores.grad_weights_scale
    return dropped(call, dw, keep)


@triton.jit
def over_delta(call, scores, head, queries, keys, keep, TRANSPOSED: tl.constexpr):
    """The gradient of the weights less delta."""
    if TRANSPOSED or call.seed_ptr is not None or scores.grad_weights is not None:
        if TRANSPOSED:
            dw = tl.dot(keys.value, tl.trans(queries.grad_out), input_precision="ieee")
        else:
            dw = tl.dot(queries.grad_out, tl.trans(keys.value), input_precision="ieee")
        return weights_gradient(call, scores, head, dw, queries, keys, keep) - queries.terms.delta
    else:  # Products that start from -delta save a subtraction; in the other orientation ptxas spills for it.
        start = tl.broadcast_to(-queries.terms.delta, [queries.m.shape[0], keys.n.shape[1]])
        return tl.dot(queries.grad_out, tl.trans(keys.value), start, input_precision="ieee")


@triton.jit
def gradient_tile(terms, weights, over, slope, EDGE: tl.constexpr):
    """The gradient of the logits, times slope: softcap's for that of the scaled products, else 1.0. over: the
    gradient of the weights less delta."""
    if EDGE:
        over *= terms.gain
    if terms.grad_lse is not None:
        over += terms.grad_lse
    grads = weights * over * slope
    if EDGE:
        grads = tl.where(weights == 0, 0.0, grads)  # whatever the others hold where a key is hidden
    return grads
