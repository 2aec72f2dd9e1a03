"""Layer norm and RMS norm of residual + dropout(x).

Two kernels: one holds a tile of whole rows in registers and reads every input once, the other loops over
column chunks of rows too wide for that.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .launch import TARGET, as_rows, ceil_div, contiguous, dropout_constants, on_device, size_agnostic
from .norm_configs import norm_config
from .tiles import affine, aligned, drop, load_tile, store_tile


@triton.jit
def _load_sum(
    x_ptr, residual_ptr, sum_ptr, seed_ptr, stride_x, stride_r, row, start, cols, mask, threshold, scale,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """s = residual + dropout(x) as sum_ptr's dtype rounds it, float32 [ROWS, BLOCK_C]; zeros where masked."""
    s = load_tile(x_ptr, stride_x, row, cols, mask, ALIGN)
    if seed_ptr is not None:
        s = drop(s, seed_ptr, row, start, threshold, scale)
    if residual_ptr is not None:
        s = load_tile(residual_ptr, stride_r, row, cols, mask, ALIGN) + s
        s = s.to(sum_ptr.dtype.element_ty).to(tl.float32)
    return s


@size_agnostic
def _norm_fwd_kernel(
    x_ptr,  # [rows, C], row stride stride_x
    residual_ptr,  # None or [rows, C], row stride stride_r
    weight_ptr,  # None or [C]
    bias_ptr,  # None or [C]
    seed_ptr,  # int64 [1], None without dropout
    out_ptr,  # [rows, C]
    sum_ptr,  # None or [rows, C]
    mean_ptr,  # float32 [rows], None for RMS norm
    rstd_ptr,  # float32 [rows]
    stride_x, stride_r, rows, C, eps, threshold, scale,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalise ROWS whole rows a program; writes out, the sum and the rows' statistics."""
    C = aligned(C, ALIGN)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)
    in_row = cols < C
    mask = (row < rows)[:, None] & in_row[None, :]  # [ROWS, BLOCK_C]
    s = _load_sum(
        x_ptr, residual_ptr, sum_ptr, seed_ptr, stride_x, stride_r, row, 0, cols, mask, threshold, scale,
        ALIGN,
    )  # fmt: skip
    if sum_ptr is not None:
        store_tile(sum_ptr, C, row, cols, mask, s, ALIGN)
    if mean_ptr is not None:
        mean = tl.div_rn(tl.sum(s, 1), C.to(tl.float32))
        tl.store(mean_ptr + row, mean, mask=row < rows)
        s = tl.where(in_row[None, :], s - mean[:, None], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(s * s, 1), C.to(tl.float32)) + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    out = affine(s * rstd[:, None], weight_ptr, bias_ptr, cols, in_row)
    store_tile(out_ptr, C, row, cols, mask, out, ALIGN)


@size_agnostic
def _norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    stride_x, stride_r, rows, C, eps, threshold, scale,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As _norm_fwd_kernel, in chunks of BLOCK_C columns; each row is read twice, the second time from L2.

    A chunk's mean comes before its centred squares; chunks are merged by Chan, Golub and LeVeque's
    pairwise update (1979), which loses nothing against a pass over the row for each.
    """
    C = aligned(C, ALIGN)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    mean = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        in_row = cols < C
        mask = in_rows[:, None] & in_row[None, :]
        s = _load_sum(
            x_ptr, residual_ptr, sum_ptr, seed_ptr, stride_x, stride_r, row, start, cols, mask,
            threshold, scale, ALIGN,
        )  # fmt: skip
        if sum_ptr is not None:
            store_tile(sum_ptr, C, row, cols, mask, s, ALIGN)
        if mean_ptr is not None:
            count = tl.minimum(C - start, BLOCK_C).to(tl.float32)
            chunk_mean = tl.div_rn(tl.sum(s, 1), count)
            s = tl.where(in_row[None, :], s - chunk_mean[:, None], 0.0)
            delta = chunk_mean - mean
            share = count / (start + count)
            mean += delta * share
            squares += delta * (start * share) * delta  # in this order 0 in the first chunk, whatever delta
        squares += tl.sum(s * s, 1)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, C.to(tl.float32)) + eps))
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=in_rows)
    tl.store(rstd_ptr + row, rstd, mask=in_rows)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        in_row = cols < C
        mask = in_rows[:, None] & in_row[None, :]
        # From the inputs again: what this program wrote to the sum is not ordered before its own loads.
        s = _load_sum(
            x_ptr, residual_ptr, sum_ptr, seed_ptr, stride_x, stride_r, row, start, cols, mask,
            threshold, scale, ALIGN,
        )  # fmt: skip
        out = affine((s - mean[:, None]) * rstd[:, None], weight_ptr, bias_ptr, cols, in_row)
        store_tile(out_ptr, C, row, cols, mask, out, ALIGN)


def norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    rms: bool,
    eps: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """norm(s) * weight + bias over the last dimension, where s = residual + dropout(x).

    Args:
        x: [..., C] float32, bfloat16 or float16, any strides.
        residual: None (then s = x, and there is no dropout), or like x, of any of the three dtypes.
        weight, bias: None or [C], of any of the three dtypes.
        seed: int64 [1], read only where dropout_p > 0.
        rms: RMS norm in place of layer norm.
        eps: Added to the variance (to the mean square for RMS norm).
        dropout_p: Probability of dropping an element of x; what is kept is scaled by its inverse.

    Returns:
        out, contiguous, and s, both [..., C] in the promoted dtype of x and residual; s is empty [0] without
        a residual. The rows' mean (empty [0] for RMS norm) and reciprocal deviation, float32 [...].
    """
    C = x.shape[-1]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    summed = out.new_empty(0) if residual is None else torch.empty_like(out)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    rows = rstd.numel()
    if rows == 0:
        return out, summed, mean, rstd
    x_rows, stride_x = as_rows(x)
    residual_rows, stride_r = as_rows(residual)
    align = math.gcd(C, stride_x, stride_r, 8)
    config = norm_config(TARGET, "norm_fwd", C, align)
    threshold, scale = dropout_constants(dropout_p)
    kernel = _norm_fwd_wide_kernel if config.wide else _norm_fwd_kernel
    with on_device(x):
        kernel[(ceil_div(rows, config.rows),)](
            x_rows,
            residual_rows,
            contiguous(weight),
            contiguous(bias),
            seed if threshold else None,
            out,
            None if residual is None else summed,
            None if rms else mean,
            rstd,
            stride_x,
            stride_r,
            rows,
            C,
            eps,
            threshold,
            scale,
            ALIGN=align,
            ROWS=config.rows,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
            # Every backend rounds x * scale before it adds the residual.
            enable_fp_fusion=threshold == 0,
        )
    return out, summed, mean, rstd
