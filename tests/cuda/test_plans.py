"""Which kernels and grids the launchers would choose."""

import ctypes
import re
import subprocess

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tests.ptxvm import nvcc

from .emulated import NormBwdParams, NormBwdPlan, NormFwdParams, NormPlan
from .emulated_attention import (
    FEW,
    GENERAL,
    WHOLE,
    AttentionFwdParams,
    AttentionPlan,
    AttentionTile,
    HeadRows,
    ScoreMatrix,
)
from .emulated_feed_forward import (
    KERNELS,
    ColumnSumsParams,
    ColumnSumsPlan,
    GemmOperand,
    GemmParams,
    GemmPlan,
)
from .structures import CSRC, DTYPES, plans


@hypothesis.given(
    D=st.integers(1, 256),
    D_v=st.integers(1, 256),
    M=st.integers(1, 130) | st.integers(1, 5000),
    N=st.integers(0, 5000),
    group=st.sampled_from((1, 2, 3, 6)),
    major=st.sampled_from((8, 9, 10, 12)),
    multiprocessors=st.integers(1, 150),
    dtype=st.sampled_from(list(DTYPES.values())),
)
@hypothesis.settings(max_examples=200)
def test_attention_plans_cover_every_query(ptx_cache, D, D_v, M, N, group, major, multiprocessors, dtype):
    rows = HeadRows(4096, 0, 0, 256)
    sizes = {"B": 2, "H": 6, "group": group, "M": M, "N": N, "D": D, "D_v": D_v, "rows": 12 * M}
    sizes["dtype"] = dtype
    open_sides = {"left": M + N, "right": M + N}
    p = AttentionFwdParams(query=rows, key=rows, value=rows, out=rows, scale=0.1, **sizes, **open_sides)
    plan, tile = AttentionPlan(), AttentionTile()
    plans().plan_attention(ctypes.byref(p), major, multiprocessors, -1, ctypes.byref(plan))
    shared = plans().attention_tile(plan.block_d, plan.kind, dtype, ctypes.byref(tile))
    assert plan.block_d >= max(D, D_v) and plan.shared_bytes == shared <= 96 << 10
    block_m = 16 * tile.row_tiles * tile.warps
    assert (plan.kind == FEW) is (M <= 64) and p.share == (group if plan.kind == FEW else 1)
    assert p.tiles * block_m >= M * p.share > (p.tiles - 1) * block_m
    assert plan.grid == 12 // p.share * p.tiles * p.splits
    assert plan.threads == 32 * tile.warps
    assert plans().attention_is_chosen(plan.block_d, plan.kind, dtype, major)
    unaligned = D % 8 != 0 or D_v % 8 != 0
    assert (plan.kind == GENERAL) is (plan.kind != FEW and (unaligned or dtype == DTYPES[torch.float32]))
    if plan.kind == WHOLE:
        assert D == D_v == plan.block_d
    assert 1 <= p.splits <= max(1, -(-N // tile.block_n))
    if p.splits > 1:
        assert plan.kind == FEW and plan.partial_rows == p.splits * p.rows
        assert D_v <= p.partial_stride < D_v + 8 and p.partial_stride % 8 == 0
        rows_of_block = plans().attention_combine_threads() // 32
        assert plan.combine_grid * rows_of_block >= p.rows > (plan.combine_grid - 1) * rows_of_block
    else:
        assert plan.partial_rows == plan.combine_grid == 0


def test_heads_with_masks_of_their_own_have_tiles_of_their_own(ptx_cache):
    """What a mask of keys hides from one head of a group, and not from another, the group cannot skip."""
    shares = []
    for stride_h in (0, 50):
        mask = ScoreMatrix(4096, 0, 0, stride_h, 0, 1)
        p = AttentionFwdParams(key_mask=mask, B=1, H=8, group=4, M=1, N=50, D=64, D_v=64, rows=8, scale=0.1)
        plans().plan_attention(ctypes.byref(p), 8, 1, -1, ctypes.byref(AttentionPlan()))
        shares.append(p.share)
    assert shares == [4, 1]


@pytest.mark.parametrize(
    "tiles, key_blocks, resident, least, most",
    [
        (8, 1024, 216, 24, 54),  # one sequence of a model with 8 key heads: the device is filled
        (1, 4000, 264, 120, 128),
        (300, 1024, 216, 1, 1),  # filled already
        (8, 1, 216, 1, 1),
        (8, 4, 216, 1, 1),  # less time than a second kernel takes
        (8, 8, 216, 2, 8),
    ],
)
def test_keys_are_divided_where_that_fills_the_device(ptx_cache, tiles, key_blocks, resident, least, most):
    sizes = (ctypes.c_int64(size) for size in (tiles, key_blocks, resident))
    assert least <= plans().attention_splits(*sizes) <= most


ROWS = st.integers(1, 100_000)
COLUMNS = st.integers(1, 20_000) | st.integers(1, 1_000_000)
OFFSET = st.sampled_from([0, 2, 4, 8, 16])
TYPE = st.integers(0, 2)


def threads_of(plan):
    threads = plan.block_x * plan.block_y
    assert 0 < threads <= 512 and threads % 32 == 0
    assert plan.block_x >= 32 or 32 % plan.block_x == 0, "a shuffle would mix rows"
    assert plan.block_x <= 32 or plan.block_x % 32 == 0, "a warp would hold two rows"
    return threads


@hypothesis.given(rows=ROWS, columns=COLUMNS, x=TYPE, residual=TYPE, offset=OFFSET, stride=st.integers(0, 9))
@hypothesis.settings(max_examples=200)
def test_forward_plans_cover_every_column(ptx_cache, rows, columns, x, residual, offset, stride):
    p = NormFwdParams(x=4096 + offset, residual=8192, out=4096, rows=rows, columns=columns)
    p.x_dtype, p.residual_dtype, p.x_stride, p.residual_stride = x, residual, columns + stride, columns
    plan = NormPlan()
    plans().plan_fwd(ctypes.byref(p), ctypes.byref(plan))
    name = plans().kernel_name(plan.kernel).decode()
    threads_of(plan)
    assert plan.grid_x * plan.block_y >= rows > (plan.grid_x - 1) * plan.block_y
    if name == "norm_fwd_wide_kernel":
        assert plan.block_y == 1
    else:
        assert plan.block_x * (plan.thread_columns or 32) >= columns
    size = 4 if x == 0 else 2
    assert (plan.thread_columns > 0) == (name == "norm_fwd_kept_kernel")
    if name == "norm_fwd_kept_kernel":
        assert x == residual and (columns * size) % 16 == 0
        assert offset % 16 == 0 and (stride * size) % 16 == 0
    if p.vector:
        assert columns % 4 == 0 and offset % (4 * size) == 0 and (columns + stride) % 4 == 0


@hypothesis.given(rows=ROWS, columns=COLUMNS, dtype=TYPE, grad=TYPE, offset=OFFSET, sms=st.integers(1, 200))
@hypothesis.settings(max_examples=200)
def test_backward_plans_cover_every_column(ptx_cache, rows, columns, dtype, grad, offset, sms):
    p = NormBwdParams(grad_out=4096 + offset, s=8192, rows=rows, columns=columns)
    p.grad_out_dtype, p.s_dtype, p.grad_out_stride, p.s_stride = grad, dtype, columns, columns
    plan = NormBwdPlan()
    plans().plan_bwd(ctypes.byref(p), sms, True, ctypes.byref(plan))
    threads_of(plan.ds)
    assert p.partial_stride >= columns and p.partial_stride % 8 == 0
    name = plans().kernel_name(plan.ds.kernel).decode()
    if "kept" in name:
        wide = "wide" in name
        assert wide == (columns > 8192) and not (wide and dtype == 0)
        assert dtype == grad and plan.ds.block_x * (32 if wide else 16) >= columns
        assert p.partial_rows == plan.ds.grid_x and plan.columns.grid_x == 0
    else:
        threads_of(plan.columns)
        assert plan.columns.grid_x * plan.columns.block_x * 4 >= columns
        assert p.partial_rows == plan.columns.grid_y
    assert p.partial_rows * 2 * p.partial_stride * 4 < 2**28, "the shares should fit the L2"
    assert 1 <= plan.reduce.block_y <= 16 and plan.reduce.grid_x * 32 >= columns


SIZE = st.integers(1, 300) | st.integers(1, 100_000)


@hypothesis.given(
    kernel=st.integers(0, 4),
    M=SIZE,
    N=SIZE,
    K=st.just(0) | SIZE,
    gated=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    sms=st.integers(1, 200),
)
@hypothesis.settings(max_examples=200)
def test_products_are_covered(ptx_cache, kernel, M, N, K, gated, dtype, sms):
    """Every tile, and all of k, once."""
    gated = gated and KERNELS[kernel] == "hidden"
    rows = GemmOperand(4096, 8 * (max(M, N, K) // 8 + 1))
    p = GemmParams(a=rows, b=rows, out=4096, M=M, N=N, K=K, gated=gated, dtype=DTYPES[dtype])
    plan, step = GemmPlan(), 64 // dtype.itemsize
    plans().plan_product(kernel, ctypes.byref(p), sms, ctypes.byref(plan))
    width = 64 if gated else 128
    assert p.tiles_m * 128 >= M > (p.tiles_m - 1) * 128 and p.tiles_n * width >= N > (p.tiles_n - 1) * width
    assert plan.grid == p.tiles_m * p.tiles_n * plan.parts and plan.threads == 128
    assert plan.parts * p.depth >= K and (K == 0 or (plan.parts - 1) * p.depth < K) and p.depth % step == 0
    if plan.parts > 1:
        assert "hidden" not in KERNELS[kernel]
        assert plan.grid <= 2 * sms and p.depth >= 512 - step
    unit = 16 // dtype.itemsize
    assert p.aligned_a == ((M if KERNELS[kernel] == "weight_gradient" else K) % unit == 0)
    assert p.aligned_b == ((N if kernel > 1 else K) % unit == 0)
    assert p.aligned_c == (N % (2 if dtype == torch.float32 else unit) == 0)


@hypothesis.given(rows=st.just(0) | SIZE, columns=SIZE)
@hypothesis.settings(max_examples=200)
def test_sums_of_columns_take_every_row_once(ptx_cache, rows, columns):
    p, plan = ColumnSumsParams(rows=rows, columns=columns), ColumnSumsPlan()
    plans().plan_sums(ctypes.byref(p), ctypes.byref(plan))
    assert plan.grid_x * plan.block_x >= columns > (plan.grid_x - 1) * plan.block_x
    assert plan.grid_y * p.depth >= rows and (rows == 0 or (plan.grid_y - 1) * p.depth < rows)
    assert plan.block_x * plan.block_y == 256 and plan.block_y in (1, 8)
    again = ColumnSumsParams(rows=plan.grid_y, columns=columns)
    plans().plan_sums(ctypes.byref(again), ctypes.byref(plan))
    assert plan.grid_y == 1, "two stages are enough"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "86", "89", "90", "100", "120"])
def test_nothing_spills(arch, tmp_path):
    compiler = nvcc.find_nvcc()
    if compiler is None:
        pytest.skip("nvcc was not found")
    command = [compiler, "-std=c++20", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", f"-I{CSRC}"]
    command += [str(CSRC / "cuda" / "launch_norm.cu"), "-o", str(tmp_path / "norm.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert len(spills) >= 14
    assert set(spills) == {("0", "0")}
