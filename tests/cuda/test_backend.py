"""What the cuda backend refuses, and why; which kernels and grids the launcher would choose."""

import ctypes
import math
import re
import subprocess
from dataclasses import dataclass

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import fastformer
from fastformer import dispatch
from fastformer.backends import cuda, triton
from fastformer.specs import AttentionSpec, FeedForwardSpec, NormSpec
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

SPEC = NormSpec("layer", 1e-5)
BUILD = {"nvcc": "13.0.88", "archs": ["8.0", "9.0", "10.0", "12.0+PTX"]}


@pytest.fixture
def machine(monkeypatch):
    """Everything is there: each test takes one thing away."""
    monkeypatch.setattr(cuda, "_build", lambda: (BUILD, ""))
    monkeypatch.setattr(cuda, "_driver_major", lambda: 13)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cached = (cuda.ready, cuda._device_refusal)
    for function in cached:
        function.cache_clear()
    yield monkeypatch
    for function in cached:
        function.cache_clear()


def test_a_full_machine_is_ready(machine):
    assert cuda.ready() is None


@pytest.mark.parametrize(
    "place,name,value,reason",
    [
        (
            cuda,
            "_build",
            lambda: (None, "fastformer._C was built without CUDA: nvcc was not found"),
            "without CUDA",
        ),
        (torch.version, "cuda", None, r"torch .* is built without CUDA"),
        (
            cuda,
            "_driver_major",
            lambda: 12,
            "need a driver for CUDA 13, and the driver serves CUDA 12 at most",
        ),
        (cuda, "_driver_major", lambda: 0, "the driver is not installed"),
        (torch.cuda, "is_available", lambda: False, "sees no GPU"),
        (
            torch.cuda,
            "get_device_capability",
            lambda device: (7, 5),
            "need compute capability 8.0.* has .*7.5",
        ),
        (torch.cuda, "get_device_capability", lambda device: (11, 0), "11.0, built in are 8.0, 9.0"),
    ],
)
def test_what_is_missing_is_said(machine, place, name, value, reason):
    machine.setattr(place, name, value)
    assert re.search(reason, cuda.ready())


@pytest.mark.parametrize(
    "archs,capability,covered",
    [
        (["8.0"], (8, 9), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (9, 1), False),
        (["12.0+PTX"], (11, 0), False),
    ],
)
def test_built_architectures(archs, capability, covered):
    assert cuda._covers(archs, capability) is covered


def test_cpu_tensors_are_refused():
    x = torch.randn(2, 8)
    assert "not cpu" in cuda.why_not("norm_fwd", SPEC, (x, None, None, None, None))
    with pytest.raises(fastformer.BackendError, match="it serves CUDA tensors, not cpu"):
        fastformer.layer_norm(x, (8,), backend="cuda")


@pytest.mark.parametrize("op", ["rope_fwd"])
def test_operators_to_come_are_refused(machine, op):
    assert cuda.why_not(op, None, (torch.randn(2, 8),)) == f"it has no {op} yet"


def test_float64_is_refused(machine):
    x = OnCuda((2, 8), torch.float64)
    assert "not float64" in cuda.why_not("norm_fwd", SPEC, (x, None, None, None, None))


GPU = torch.device("cuda", 0)


