"""Products of matrices: what every kernel with a product shares, and the product without an epilogue.

c[m, n] is the sum over k of a[m, k] b[n, k]. An operand is a pointer, a stride and a flag: its elements are
contiguous along k (what x and a Linear's weight are to x w^T) or along m or n, and the stride is that of the
other dimension. Results are contiguous.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .column_sums import column_sums
from .configs import GEMM_GROUP, GemmConfig, gemm_config
from .launch import MULTIPLY_ADDS, arch, ceil_div, contiguous, sm_count
from .tiles import aligned

# One compilation serves every shape: ALIGN says all that is worth knowing of a size.
_SIZES = ["M", "N", "K", "stride_a", "stride_b", "stride_a2", "stride_b2", "steps", "threshold"]
gemm_kernel = triton.jit(do_not_specialize=_SIZES)
# Products that are added up one by one in float32: errors grow with the longer of the two sums. (With 256 the
# sums of 300 products were too far from right on an H100, 1.15 times what is allowed.)
_CHUNK = tl.constexpr(128)


@triton.jit
def tile_place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of a tile of c [M, N].

    Tiles are counted down columns of GROUP tiles and then to the right, so that the programs that run at one
    time read few rows of a and of b: those stay in L2.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    return (first + within % rows) * BLOCK_M, within // rows * BLOCK_N


@triton.jit
def _operand(
    ptr, stride, start, extent, k,
    BY_K: tl.constexpr, K_AXIS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pointers to BLOCK rows of an operand and BLOCK_K columns of k, which is axis K_AXIS; which of the rows
    there are; and the distance to the next columns. Rows past the end read the last: no result shows it."""
    offs = start + tl.arange(0, BLOCK)
    offs_k = k + tl.arange(0, BLOCK_K)
    in_rows = tl.expand_dims(offs < extent, K_AXIS)
    if BY_K:
        offs = tl.expand_dims(tl.minimum(offs, extent - 1).to(tl.int64), K_AXIS) * stride
        return ptr + offs + tl.expand_dims(offs_k, 1 - K_AXIS), in_rows, BLOCK_K
    else:
        offs_k = tl.expand_dims(offs_k.to(tl.int64), 1 - K_AXIS) * stride
        return ptr + offs_k + tl.expand_dims(offs, K_AXIS), in_rows, stride.to(tl.int64) * BLOCK_K


@triton.jit
def _load(ptrs, in_rows, in_k, BY_K: tl.constexpr, EVEN_K: tl.constexpr):
    """A tile of an operand; zeros past K."""
    if BY_K:
        return tl.load(ptrs) if EVEN_K else tl.load(ptrs, mask=in_k, other=0.0)
    else:
        return tl.load(ptrs, mask=in_rows if EVEN_K else in_rows & in_k, other=0.0)


