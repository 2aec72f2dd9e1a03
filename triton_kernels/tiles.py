"""Tiles of row-strided matrices [rows, C]: loads, stores, and what is done to them on the way."""

import triton
import triton.language as tl

from .philox import norm_keep


@triton.jit
def aligned(extent, ALIGN: tl.constexpr):
    """extent, which ALIGN divides, in a form from which the compiler can tell so and use wide accesses."""
    # tl.multiple_of would be forgotten: it marks the operation that made a value, and an argument has none.
    return extent // ALIGN * ALIGN


@triton.jit
def load_tile(ptr, stride, row, cols, mask, ALIGN: tl.constexpr):
    """[ROWS, BLOCK_C] of a row-strided matrix in float32; zeros where masked."""
    offsets = row.to(tl.int64)[:, None] * aligned(stride, ALIGN) + cols[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, C, row, cols, mask, values, ALIGN: tl.constexpr):
    """Round a float32 tile to the dtype of a contiguous [rows, C] matrix, and write it."""
    offsets = row.to(tl.int64)[:, None] * aligned(C, ALIGN) + cols[None, :]
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def drop(values, seed_ptr, row, start, threshold, scale):
    """Scale what is kept and select 0 for the rest: a dropped inf or NaN must not come through."""
    keep = norm_keep(tl.load(seed_ptr), row, start, threshold, values.shape[0], values.shape[1])
    return tl.where(keep, values * scale, 0.0)


@triton.jit
def load_columns(ptr, cols, in_row, ROWS: tl.constexpr):
    """A [C] vector in float32, repeated to [ROWS, BLOCK_C]; zeros past C."""
    # Loaded at the tile's full shape, so that it arrives in the tile's layout: a [1, BLOCK_C] load gets a
    # layout of its own and passes through shared memory.
    offsets = cols[None, :] + tl.zeros([ROWS, 1], tl.int32)
    return tl.load(ptr + offsets, mask=in_row[None, :], other=0.0).to(tl.float32)


@triton.jit
def affine(values, weight_ptr, bias_ptr, cols, in_row):
    """values * weight + bias along the columns; either pointer may be None."""
    if weight_ptr is not None:
        values = values * load_columns(weight_ptr, cols, in_row, values.shape[0])
    if bias_ptr is not None:
        values = values + load_columns(bias_ptr, cols, in_row, values.shape[0])
    return values
