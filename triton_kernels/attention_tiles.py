"""Tiles of scores, [BLOCK_M, BLOCK_N]: from products to logits, and what weights and gradients come of them.

Where nothing but the scale lies between a product q·k and its logit, tiles hold bare products, each of which
counts `call.scale` logits, and the scale is part of the exponential's base; elsewhere they hold logits.
Either way `unit` says what an element counts, and hidden keys hold -inf. Every pass over the scores, in
either orientation, uses the same functions, so that all of them see the same numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_call import LOG2_E as _LOG2_E
from .attention_call import Rows
from .masks import visible
from .philox import matrix_keep
from .tiles import aligned

LOG2_E: tl.constexpr = tl.constexpr(_LOG2_E)
CHAIN: tl.constexpr = tl.constexpr(64)


@triton.jit
def _row_pointers(rows, at, start, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr, ALIGN: tl.constexpr):
    stride = aligned(rows.stride_m, ALIGN)
    rows_of_tile = tl.arange(0, BLOCK)
    if rows.far is not None:
        rows_of_tile = rows_of_tile.to(tl.int64)
    # What varies in a loop over `start` is one number, and the rest is 32-bit: an address is one addition.
    tile = rows_of_tile[:, None] * stride + tl.arange(0, BLOCK_W)[None, :]
    return rows.ptr + (at + tl.cast(start, tl.int64) * stride) + tile


@triton.jit
def load_rows(
    rows,
    at,
    start,
    real,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Rows start .. start + BLOCK - 1 of those that begin at element `at`, [BLOCK, BLOCK_W].

    Zeros past WIDTH, and where `real`, bool [BLOCK] or None, is False."""
    pointers = _row_pointers(rows, at, start, BLOCK, BLOCK_W, ALIGN)
    in_row = tl.arange(0, BLOCK_W) < WIDTH
    if real is None and WIDTH == BLOCK_W:
        return tl.load(pointers)
    elif real is None:
        return tl.load(pointers, mask=in_row[None, :], other=0.0)
    elif WIDTH == BLOCK_W:
        return tl.load(pointers, mask=real[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=real[:, None] & in_row[None, :], other=0.0)


@triton.jit
def store_rows(rows, at, start, real, values, WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    """Round a float32 tile [BLOCK, BLOCK_W] to the dtype of `rows` and write it where `real`."""
    pointers = _row_pointers(rows, at, start, values.shape[0], values.shape[1], ALIGN)
    mask = real[:, None]
    if values.shape[1] != WIDTH:
        mask = mask & (tl.arange(0, values.shape[1]) < WIDTH)[None, :]
    tl.store(pointers, values.to(rows.ptr.dtype.element_ty), mask=mask)


class Pieces(NamedTuple):
    """A tile of queries or of keys, [BLOCK, D], or of sums of such rows: all columns, or those of one chain
    and the rest."""

    first: Any
    rest: Any  # Pieces, or None


@triton.jit
def chain(call, BLOCK_D: tl.constexpr):
    """How many columns of q·k are one chain of multiply-adds, in every pass over the scores: 96 of float32
    end up five times as far from exact as torch's sums in lanes. Known when a kernel is compiled."""
    IS_FLOAT32: tl.constexpr = call.query.ptr.dtype.element_ty.primitive_bitwidth == 32
    MOST: tl.constexpr = CHAIN if call.long_chains is None else 2 * CHAIN
    return MOST if IS_FLOAT32 and BLOCK_D > MOST else BLOCK_D


@triton.jit
def load_pieces(
    call, rows, at, start, real, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """As load_rows, of queries or keys."""
    return _load_pieces(rows, at, start, real, chain(call, BLOCK_D), D, BLOCK, ALIGN)


@triton.jit
def _load_pieces(
    rows, at, start, real, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    if WIDTH <= COLUMNS:
        return Pieces(load_rows(rows, at, start, real, WIDTH, BLOCK, COLUMNS, ALIGN), None)
    else:
        first = load_rows(rows, at, start, real, COLUMNS, BLOCK, COLUMNS, ALIGN)
        rest = _load_pieces(rows, at + COLUMNS, start, real, COLUMNS, WIDTH - COLUMNS, BLOCK, ALIGN)
        return Pieces(first, rest)


@triton.jit
def zero_pieces(rows):
    """Sums of such rows, float32."""
    first = tl.zeros(rows.first.shape, tl.float32)
    if rows.rest is None:
        return Pieces(first, None)
    else:
        return Pieces(first, zero_pieces(rows.rest))


@triton.jit
def store_pieces(rows, at, start, real, values, D: tl.constexpr, ALIGN: tl.constexpr):
    """As store_rows."""
    COLUMNS: tl.constexpr = values.first.shape[1]
    if values.rest is None:
        store_rows(rows, at, start, real, values.first, D, ALIGN)
    else:
        store_rows(rows, at, start, real, values.first, COLUMNS, ALIGN)
        store_pieces(rows, at + COLUMNS, start, real, values.rest, D - COLUMNS, ALIGN)


@triton.jit
def scaled_pieces(values, factor):
    """values * factor, as values' dtype has it."""
    first = (values.first * factor).to(values.first.dtype)
    if values.rest is None:
        return Pieces(first, None)
    else:
        return Pieces(first, scaled_pieces(values.rest, factor))


@triton.jit
def add_products(a, b):
    """A sum that no compiler takes for one chain: Triton adds a product to another's sums where it sees +."""
    return tl.fma(a, tl.full(a.shape, 1.0, tl.float32), b)


@triton.jit
def row_products(a, b):
    """a b^T of rows [A, D] and [B, D], queries and keys in either order."""
    products = tl.dot(a.first, tl.trans(b.first), input_precision="ieee")
    if a.rest is None:
        return products
    else:
        return add_products(products, row_products(a.rest, b.rest))


@triton.jit
def add_rows(sums, factors, rows):
    """sums + factors rows; factors [A, B], rows [B, D]."""
    first = tl.dot(factors, rows.first, sums.first, input_precision="ieee")
    if rows.rest is None:
        return Pieces(first, None)
    else:
        return Pieces(first, add_rows(sums.rest, factors, rows.rest))


@triton.jit
def query_at(rows, head, ALIGN: tl.constexpr):
    """Where the head's rows begin in query, out or a gradient of theirs: an offset in elements, for each row
    where a tile's are of several heads."""
    at = head.b * aligned(rows.stride_b, ALIGN) + head.row_h * aligned(rows.stride_h, ALIGN)
    return at + head.first_query * aligned(rows.stride_m, ALIGN)


@triton.jit
def rows_apart(rows, head, offs_m, ALIGN: tl.constexpr):
    """Rows offs_m of a tile that holds rows of several heads: (rows, at), by which load_rows and store_rows
    find them from row 0 on."""
    at = query_at(rows, head, ALIGN) + offs_m.to(tl.int64)[:, None] * aligned(rows.stride_m, ALIGN)
    return Rows(rows.ptr, rows.stride_b, rows.stride_h, rows.stride_m * 0, None), at


@triton.jit
def key_at(rows, head, ALIGN: tl.constexpr):
    """As query_at, in key, value or a gradient of theirs."""
    at = head.b * aligned(rows.stride_b, ALIGN) + head.h_kv * aligned(rows.stride_h, ALIGN)
    return at + head.first_key * aligned(rows.stride_m, ALIGN)


@triton.jit
def signed_query(q, QUERY_SIGN: tl.constexpr):
    """The queries as products want them, which makes the scale positive."""
    return q if QUERY_SIGN == 1 else scaled_pieces(q, QUERY_SIGN)


@triton.jit
def holds_products(call):
    """Whether tiles hold bare products. Known when a kernel is compiled."""
    return call.softcap is None and call.bias is None and call.relative_bias_ptr is None


@triton.jit
def is_fused(call):
    """Whether a weight comes of one multiply-add and an exponential: of bare products, for 16-bit results.
    Known when a kernel is compiled."""
    return holds_products(call) and call.query.ptr.dtype.element_ty.primitive_bitwidth == 16


@triton.jit
def tile_unit(call):
    """What an element of a tile counts in logits."""
    if holds_products(call):
        return call.scale
    else:
        return 1.0


@triton.jit
def _tanh(z):
    # z (1 + z^2 P(z^2)) near 0, where 1 - 2 / (e^2z + 1) would cancel; both to about 2 ulp.
    square = z * z
    p = square * -5.70498872745e-3 + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    small = p * square * z + z
    magnitude = tl.abs(z)
    large = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2_E)) + 1.0)
    return tl.where(magnitude < 0.625, small, tl.where(z < 0, -large, large))  # NaN: large


@triton.jit
def _capped(call, products):
    """tanh of the scaled products over the cap."""
    return _tanh(products * (call.scale / call.softcap))


@triton.jit
def _with_biases(call, head, logits, m, n):
    if call.bias is not None:
        at = head.b * call.bias.stride_b + head.row_h * call.bias.stride_h
        offsets = m.to(tl.int64) * call.bias.stride_m + n.to(tl.int64) * call.bias.stride_n
        inside = (m < head.M) & (n < head.N)
        logits += tl.load(call.bias.ptr + at + offsets, mask=inside, other=0.0).to(tl.float32)
    if call.relative_bias_ptr is not None:
        entry = n - m + (head.longest_M - 1)
        inside = (entry >= 0) & (entry < head.longest_M + head.longest_N - 1)
        row = call.relative_bias_ptr + head.row_h * call.relative_bias_stride_h
        logits += tl.load(row + entry, mask=inside, other=0.0).to(tl.float32)
    return logits


@triton.jit
def score_tile(call, head, products, m, n):
    """Products of signed queries and keys, float32, to what tiles hold; nothing hidden. m and n as in
    masks.visible."""
    if call.softcap is not None:
        products = _capped(call, products) * call.softcap
    elif call.bias is not None or call.relative_bias_ptr is not None:
        products = products * call.scale
    return _with_biases(call, head, products, m, n)


@triton.jit
def score_tile_and_slope(call, head, products, m, n):
    """score_tile, and the derivative of its elements by the scaled products, 1.0 without a softcap."""
    slope = 1.0
    if call.softcap is not None:
        t = _capped(call, products)
        slope = 1.0 - t * t
        return _with_biases(call, head, t * call.softcap, m, n), slope
    else:
        return score_tile(call, head, products, m, n), slope


@triton.jit
def hide(call, head, scores, m, n, real):
    """-inf where a key is hidden; m, n and `real` as in masks.visible."""
    return tl.where(visible(call, head, m, n, real), scores, float("-inf"))


@triton.jit
def keep_tile(call, head, threshold, offs_m, n0, BLOCK_N: tl.constexpr):
    """bool [BLOCK_M, BLOCK_N]: the weights that dropout keeps; n0 is a multiple of 32."""
    seed = tl.load(call.seed_ptr)
    return matrix_keep(seed, offs_m, n0, head.stream, 0, threshold, offs_m.shape[0], BLOCK_N)


@triton.jit
def row_pivots(call, row_max, row_sum):
    """What `weights` subtracts in the exponent, and the factor that it applies, float32 [BLOCK_M], from the
    statistics that forward left. A row that sees nothing (0, past the last) gets weights of 0."""
    nothing = row_sum == 0
    divisor = tl.where(nothing, 1.0, row_sum)
    if is_fused(call):
        shift = row_max * LOG2_E + tl.log2(divisor)
        factor = tl.full(row_sum.shape, 1.0, tl.float32)
    else:
        shift = row_max
        factor = tl.where(nothing, 0.0, 1.0 / divisor)
    return tl.where(nothing, float("inf"), shift), factor


@triton.jit
def weights(call, scores, shift, factor):
    """exp(unit * scores - row_max) / row_sum, with what `row_pivots` gave, along the tile's dimension."""
    if is_fused(call):
        return tl.exp2(scores * (tile_unit(call) * LOG2_E) - shift)
    else:
        return tl.exp2((scores * tile_unit(call) - shift) * LOG2_E) * factor