@dataclass
class OnCuda:
    """As much of a CUDA tensor as a refusal asks for, without a GPU."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = GPU
    requires_grad: bool = False

    def is_floating_point(self):
        return self.dtype.is_floating_point

    def numel(self):
        return math.prod(self.shape)

    def dim(self):
        return len(self.shape)


def attention_tensors(M=40, N=40, D=64, D_v=64, **more):
    shapes = ((2, 4, M, D), (2, 2, N, D), (2, 2, N, D_v))
    return *(OnCuda(shape, **more) for shape in shapes), *(None,) * 9


@pytest.mark.parametrize(
    "given, spec, reason",
    [
        ({}, {}, None),
        ({"D": 1, "D_v": 256}, {}, None),
        ({"M": 1, "N": 100_000}, {}, None),
        ({"dtype": torch.float16}, {"left": 3, "softcap": 2.0, "dropout_p": 0.1}, None),
        ({"dtype": torch.float32}, {}, None),
        ({"D": 257}, {}, "head dims of 1 to 256, and query's is 257"),
        ({"D_v": 0}, {}, "head dims of 1 to 256, and value's is 0"),
        ({"M": 2**28, "N": 2**28}, {}, "536870912 queries and keys of a head"),
        ({}, {"return_weights": "mean"}, None),
    ],
)
def test_what_attention_refuses(machine, given, spec, reason):
    said = cuda.why_not("attention_fwd", AttentionSpec(0.1, **spec), attention_tensors(**given))
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize(
    "given, spec, capability, reason",
    [
        ({}, {}, (8, 0), None),
        ({}, {"return_weights": "mean"}, (8, 0), None),
        ({"M": 1, "N": 4096}, {}, (8, 0), None),
        ({"D": 256}, {}, (8, 0), None),
        ({"D": 128}, {}, (8, 9), None),
        ({"D_v": 136}, {}, (8, 9), "head dims over 128 take up to 145 KB of shared memory"),
        ({"dtype": torch.float32}, {"return_weights": "mean"}, (8, 9), None),
    ],
)
def test_what_gradients_of_attention_refuse(machine, given, spec, capability, reason):
    """No bias: whatever it is broadcast over."""
    machine.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tensors = list(attention_tensors(**given))
    tensors[6:8] = OnCuda((1, 4, 1, 40), requires_grad=True), OnCuda((4, 79), requires_grad=True)
    said = cuda.why_not("attention_bwd", AttentionSpec(0.1, **spec), tuple(tensors))
    assert said is None if reason is None else reason in said


def feed_forward_tensors(rows=4096, E=64, F=256, E_out=64, **more):
    shapes = (rows, E), (F, E), (F,), None, None, (E_out, F), (E_out,), None
    return tuple(shape and OnCuda(shape, **more) for shape in shapes)


@pytest.mark.parametrize(
    "given, reason",
    [
        ({}, None),
        ({"rows": 1, "E": 1, "F": 1, "E_out": 1, "dtype": torch.float16}, None),
        ({"dtype": torch.float32}, "multiplies bfloat16 and float16, not float32"),
        ({"dtype": torch.float64}, "not float64"),
        ({"rows": 2**31}, "at most 2147418112 rows"),
        ({"F": 2**31}, "at most 2147418112 rows, and such widths"),
    ],
)
@pytest.mark.parametrize("op", ("feed_forward_fwd", "feed_forward_bwd"))
def test_what_feed_forward_refuses(machine, op, given, reason):
    said = cuda.why_not(op, FeedForwardSpec("gelu"), feed_forward_tensors(**given))
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize(
    "capability, rows, first", [((8, 0), 4096, "cuda"), ((8, 0), 127, "triton"), ((9, 0), 4096, "triton")]
)
def test_feed_forward_goes_to_the_faster_kernel(machine, capability, rows, first):
    machine.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    machine.setattr(triton, "why_not", lambda op, spec, tensors: None)
    spec, tensors = FeedForwardSpec("gelu"), feed_forward_tensors(rows)
    for op in ("feed_forward_fwd", "feed_forward_bwd"):
        assert dispatch.choose(op, spec, tensors, "auto") is dispatch.BACKENDS[first]
        assert dispatch.choose(op, spec, tensors, "cuda") is cuda


@pytest.mark.parametrize("capability, first", [((8, 0), "cuda"), ((12, 0), "cuda"), ((9, 0), "triton")])
def test_attention_goes_to_the_faster_kernel(machine, capability, first):
    """Float32 comes here wherever it is served."""
    machine.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    machine.setattr(triton, "why_not", lambda op, spec, tensors: None)
    spec, tensors = AttentionSpec(0.1), attention_tensors()
    assert dispatch.choose("attention_fwd", spec, tensors, "auto") is dispatch.BACKENDS[first]
    assert dispatch.choose("attention_fwd", spec, tensors, "cuda") is cuda
    assert dispatch.choose("attention_bwd", spec, tensors, "auto") is dispatch.BACKENDS[first]
    assert not cuda.gives_way("paged_attention_fwd", tensors)
    wide = attention_tensors(dtype=torch.float32)
    assert dispatch.choose("attention_fwd", spec, wide, "auto") is cuda
    assert dispatch.choose("attention_bwd", spec, wide, "auto") is cuda
    machine.setattr(triton, "why_not", lambda op, spec, tensors: "it is not installed")
    assert dispatch.choose("attention_fwd", spec, tensors, "auto") is cuda


def test_giving_way_is_explained(machine):
    machine.setattr(dispatch, "_CONFIGURATION", {})  # fake tensors have no data pointers
    machine.setattr(triton, "why_not", lambda op, spec, tensors: None)
    with FakeTensorMode():
        query = torch.empty(2, 4, 64, 32, device="cuda", dtype=torch.bfloat16)
        explanation = fastformer.explain(fastformer.attention, query, query, query)
    assert explanation.backend == "triton"
    said = "cuda serves {} too, and gives way to triton here"
    assert explanation.notes == tuple(said.format(op) for op in ("attention_fwd", "attention_bwd"))


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
    if name != "norm_fwd_wide_kernel":
        assert plan.block_x * (16 if plan.kernel == 0 else 32) >= columns
    else:
        assert plan.block_y == 1
    size = 4 if x == 0 else 2
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
    if plans().kernel_name(plan.ds.kernel) == b"norm_bwd_kept_kernel":
        assert dtype == grad and plan.ds.block_x * 16 >= columns
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
    sms=st.integers(1, 200),
)
@hypothesis.settings(max_examples=200)
def test_products_are_covered(ptx_cache, kernel, M, N, K, gated, sms):
    """Every tile, and all of k, once."""
    gated = gated and KERNELS[kernel] == "hidden"
    rows = GemmOperand(4096, 8 * (max(M, N, K) // 8 + 1))
    p, plan = GemmParams(a=rows, b=rows, out=4096, M=M, N=N, K=K, gated=gated), GemmPlan()
    plans().plan_product(kernel, ctypes.byref(p), sms, ctypes.byref(plan))
    width = 64 if gated else 128
    assert p.tiles_m * 128 >= M > (p.tiles_m - 1) * 128 and p.tiles_n * width >= N > (p.tiles_n - 1) * width
    assert plan.grid == p.tiles_m * p.tiles_n * plan.parts and plan.threads == 128
    assert plan.parts * p.depth >= K and (K == 0 or (plan.parts - 1) * p.depth < K) and p.depth % 32 == 0
    if plan.parts > 1:
        assert "hidden" not in KERNELS[kernel]
        assert plan.grid <= 2 * sms and p.depth >= 512 - 32
    widths = {"a": M if KERNELS[kernel] == "weight_gradient" else K, "b": N if kernel > 1 else K, "c": N}
    for name, width in widths.items():
        assert getattr(p, f"aligned_{name}") == (width % 8 == 0)


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
