"""feed_forward's backward:

    hd = dropout(act(pre)), gated dropout(act(gate) pre);  dh = dropout'(grad_out w2)
    dpre = dh act'(pre), gated dh act(gate);  dgate = dh pre act'(gate)
    dx = dpre w1 + dgate w_gate;  dw2 = grad_out^T hd;  dw1 = dpre^T x;  dw_gate = dgate^T x

One kernel multiplies grad_out by w2 and, tile by tile, makes of that hd, dpre, dgate and the column
sums of the last two. The other products are plain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .activations import activate_with_gradient
from .column_sums import column_sums
from .configs import HIDDEN_SLICE, GemmConfig, gemm_config
from .feed_forward import hidden_rows
from .gemm import (
    Operand,
    alignment,
    along_columns,
    along_rows,
    as_matrix,
    column_slice,
    gemm,
    gemm_kernel,
    load_result,
    product,
    product_options,
    programs,
    store_result,
    tile_count,
    tile_place,
    weight_operands,
)
from .launch import arch, ceil_div, dropout_constants, on_device, sm_count
from .philox import matrix_keep


@triton.jit
def _store_column_sums(ptr, values, m, n, M, N):
    """Sums over a tile's rows, to its row of float32 [tiles of rows, N]."""
    row, cols = m + tl.arange(0, values.shape[0]), n + tl.arange(0, values.shape[1])
    sums = tl.sum(tl.where((row < M)[:, None], values, 0.0), 0)
    tl.store(ptr + (m // values.shape[0]).to(tl.int64) * N + cols, sums, mask=cols < N)


@triton.jit
def _finish_hidden_bwd(
    dh, pre_ptr, pre_gate_ptr, seed_ptr, hidden_ptr, dpre_ptr, dgate_ptr, db1_ptr, db_gate_ptr,
    m, n, M, N, threshold, scale, ACTIVATION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """From grad_out w2 to results, for a tile from row m and column n on."""
    ROWS: tl.constexpr = dh.shape[0]
    COLUMNS: tl.constexpr = dh.shape[1]
    if seed_ptr is not None:
        row = m + tl.arange(0, ROWS)
        keep = matrix_keep(tl.load(seed_ptr), row, n, 0, 2, threshold, ROWS, COLUMNS)
        dh = tl.where(keep, dh * scale, 0.0)
    pre = load_result(pre_ptr, m, n, M, N, ALIGN, ROWS, COLUMNS)
    if pre_gate_ptr is not None:
        gate = load_result(pre_gate_ptr, m, n, M, N, ALIGN, ROWS, COLUMNS)
        opening, dgate = activate_with_gradient(gate, dh * pre, ACTIVATION)
        hidden = opening * pre
        dpre = opening * dh
    else:
        hidden, dpre = activate_with_gradient(pre, dh, ACTIVATION)
    if hidden_ptr is not None:
        if seed_ptr is not None:
            hidden = tl.where(keep, hidden * scale, 0.0)
        store_result(hidden_ptr, hidden, m, n, M, N, ALIGN)
    if dpre_ptr is not None:
        store_result(dpre_ptr, dpre, m, n, M, N, ALIGN)
    if dgate_ptr is not None:
        store_result(dgate_ptr, dgate, m, n, M, N, ALIGN)
    if db1_ptr is not None:
        _store_column_sums(db1_ptr, dpre, m, n, M, N)
    if db_gate_ptr is not None:
        _store_column_sums(db_gate_ptr, dgate, m, n, M, N)


@gemm_kernel
def _hidden_bwd_kernel(
    grad_ptr,  # [rows, E_out]
    w2_ptr,  # [E_out, F]
    pre_ptr,  # [rows, F]
    pre_gate_ptr,  # None or [rows, F]
    seed_ptr,  # int64 [1], None without dropout
    hidden_ptr,  # None or [rows, F]
    dpre_ptr,  # None or [rows, F]
    dgate_ptr,  # None or [rows, F]
    db1_ptr,  # None or float32 [tiles of rows, F]
    db_gate_ptr,  # None or float32 [tiles of rows, F]
    stride_a, stride_b, M, N, K, threshold, scale,
    ACTIVATION: tl.constexpr, A_BY_K: tl.constexpr, B_BY_K: tl.constexpr, ALIGN: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """hd, dpre, dgate and the column sums of the last two, those whose pointers are there. M rows, N = F,
    K = E_out, or 0 where only hd is wanted; programs take turns at tiles."""
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        m, n = tile_place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        dh = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        dh, _ = product(
            dh, dh, grad_ptr, w2_ptr, None, stride_a, stride_b, 0, m, n, M, N, 0, K,
            A_BY_K, B_BY_K, ALIGN, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        for index in tl.static_range(BLOCK_N // SLICE):
            _finish_hidden_bwd(
                column_slice(dh, index, SLICE), pre_ptr, pre_gate_ptr, seed_ptr, hidden_ptr, dpre_ptr,
                dgate_ptr, db1_ptr, db_gate_ptr, m, n + index * SLICE, M, N, threshold, scale,
                ACTIVATION, ALIGN,
            )  # fmt: skip


class _Hidden(NamedTuple):
    """What the first kernel makes, or whether it is wanted."""

    hidden: Any  # [rows, F]
    dpre: Any  # [rows, F]
    dgate: Any  # [rows, F]
    db1: Any  # float32 [tiles of rows, F]
    db_gate: Any  # float32 [tiles of rows, F]


def hidden_bwd_tile(
    device: torch.device, grad: torch.Tensor, N: int, K: int, w2: torch.Tensor, gated: bool
) -> tuple[GemmConfig, int, Operand, Operand]:
    """The tile of `_hidden_gradients` on a device, `alignment`, and what it multiplies: grad_out and w2."""
    M, kind = grad.shape[0], "hidden_bwd_gated" if gated else "hidden_bwd"
    a, (b,) = along_columns(grad), weight_operands(w2, backward=True)
    align = alignment(M, N, K, a, b)
    config, _ = gemm_config(arch(device), kind, grad.element_size(), align, M, N, 0, sm_count(device))
    return config, align, a, b


def _hidden_gradients(
    wanted: _Hidden,
    grad: torch.Tensor,
    pre: torch.Tensor,
    pre_gate: torch.Tensor | None,
    w2: torch.Tensor,
    seed: torch.Tensor | None,
    activation: str,
    dropout_p: float,
) -> _Hidden:
    """Those wanted, from grad_out [rows, E_out], and pre and pre_gate [rows, F]; None for the others."""
    M, N = pre.shape
    K, device = grad.shape[1] if any(wanted[1:]) else 0, grad.device
    config, align, a, b = hidden_bwd_tile(device, grad, N, K, w2, pre_gate is not None)
    tiles = ceil_div(M, config.block_m)
    made = _Hidden(
        *(torch.empty_like(pre) if want else None for want in wanted[:3]),
        *(pre.new_empty((tiles, N), dtype=torch.float32) if want else None for want in wanted[3:]),
    )
    if not any(wanted) or M == 0 or N == 0:
        return made
    threshold, scale = dropout_constants(dropout_p)
    _hidden_bwd_kernel[programs(config, tile_count(config, M, N), device)](
        grad,
        b.tensor,
        pre,
        pre_gate,
        seed if threshold else None,
        *made,
        a.stride,
        b.stride,
        M,
        N,
        K,
        threshold,
        scale,
        ACTIVATION=activation,
        SLICE=HIDDEN_SLICE,
        **product_options(config, align, K, a, b),
    )
    return made


def _input_gradient(made: _Hidden, w1: torch.Tensor, w_gate: torch.Tensor | None) -> torch.Tensor:
    (M, K), N = made.dpre.shape, w1.shape[1]
    if w_gate is None:
        (b,) = weight_operands(w1, backward=True)
        return gemm(along_columns(made.dpre), b, M, N, K)
    b, b2 = weight_operands(w1, w_gate, backward=True)
    return gemm(along_columns(made.dpre), b, M, N, K, second=(along_columns(made.dgate), b2))


def feed_forward_bwd(
    grad_out: torch.Tensor,
    pre: torch.Tensor,
    pre_gate: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w_gate: torch.Tensor | None,
    b_gate: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    need_x: bool,
    need_w1: bool,
    need_b1: bool,
    need_w_gate: bool,
    need_b_gate: bool,
    need_w2: bool,
    need_b2: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `feed_forward_fwd`.

    Args:
        grad_out: [..., E_out], any strides.
        pre, pre_gate: As `feed_forward_fwd` returned them; empty where they are to be computed again.
        x, w1, b1, w_gate, b_gate, w2, b2, seed, activation, dropout_p: As in `feed_forward_fwd`.
        need_x, ...: Which gradients to compute.

    Returns:
        The gradients of x, w1, b1, w_gate, b_gate, w2 and b2, contiguous in x's dtype, each empty [0] where
        it is not needed or there is no such tensor. The same call on the same device gives the same bits.
    """
    need_b1, need_b2 = need_b1 and b1 is not None, need_b2 and b2 is not None
    need_w_gate, need_b_gate = need_w_gate and w_gate is not None, need_b_gate and b_gate is not None
    wanted = _Hidden(
        hidden=need_w2,
        dpre=need_x or need_w1,
        dgate=w_gate is not None and (need_x or need_w_gate),
        db1=need_b1,
        db_gate=need_b_gate,
    )
    nothing = x.new_empty(0)
    with on_device(x):
        x_rows, grad = as_matrix(x), as_matrix(grad_out)
        (rows, E), (E_out, F) = x_rows.shape, w2.shape
        if any(wanted):
            again = pre.numel() == 0
            pre = x.new_empty(rows, F) if again else pre.reshape(rows, F)
            gate = None if w_gate is None else torch.empty_like(pre) if again else pre_gate.reshape(rows, F)
            if again:
                hidden_rows(x_rows, w1, b1, w_gate, b_gate, None, activation, 0.0, None, pre, gate)
            made = _hidden_gradients(wanted, grad, pre, gate, w2, seed, activation, dropout_p)
        dx = _input_gradient(made, w1, w_gate).view(x.shape) if need_x else nothing
        dw1 = gemm(along_rows(made.dpre), along_rows(x_rows), F, E, rows) if need_w1 else nothing
        dw_gate = gemm(along_rows(made.dgate), along_rows(x_rows), F, E, rows) if need_w_gate else nothing
        dw2 = gemm(along_rows(grad), along_rows(made.hidden), E_out, F, rows) if need_w2 else nothing
        db1 = column_sums(made.db1, x.dtype) if need_b1 else nothing
        db_gate = column_sums(made.db_gate, x.dtype) if need_b_gate else nothing
        db2 = column_sums(grad, x.dtype) if need_b2 else nothing
    # Outputs of an operator are never the same tensor.
    return tuple(
        g if g is not nothing else x.new_empty(0) for g in (dx, dw1, db1, dw_gate, db_gate, dw2, db2)
    )
