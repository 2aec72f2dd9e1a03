"""Sums of a matrix's columns in float32, in two stages without atomics: always added in the same order."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .configs import COLUMN_SUMS
from .launch import MULTIPLY_ADDS, ceil_div
from .tiles import aligned, load_tile

_MOST_PARTS = 65535


@triton.jit(do_not_specialize=["stride", "rows", "C", "depth"])
def _column_sums_kernel(
    matrix_ptr,  # [rows, C], row stride `stride`
    out_ptr,  # [cdiv(rows, depth), C]
    stride, rows, C, depth,
    ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Row p of out: BLOCK_C column sums of rows p * depth .. (p + 1) * depth - 1."""
    C = aligned(C, ALIGN)
    part = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.minimum((part + 1) * depth, rows)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(part * depth, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & (cols < C)[None, :]
        acc += load_tile(matrix_ptr, stride, row, cols, mask, ALIGN)
    sums = tl.sum(acc, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + part.to(tl.int64) * C + cols, sums, mask=cols < C)


def column_sums(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sums over the rows of [rows, C] with contiguous columns, as [C] in `dtype`; zeros of no rows."""
    rows, C = matrix.shape
    if 0 in matrix.shape:
        return matrix.new_zeros(C, dtype=dtype)
    config = COLUMN_SUMS
    # About as many parts as rows in a part, and no more parts than the grid's second axis takes.
    groups = ceil_div(rows, config.block_r)
    depth = config.block_r * ceil_div(groups, min(math.isqrt(groups), _MOST_PARTS))
    parts = ceil_div(rows, depth)
    out = matrix.new_empty((parts, C), dtype=dtype if parts == 1 else torch.float32)
    stride = matrix.stride(0)
    align = math.gcd(C, stride, 16 // matrix.element_size())
    _column_sums_kernel[(ceil_div(C, config.block_c), parts)](
        matrix, out, stride, rows, C, depth,
        ALIGN=align, BLOCK_R=config.block_r, BLOCK_C=config.block_c, num_warps=config.num_warps,
        **MULTIPLY_ADDS,
    )  # fmt: skip
    return out.view(C) if parts == 1 else column_sums(out, dtype)
