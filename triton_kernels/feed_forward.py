"""feed_forward's forward: two products, and between them bias, activation, gate and dropout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import activate
from .configs import HIDDEN_SLICE, GemmConfig, gemm_config
from .gemm import (
    Operand,
    alignment,
    along_columns,
    as_matrix,
    column_slice,
    gemm,
    gemm_kernel,
    load_vector,
    product,
    product_options,
    programs,
    store_result,
    tile_count,
    tile_place,
    weight_operands,
)
from .launch import arch, contiguous, dropout_constants, on_device, sm_count
from .philox import matrix_keep


@triton.jit
def _finish_hidden(
    pre, gate, b1_ptr, b_gate_ptr, seed_ptr, hidden_ptr, pre_ptr, pre_gate_ptr, m, n, M, N, threshold, scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """From the products of x with w1 and w_gate to results, for a tile from row m and column n on."""
    ROWS: tl.constexpr = pre.shape[0]
    COLUMNS: tl.constexpr = pre.shape[1]
    cols = n + tl.arange(0, COLUMNS)
    if b1_ptr is not None:
        pre += load_vector(b1_ptr, cols, N)
    if b_gate_ptr is not None:
        gate += load_vector(b_gate_ptr, cols, N)
    if pre_ptr is not None:
        store_result(pre_ptr, pre, m, n, M, N, ALIGN)
    if pre_gate_ptr is not None:
        store_result(pre_gate_ptr, gate, m, n, M, N, ALIGN)
    if hidden_ptr is not None:
        hidden = activate(gate, ACTIVATION) * pre if GATED else activate(pre, ACTIVATION)
        if seed_ptr is not None:
            row = m + tl.arange(0, ROWS)
            keep = matrix_keep(tl.load(seed_ptr), row, n, 0, 2, threshold, ROWS, COLUMNS)
            hidden = tl.where(keep, hidden * scale, 0.0)
        store_result(hidden_ptr, hidden, m, n, M, N, ALIGN)


@gemm_kernel
def _hidden_kernel(
    x_ptr,  # [rows, E]
    w1_ptr,  # [F, E]
    w_gate_ptr,  # None or [F, E]
    b1_ptr,  # None or [F]
    b_gate_ptr,  # None or [F]
    seed_ptr,  # int64 [1], None without dropout
    hidden_ptr,  # None or [rows, F]
    pre_ptr,  # None or [rows, F]
    pre_gate_ptr,  # None or [rows, F]
    stride_a, stride_b, stride_b2, M, N, K, threshold, scale,
    ACTIVATION: tl.constexpr, A_BY_K: tl.constexpr, B_BY_K: tl.constexpr, ALIGN: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """hidden = dropout(act(pre)), gated dropout(act(pre_gate) * pre), where pre = x w1^T + b1 and
    pre_gate = x w_gate^T + b_gate. M rows, N = F, K = E; programs take turns at tiles."""
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        m, n = tile_place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        pre = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        gate = pre
        pre, gate = product(
            pre, gate, x_ptr, w1_ptr, w_gate_ptr, stride_a, stride_b, stride_b2, m, n, M, N, 0, K,
            A_BY_K, B_BY_K, ALIGN, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        for index in tl.static_range(BLOCK_N // SLICE):
            _finish_hidden(
                column_slice(pre, index, SLICE), column_slice(gate, index, SLICE), b1_ptr, b_gate_ptr,
                seed_ptr, hidden_ptr, pre_ptr, pre_gate_ptr, m, n + index * SLICE, M, N, threshold, scale,
                ACTIVATION, w_gate_ptr is not None, ALIGN,
            )  # fmt: skip


def hidden_tile(
    device: torch.device, x: torch.Tensor, w1: torch.Tensor, w_gate: torch.Tensor | None
) -> tuple[GemmConfig, int, list[Operand]]:
    """The tile of `hidden_rows` on a device, `alignment`, and what it multiplies: x, w1 and w_gate."""
    (M, K), N = x.shape, w1.shape[0]
    weights = weight_operands(w1) if w_gate is None else weight_operands(w1, w_gate)
    operands = [along_columns(x), *weights]
    align = alignment(M, N, K, *operands)
    kind = "hidden" if w_gate is None else "hidden_gated"
    config, _ = gemm_config(arch(device), kind, x.element_size(), align, M, N, 0, sm_count(device))
    return config, align, operands


def hidden_rows(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w_gate: torch.Tensor | None,
    b_gate: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    hidden: torch.Tensor | None,
    pre: torch.Tensor | None,
    pre_gate: torch.Tensor | None,
) -> None:
    """Fill those of hidden, pre and pre_gate [rows, F] that are there, from x [rows, E]."""
    (M, K), N = x.shape, w1.shape[0]
    if M == 0 or N == 0:
        return
    config, align, (a, b, *gate) = hidden_tile(x.device, x, w1, w_gate)
    threshold, scale = dropout_constants(dropout_p)
    _hidden_kernel[programs(config, tile_count(config, M, N), x.device)](
        x,
        b.tensor,
        gate[0].tensor if gate else None,
        contiguous(b1),
        contiguous(b_gate),
        seed if threshold else None,
        hidden,
        pre,
        pre_gate,
        a.stride,
        b.stride,
        gate[0].stride if gate else 0,
        M,
        N,
        K,
        threshold,
        scale,
        ACTIVATION=activation,
        SLICE=HIDDEN_SLICE,
        **product_options(config, align, K, a, b),
    )


def feed_forward_fwd(
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
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dropout(act(x w1^T + b1)) w2^T + b2, gated dropout(act(x w_gate^T + b_gate) * (x w1^T + b1)) w2^T + b2.

    Args:
        x: [..., E] float32, bfloat16 or float16, any strides; the others have its dtype.
        w1, w_gate: [F, E], any strides; w_gate None for a plain activation.
        b1, b_gate: None or [F].
        w2: [E_out, F], any strides.
        b2: None or [E_out].
        seed: int64 [1], read only where dropout_p > 0.
        activation: relu, gelu, gelu_tanh, silu or relu2.
        dropout_p: Probability of dropping a hidden element; what is kept is scaled by its inverse.
        save_pre: Whether backward will want pre and pre_gate.

    Returns:
        out [..., E_out], pre and pre_gate [..., F], all contiguous in x's dtype. pre is empty [0] unless
        save_pre, and pre_gate is where there is no gate either.
    """
    lead, F = x.shape[:-1], w1.shape[0]
    with on_device(x):
        rows = as_matrix(x)
        hidden = x.new_empty(rows.shape[0], F)
        pre = torch.empty_like(hidden) if save_pre else None
        pre_gate = torch.empty_like(hidden) if save_pre and w_gate is not None else None
        hidden_rows(rows, w1, b1, w_gate, b_gate, seed, activation, dropout_p, hidden, pre, pre_gate)
        (w2_operand,) = weight_operands(w2)
        out = gemm(along_columns(hidden), w2_operand, rows.shape[0], w2.shape[0], F, bias=b2)
    pre, pre_gate = (x.new_empty(0) if t is None else t.view(*lead, F) for t in (pre, pre_gate))
    return out.view(*lead, w2.shape[0]), pre, pre_gate