@triton.jit
def _accumulate(
    acc, acc2, a_ptr, b_ptr, b2_ptr, stride_a, stride_b, stride_b2, m, n, M, N, k, K,
    A_BY_K: tl.constexpr, B_BY_K: tl.constexpr, ALIGN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + a b^T and, where b2_ptr is not None, acc2 + a b2^T: [BLOCK_M, BLOCK_N] float32 from row m and
    column n on, over k .. K - 1. EVEN_K: BLOCK_K divides K - k."""
    N = aligned(N, ALIGN) if not B_BY_K else N
    M = aligned(M, ALIGN) if not A_BY_K else M
    K = aligned(K, ALIGN) if A_BY_K or B_BY_K else K
    stride_b = aligned(stride_b, ALIGN)
    a_ptrs, in_m, a_step = _operand(a_ptr, aligned(stride_a, ALIGN), m, M, k, A_BY_K, 1, BLOCK_M, BLOCK_K)
    b_ptrs, in_n, b_step = _operand(b_ptr, stride_b, n, N, k, B_BY_K, 0, BLOCK_N, BLOCK_K)
    if b2_ptr is not None:
        stride_b2 = aligned(stride_b2, ALIGN)
        b2_ptrs, _, b2_step = _operand(b2_ptr, stride_b2, n, N, k, B_BY_K, 0, BLOCK_N, BLOCK_K)
    for start in range(k, K, BLOCK_K):
        in_k = start + tl.arange(0, BLOCK_K) < K
        a = _load(a_ptrs, in_m, in_k[None, :], A_BY_K, EVEN_K)  # [BLOCK_M, BLOCK_K]
        b = _load(b_ptrs, in_n, in_k[:, None], B_BY_K, EVEN_K)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += a_step
        b_ptrs += b_step
        if b2_ptr is not None:
            b2 = _load(b2_ptrs, in_n, in_k[:, None], B_BY_K, EVEN_K)
            acc2 = tl.dot(a, b2, acc2, input_precision="ieee")
            b2_ptrs += b2_step
    return acc, acc2


@triton.jit
def product(
    acc, acc2, a_ptr, b_ptr, b2_ptr, stride_a, stride_b, stride_b2, m, n, M, N, k, K,
    A_BY_K: tl.constexpr, B_BY_K: tl.constexpr, ALIGN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As _accumulate. Float32 is summed in chunks: a sum of thousands one by one would lose more digits than
    the libraries' products do. Of 16-bit operands the result's rounding hides that."""
    if a_ptr.dtype.element_ty == tl.float32:
        for chunk in range(k, K, _CHUNK):
            zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            part, part2 = _accumulate(
                zero, zero, a_ptr, b_ptr, b2_ptr, stride_a, stride_b, stride_b2, m, n, M, N,
                chunk, tl.minimum(chunk + _CHUNK, K), A_BY_K, B_BY_K, ALIGN, EVEN_K,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            acc += part
            if b2_ptr is not None:
                acc2 += part2
    else:
        acc, acc2 = _accumulate(
            acc, acc2, a_ptr, b_ptr, b2_ptr, stride_a, stride_b, stride_b2, m, n, M, N, k, K,
            A_BY_K, B_BY_K, ALIGN, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return acc, acc2


@triton.jit
def column_slice(tile, INDEX: tl.constexpr, WIDTH: tl.constexpr):
    """Columns INDEX * WIDTH .. of a tile. Activations go slice by slice: what they hold besides the sums does
    not fit the registers for a whole tile."""
    if tile.shape[1] == WIDTH:
        return tile
    else:
        low, high = tile.reshape([tile.shape[0], 2, tile.shape[1] // 2]).permute(0, 2, 1).split()
        PER_HALF: tl.constexpr = tile.shape[1] // 2 // WIDTH
        if INDEX < PER_HALF:
            return column_slice(low, INDEX, WIDTH)
        else:
            return column_slice(high, INDEX - PER_HALF, WIDTH)


@triton.jit
def load_vector(ptr, cols, C):
    """A [C] vector in float32, [1, BLOCK_N]; zeros past C."""
    return tl.load(ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_result(ptr, m, n, M, N, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of a contiguous [M, N] matrix in float32; zeros outside."""
    N = aligned(N, ALIGN)
    row, col = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    mask = (row < M)[:, None] & (col < N)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * N + col[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_result(ptr, values, m, n, M, N, ALIGN: tl.constexpr):
    """Round a float32 tile to the dtype of a contiguous [M, N] matrix, and write it."""
    N = aligned(N, ALIGN)
    row, col = m + tl.arange(0, values.shape[0]), n + tl.arange(0, values.shape[1])
    mask = (row < M)[:, None] & (col < N)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * N + col[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@gemm_kernel
def _gemm_kernel(
    a_ptr,  # [M, K], or [K, M]
    b_ptr,  # [N, K], or [K, N]
    a2_ptr,  # None, or another such pair
    b2_ptr,
    bias_ptr,  # None or [N]
    out_ptr,  # [M, N]; of more than one part float32 [parts, M, N]
    stride_a, stride_b, stride_a2, stride_b2, M, N, K, steps,
    A_BY_K: tl.constexpr, B_BY_K: tl.constexpr, ALIGN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = a b^T + a2 b2^T + bias. Programs take turns at the tiles of all parts of K, each of which is
    `steps` times BLOCK_K long."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    depth = steps * BLOCK_K
    parts = tl.maximum(tl.cdiv(K, depth), 1)
    for item in range(tl.program_id(0), tiles * parts, tl.num_programs(0)):
        part = item // tiles
        m, n = tile_place(item % tiles, M, N, BLOCK_M, BLOCK_N, GROUP)
        k, end = part * depth, tl.minimum((part + 1) * depth, K)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc, _ = product(
            acc, acc, a_ptr, b_ptr, None, stride_a, stride_b, 0, m, n, M, N, k, end,
            A_BY_K, B_BY_K, ALIGN, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if a2_ptr is not None:
            acc, _ = product(
                acc, acc, a2_ptr, b2_ptr, None, stride_a2, stride_b2, 0, m, n, M, N, k, end,
                A_BY_K, B_BY_K, ALIGN, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if bias_ptr is not None:
            acc += load_vector(bias_ptr, n + tl.arange(0, BLOCK_N), N if part == 0 else 0)
        store_result(out_ptr + part.to(tl.int64) * M * N, acc, m, n, M, N, ALIGN)


class Operand(NamedTuple):
    """A matrix as a kernel reads it."""

    tensor: torch.Tensor
    stride: int
    by_k: bool  # elements along k lie next to each other


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """[..., C] as [rows, C] with contiguous columns; copied only where the strides leave no other way."""
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def along_columns(matrix: torch.Tensor) -> Operand:
    """[M, K] with contiguous columns, which are k."""
    return Operand(matrix, matrix.stride(0), True)


def along_rows(matrix: torch.Tensor) -> Operand:
    """[K, M] with contiguous columns; its rows are k."""
    return Operand(matrix, matrix.stride(0), False)


def weight_operands(*weights: torch.Tensor, backward: bool = False) -> list[Operand]:
    """Linears' weights [N, K] as b of x w^T, or in `backward` of grad w, where k is N; all laid out alike.

    They are read as they lie, transposed ones too.
    """
    if all(weight.stride(0) == 1 and weight.stride(1) != 1 for weight in weights):
        return [Operand(weight, weight.stride(1), backward) for weight in weights]
    matrices = [as_matrix(weight) for weight in weights]
    return [Operand(matrix, matrix.stride(0), not backward) for matrix in matrices]


def alignment(M: int, N: int, K: int, a: Operand, b: Operand, *others: Operand) -> int:
    """What divides the offsets of all rows, in elements, up to 16 bytes; `others` lie as a or b do."""
    along = [N, a.stride, b.stride, *(operand.stride for operand in others)]
    # Sizes along which elements are contiguous.
    if a.by_k or b.by_k:
        along.append(K)
    if not a.by_k:
        along.append(M)
    return math.gcd(*along, 16 // a.tensor.element_size())


def product_options(config: GemmConfig, align: int, K: int, a: Operand, b: Operand) -> dict[str, Any]:
    """What kernels with a product take at compile time."""
    return {
        "A_BY_K": a.by_k,
        "B_BY_K": b.by_k,
        "ALIGN": align,
        "EVEN_K": K % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": GEMM_GROUP,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **MULTIPLY_ADDS,
    }


def tile_count(config: GemmConfig, M: int, N: int) -> int:
    return ceil_div(M, config.block_m) * ceil_div(N, config.block_n)


def programs(config: GemmConfig, items: int, device: torch.device) -> tuple[int]:
    """The grid of a kernel whose programs take turns at `items`."""
    return (min(items, sm_count(device) * config.programs_per_sm),)


def gemm_tile(
    device: torch.device, M: int, N: int, K: int, a: Operand, b: Operand, *others: Operand
) -> tuple[GemmConfig, int, int]:
    """The tile of `gemm` on a device, into how many parts it divides K, and `alignment`."""
    align = alignment(M, N, K, a, b, *others)
    size = a.tensor.element_size()
    return *gemm_config(arch(device), "plain", size, align, M, N, K, sm_count(device)), align


def gemm(
    a: Operand,
    b: Operand,
    M: int,
    N: int,
    K: int,
    bias: torch.Tensor | None = None,
    second: tuple[Operand, Operand] | None = None,
) -> torch.Tensor:
    """a b^T + bias [M, N] in a's dtype, plus the product of a second pair that is laid out like the first.

    Where that leaves multiprocessors idle, K is divided among more programs, and their float32 sums are added
    in order.
    """
    device, dtype = a.tensor.device, a.tensor.dtype
    if M == 0 or N == 0:
        return a.tensor.new_empty(M, N)
    config, parts, align = gemm_tile(device, M, N, K, a, b, *(second or ()))
    steps = max(1, ceil_div(K, config.block_k * parts))
    parts = max(1, ceil_div(K, config.block_k * steps))
    out = a.tensor.new_empty((parts, M, N), dtype=dtype if parts == 1 else torch.float32)
    a2, b2 = second or (None, None)
    _gemm_kernel[programs(config, tile_count(config, M, N) * parts, device)](
        a.tensor,
        b.tensor,
        a2.tensor if a2 else None,
        b2.tensor if b2 else None,
        contiguous(bias),
        out,
        a.stride,
        b.stride,
        a2.stride if a2 else 0,
        b2.stride if b2 else 0,
        M,
        N,
        K,
        steps,
        **product_options(config, align, K, a, b),
    )
    return out[0] if parts == 1 else column_sums(out.view(parts, M * N), dtype).view(M, N)
