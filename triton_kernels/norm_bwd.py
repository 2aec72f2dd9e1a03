"""Gradients of layer norm and RMS norm of residual + dropout(x).

As in norm_fwd, one kernel for whole rows in registers and one for wider rows. Weight and bias gradients take
two stages without atomics: each program writes a row of partial sums, and a second kernel adds those up.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .launch import (
    MULTIPLY_ADDS,
    TARGET,
    as_rows,
    ceil_div,
    contiguous,
    dropout_constants,
    on_device,
    size_agnostic,
    sm_count,
)
from .norm_configs import COLUMN_SUM, bwd_programs, norm_config
from .tiles import affine, aligned, drop, load_tile, store_tile


@triton.jit
def _load_normalised(
    grad_ptr, s_ptr, weight_ptr, stride_g, stride_s, row, cols, in_row, mask, mean, rstd, ALIGN: tl.constexpr
):
    """grad_out, dy = grad_out * weight and xhat = (s - mean) * rstd, float32; zeros where masked."""
    grad = load_tile(grad_ptr, stride_g, row, cols, mask, ALIGN)
    s = load_tile(s_ptr, stride_s, row, cols, mask, ALIGN)
    xhat = tl.where(mask, (s - mean[:, None]) * rstd[:, None], 0.0)
    return grad, affine(grad, weight_ptr, None, cols, in_row), xhat


@triton.jit
def _store_gradients(
    ds, grad_sum_ptr, seed_ptr, ds_ptr, dx_ptr, stride_gs, C, row, start, cols, mask, threshold, scale,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Add grad_sum to the norm's own gradient of s; write ds, and dx = dropout'(ds) before rounding."""
    if grad_sum_ptr is not None:
        ds += load_tile(grad_sum_ptr, stride_gs, row, cols, mask, ALIGN)
    store_tile(ds_ptr, C, row, cols, mask, ds, ALIGN)
    if seed_ptr is not None:
        dx = drop(ds, seed_ptr, row, start, threshold, scale)
        store_tile(dx_ptr, C, row, cols, mask, dx, ALIGN)


@triton.jit
def _load_statistics(mean_ptr, rstd_ptr, row, in_rows):
    """(mean, rstd), float32 [ROWS]; mean 0 for RMS norm."""
    mean = tl.zeros([row.shape[0]], tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)
    return mean, tl.load(rstd_ptr + row, mask=in_rows, other=0.0)


@size_agnostic
def _norm_bwd_kernel(
    grad_ptr,  # [rows, C], row stride stride_g
    grad_sum_ptr,  # None or [rows, C], row stride stride_gs
    s_ptr,  # [rows, C], row stride stride_s
    weight_ptr,  # None or [C]
    mean_ptr,  # float32 [rows], None for RMS norm
    rstd_ptr,  # float32 [rows]
    seed_ptr,  # int64 [1], None without dropout
    ds_ptr,  # [rows, C]
    dx_ptr,  # [rows, C], None without dropout
    dweight_ptr,  # None or float32 [programs, C]
    dbias_ptr,  # None or float32 [programs, C]
    stride_g, stride_gs, stride_s, rows, C, threshold, scale, steps,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of steps * ROWS consecutive whole rows a program, ROWS at a time.

    ds = rstd * (dy - mean(dy) - xhat * mean(dy * xhat)) + grad_sum, with dy = grad_out * weight and without
    mean(dy) for RMS norm. Writes ds, dx, and the program's own row of the dweight and dbias partial sums.
    """
    C = aligned(C, ALIGN)
    cols = tl.arange(0, BLOCK_C)
    in_row = cols < C
    dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        in_rows = row < rows
        mask = in_rows[:, None] & in_row[None, :]
        mean, rstd = _load_statistics(mean_ptr, rstd_ptr, row, in_rows)
        grad, dy, xhat = _load_normalised(
            grad_ptr, s_ptr, weight_ptr, stride_g, stride_s, row, cols, in_row, mask, mean, rstd, ALIGN
        )
        ds = dy - xhat * (tl.sum(dy * xhat, 1) / C)[:, None]
        if mean_ptr is not None:
            ds -= (tl.sum(dy, 1) / C)[:, None]
        _store_gradients(
            ds * rstd[:, None], grad_sum_ptr, seed_ptr, ds_ptr, dx_ptr, stride_gs, C, row, 0, cols, mask,
            threshold, scale, ALIGN,
        )  # fmt: skip
        if dweight_ptr is not None:
            dweight += grad * xhat
        if dbias_ptr is not None:
            dbias += grad
    partial = tl.program_id(0).to(tl.int64) * C + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=in_row)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=in_row)


@size_agnostic
def _norm_bwd_wide_kernel(
    grad_ptr, grad_sum_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    ds_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_g, stride_gs, stride_s, rows, C, threshold, scale, steps,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As _norm_bwd_kernel for one group of ROWS rows a program (steps is 1), in chunks of BLOCK_C columns;
    grad_out and s are read twice."""
    C = aligned(C, ALIGN)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    mean, rstd = _load_statistics(mean_ptr, rstd_ptr, row, in_rows)
    dy_sum = tl.zeros([ROWS], tl.float32)
    dy_xhat_sum = tl.zeros([ROWS], tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        in_row = cols < C
        mask = in_rows[:, None] & in_row[None, :]
        _, dy, xhat = _load_normalised(
            grad_ptr, s_ptr, weight_ptr, stride_g, stride_s, row, cols, in_row, mask, mean, rstd, ALIGN
        )
        dy_xhat_sum += tl.sum(dy * xhat, 1)
        if mean_ptr is not None:
            dy_sum += tl.sum(dy, 1)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        in_row = cols < C
        mask = in_rows[:, None] & in_row[None, :]
        grad, dy, xhat = _load_normalised(
            grad_ptr, s_ptr, weight_ptr, stride_g, stride_s, row, cols, in_row, mask, mean, rstd, ALIGN
        )
        ds = dy - xhat * (dy_xhat_sum / C)[:, None]
        if mean_ptr is not None:
            ds -= (dy_sum / C)[:, None]
        _store_gradients(
            ds * rstd[:, None], grad_sum_ptr, seed_ptr, ds_ptr, dx_ptr, stride_gs, C, row, start, cols, mask,
            threshold, scale, ALIGN,
        )  # fmt: skip
        partial = tl.program_id(0).to(tl.int64) * C + cols
        if dweight_ptr is not None:
            tl.store(dweight_ptr + partial, tl.sum(grad * xhat, 0), mask=in_row)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + partial, tl.sum(grad, 0), mask=in_row)


@triton.jit
def _column_sum(partial_ptr, out_ptr, partials, C, cols, BLOCK_P: tl.constexpr):
    acc = tl.zeros([BLOCK_P, cols.shape[0]], tl.float32)
    for start in range(0, partials, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < partials)[:, None] & (cols < C)[None, :]
        acc += tl.load(partial_ptr + offs_p.to(tl.int64)[:, None] * C + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(acc, 0), mask=cols < C)


@size_agnostic
def _column_sum_kernel(
    dweight_partial_ptr,  # None or float32 [partials, C]
    dbias_partial_ptr,  # None or float32 [partials, C]
    dweight_ptr,  # None or float32 [C]
    dbias_ptr,  # None or float32 [C]
    partials, C,
    ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Second stage of dweight and dbias: BLOCK_C columns a program, always added in the same order."""
    C = aligned(C, ALIGN)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if dweight_ptr is not None:
        _column_sum(dweight_partial_ptr, dweight_ptr, partials, C, cols, BLOCK_P)
    if dbias_ptr is not None:
        _column_sum(dbias_partial_ptr, dbias_ptr, partials, C, cols, BLOCK_P)


def norm_bwd(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    rms: bool,
    dropout_p: float,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `norm_fwd`.

    Args:
        grad_out: [..., C], the gradient of out, any strides.
        grad_sum: None or [..., C], the gradient of the returned s, any strides.
        s: The returned s, or x where there was no residual.
        weight, seed, rms, dropout_p: As in `norm_fwd`.
        mean, rstd: As `norm_fwd` returned them.
        need_dweight, need_dbias: Which of the two column sums to compute.

    Returns:
        ds, which is also the residual's gradient, and dx, contiguous in s's dtype; dx is empty [0] without
        dropout, where it equals ds. dweight and dbias, float32 [C], empty [0] where not needed; the same call
        on the same device adds them up in the same order.
    """
    C = s.shape[-1]
    rows = rstd.numel()
    threshold, scale = dropout_constants(dropout_p)
    ds = torch.empty_like(s, memory_format=torch.contiguous_format)
    dx = torch.empty_like(ds) if threshold else s.new_empty(0)
    if rows == 0:
        return ds, dx, rstd.new_zeros(C * need_dweight), rstd.new_zeros(C * need_dbias)
    grad_rows, stride_g = as_rows(grad_out)
    grad_sum_rows, stride_gs = as_rows(grad_sum)
    s_rows, stride_s = as_rows(s)
    align = math.gcd(C, stride_g, stride_gs, stride_s, 8)
    config = norm_config(TARGET, "norm_bwd", C, align)
    groups = ceil_div(rows, config.rows)
    steps = 1 if config.wide else ceil_div(groups, bwd_programs(TARGET, config, sm_count(s.device)))
    programs = ceil_div(groups, steps)
    dweight = rstd.new_empty((programs, C) if need_dweight else 0)
    dbias = rstd.new_empty((programs, C) if need_dbias else 0)
    kernel = _norm_bwd_wide_kernel if config.wide else _norm_bwd_kernel
    with on_device(s):
        kernel[(programs,)](
            grad_rows,
            grad_sum_rows,
            s_rows,
            contiguous(weight),
            None if rms else mean.contiguous(),
            rstd.contiguous(),
            seed if threshold else None,
            ds,
            dx if threshold else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            stride_g,
            stride_gs,
            stride_s,
            rows,
            C,
            threshold,
            scale,
            steps,
            ALIGN=align,
            ROWS=config.rows,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
            enable_fp_fusion=threshold == 0,
        )
        if need_dweight or need_dbias:
            dweight, dbias = _column_sums(dweight, dbias, programs, C)
    return ds, dx, dweight, dbias


def _column_sums(
    dweight: torch.Tensor, dbias: torch.Tensor, programs: int, C: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum [programs, C] partial sums to [C]; either may be empty [0]."""
    if programs == 1:
        return dweight.view(-1), dbias.view(-1)
    dweight_sum, dbias_sum = (partial.new_empty(C if partial.numel() else 0) for partial in (dweight, dbias))
    _column_sum_kernel[(ceil_div(C, COLUMN_SUM.block_c),)](
        *(t if t.numel() else None for t in (dweight, dbias, dweight_sum, dbias_sum)),
        programs,
        C,
        ALIGN=math.gcd(C, 8),
        BLOCK_P=COLUMN_SUM.block_p,
        BLOCK_C=COLUMN_SUM.block_c,
        num_warps=COLUMN_SUM.num_warps,
        **MULTIPLY_ADDS,
    )
    return dweight_sum, dbias_sum
