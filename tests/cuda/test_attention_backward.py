"""CUDA attention's gradients, run from PTX: right for every argument, width, type and layout."""

import ctypes
import itertools
import re

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fastformer
from fastformer.testing import attention_inputs, outputs_and_gradients
from tests import ptxvm
from tests.ops.attention_cases import CASES, PACKED, Draw, call, kernels_serve, packed_call
from tests.ops.attention_draws import calls, sets_of_features
from tests.ops.attention_judge import judge_attention
from tests.ops.dropout_calls import dropout_of
from tests.ops.judging import assert_same_bits
from tests.ptxvm import nvcc

from .emulated_attention_backward import A100, ADA, AttentionBwdParams, AttentionBwdPlan
from .structures import CSRC, DTYPES, plans

pytestmark = pytest.mark.usefixtures("gradient_emulator")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TYPES = BF16, F16, F32


def judge_here(inputs, **how):
    judge_attention(inputs, backend="cuda", **how)


def some_inputs(D, dtype=BF16, M=140, N=300, **more):
    """Tiles of queries and keys, full and ragged."""
    inputs = attention_inputs(1, 2, M, N, D, H_kv=1, dtype=dtype, requires_grad=True)
    return inputs | {"return_lse": True} | more


@pytest.mark.parametrize(
    "D, M, N, span",
    [(64, 140, 300, {"causal": "lower_right"}), (128, 200, 200, {"window": (170, 30)})],
    ids=("causal", "window"),
)
def test_full_and_edge_blocks(D, M, N, span):
    judge_here(some_inputs(D, M=M, N=N, **span))


@pytest.mark.parametrize("D", (64, *(pytest.param(D, marks=pytest.mark.slow) for D in (33, 128, 250))))
def test_float32(D):
    judge_here(some_inputs(D, F32, M=40, N=70, causal="lower_right"))


def test_one_key_weighs_one():
    """Of float32 to the last place: torch's gradient of value is then exact."""
    judge_here(call("window (0, 0)", F32, return_lse=True))


@pytest.mark.parametrize(
    "M, D, most",
    ((512, 32, A100), *(pytest.param(256, 256, most, marks=pytest.mark.slow) for most in (A100, ADA))),
)
def test_long_sums_of_float32(gradient_emulator, M, D, most):
    """Of one sign, lse's gradient included, so that what tensor cores cut off would add up."""
    gradient_emulator.most_shared = most
    inputs = attention_inputs(1, 1, M, 32, D, dtype=F32)
    positive = {name: tensor.abs().requires_grad_() for name, tensor in inputs.items()}
    grads = torch.ones(1, 1, M, D), torch.full((1, 1, M), 100.0)
    judge_here(positive | {"return_lse": True}, grad_outputs=grads)


SPANS = ({}, {"causal": "lower_right"}, {"window": (90, 40)}, {"key_lengths": torch.tensor([270])})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("D", (64, 128, 256, 32, 80, 96, 176))
@pytest.mark.parametrize("span", SPANS, ids=("all", "causal", "window", "lengths"))
def test_full_and_edge_blocks_of_every_width(span, D, dtype):
    judge_here(some_inputs(D, dtype, **span))


@pytest.mark.parametrize("name", ("everything", "lengths and causal", "bias"))
def test_some_cases(name):
    judge_here(call(name, BF16, return_lse=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case(name, dtype):
    inputs = call(name, dtype, return_lse=True)
    if kernels_serve(inputs):
        judge_here(inputs)


@pytest.mark.parametrize(
    "name", [name if name == "lower right" else pytest.param(name, marks=pytest.mark.slow) for name in PACKED]
)
@pytest.mark.parametrize("dtype", (BF16, pytest.param(F32, marks=pytest.mark.slow)), ids=str)
def test_packed(name, dtype):
    inputs, longest = packed_call(name, dtype)
    judge_here(inputs, fn_only=longest)


@pytest.mark.parametrize("D", (64, pytest.param(20, marks=pytest.mark.slow)))
@pytest.mark.parametrize(
    "layout",
    (
        "unaligned",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("transposed", "sliced", "broadcast")),
    ),
)
def test_layouts(layout, D):
    judge_here(attention_inputs(1, 2, 70, 150, D, dtype=BF16, layout=layout, requires_grad=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ("unaligned", "transposed"))
def test_layouts_of_float32(layout):
    """Rows of D_v are whole units of four, and not of eight."""
    judge_here(attention_inputs(1, 2, 40, 70, 36, D_v=44, dtype=F32, layout=layout, requires_grad=True))


def judge_dropout(D, dtype, M=70, N=140):
    inputs = attention_inputs(1, 2, M, N, D, dtype=dtype, requires_grad=True)
    fn_only, plain_only = dropout_of(0.3, 1, 2, M, N)
    judge_here(inputs, fn_only=fn_only, plain_only=plain_only)


@pytest.mark.parametrize(
    "dtype", (F16, *(pytest.param(t, marks=pytest.mark.slow) for t in (BF16, F32))), ids=str
)
def test_dropout(dtype):
    judge_dropout(32, dtype)


@pytest.mark.parametrize("dtype", (pytest.param(BF16, marks=pytest.mark.slow), F32), ids=str)
def test_dropout_of_wide_heads_in_little_shared_memory(gradient_emulator, dtype):
    gradient_emulator.most_shared = ADA
    judge_dropout(140, dtype, M=20, N=70)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
@pytest.mark.parametrize("more", ({"causal": "lower_right"}, {"dropout_p": 0.4, "seed": 7}), ids=str)
def test_twice_the_same_bits(more, dtype):
    first, second = (
        outputs_and_gradients(fastformer.attention, **some_inputs(64, dtype, **more), backend="cuda")
        for _ in range(2)
    )
    assert_same_bits(first, second)


SLOW = ((128, BF16), (40, F32), (128, F32))


@pytest.mark.parametrize(
    "D, dtype", ((40, BF16), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW))
)
def test_hidden_keys_may_hold_anything(D, dtype):
    """Past the lengths, between real keys, behind a mask of keys: not a bit of any gradient changes."""
    hide = Draw(BF16).bools(1, 200)
    for more, hidden in (
        ({"key_lengths": torch.tensor([130])}, torch.arange(200) >= 130),
        ({"key_padding_mask": hide}, ~hide[0]),
        ({"mask": hide[:, None, None]}, ~hide[0]),
    ):
        clean = some_inputs(D, dtype, M=20, N=200, **more)
        dirty = clean | {name: clean[name].detach().clone() for name in ("key", "value")}
        dirty["key"][..., hidden, :] = torch.inf
        dirty["value"][..., hidden, :] = torch.nan
        dirty |= {name: dirty[name].requires_grad_() for name in ("key", "value")}
        first, second = (
            outputs_and_gradients(fastformer.attention, **inputs, backend="cuda") for inputs in (clean, dirty)
        )
        assert_same_bits(first, second)


def launched(emulator, name):
    return [counters for kernel, counters in emulator.launched if name in kernel]


def test_traffic(gradient_emulator):
    """One block of keys over two tiles of queries reads and writes everything once, in whole sectors and
    without bank conflicts; beside dQ's float32 sums, which begin as zeros that all warps share, and pivots,
    which each warp reads."""
    inputs = attention_inputs(1, 1, 128, 128, 128, dtype=BF16, requires_grad=True)
    fastformer.attention(**inputs, backend="cuda").sum().backward()
    (counters,) = launched(gradient_emulator, "keys")
    rows, pivots = 128 * 128 * 2, 128 * 4 * 4 * 8
    assert counters.bank_conflicts == 0
    assert 6 * rows + pivots <= counters.global_load_bytes <= 1.02 * (6 * rows + pivots)
    assert 4 * rows <= counters.global_store_bytes <= 1.01 * 4 * rows
    assert counters.load_efficiency > 0.95 and counters.store_efficiency > 0.95
    (counters,) = launched(gradient_emulator, "queries")
    assert rows == counters.global_store_bytes == 32 * counters.global_store_sectors


@pytest.mark.parametrize("schedule", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_warps_in_any_order(gradient_emulator, schedule):
    gradient_emulator.checks = ptxvm.Checks(schedule_seed=schedule)
    judge_here(some_inputs(64, M=100, N=150, causal="lower_right"))


@pytest.mark.slow
@pytest.mark.parametrize("D", (64, 128, 200))
def test_warps_in_any_order_of_float32(gradient_emulator, D):
    gradient_emulator.checks = ptxvm.Checks(schedule_seed=D)
    judge_here(some_inputs(D, F32, M=100, N=150, causal="lower_right"))


def test_traffic_of_float32(gradient_emulator):
    """As test_traffic."""
    inputs = attention_inputs(1, 1, 64, 64, 64, dtype=F32, requires_grad=True)
    fastformer.attention(**inputs, backend="cuda").sum().backward()
    (counters,) = launched(gradient_emulator, "keys")
    rows = 64 * 64 * 4
    assert counters.bank_conflicts == 0
    assert 5 * rows <= counters.global_load_bytes <= 1.1 * 5 * rows, "with zeros, and pivots beside them"
    assert 3 * rows <= counters.global_store_bytes <= 1.01 * 3 * rows
    assert counters.store_efficiency > 0.95
    (counters,) = launched(gradient_emulator, "queries")
    assert rows == counters.global_store_bytes == 32 * counters.global_store_sectors


@pytest.mark.parametrize(
    "D, dtype",
    [
        (200, BF16),
        (200, F32),
        *(pytest.param(D, dtype, marks=pytest.mark.slow) for D in (64, 128) for dtype in (BF16, F32)),
        *(pytest.param(256, dtype, marks=pytest.mark.slow) for dtype in (F16, F32)),
    ],
)
def test_little_shared_memory(gradient_emulator, D, dtype):
    gradient_emulator.most_shared = ADA
    size = {"M": 40, "N": 70} if dtype is F32 else {}
    judge_here(some_inputs(D, dtype, **size, causal="lower_right"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
@pytest.mark.parametrize(
    "name, packed", [*((name, False) for name in CASES), *((name, True) for name in PACKED)]
)
def test_wide_heads_in_little_shared_memory(gradient_emulator, name, packed, dtype):
    """Every case, its values widened by columns of zeros."""
    gradient_emulator.most_shared = ADA
    inputs, longest = packed_call(name, dtype) if packed else (call(name, dtype, return_lse=True), None)
    value = inputs["value"].detach()
    wide = torch.nn.functional.pad(value, (0, max(136 - value.shape[-1], 0))).requires_grad_()
    if kernels_serve(inputs):
        judge_here(inputs | {"value": wide}, fn_only=longest)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
@pytest.mark.parametrize("arch", ("90", "100", "120"))
def test_other_targets(gradient_emulator, arch, dtype):
    gradient_emulator.arch = arch
    if arch == "120":
        gradient_emulator.most_shared = ADA
    for D in (128, 200):
        judge_here(some_inputs(D, dtype, causal="lower_right"))
    judge_here(call("everything", dtype))


@hypothesis.given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    D=st.sampled_from((64, 128, 256)),
    most=st.sampled_from((A100, ADA)),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_packed_tiles_have_slots_of_their_own(ptx_cache, lengths, D, most, dtype):
    """As slot_of_tile counts them: none is shared, and the plan's number is enough."""
    p, plan = AttentionBwdParams(), AttentionBwdPlan()
    p.call.B, p.call.H, p.call.group, p.call.D, p.call.D_v = len(lengths), 1, 1, D, D
    p.call.M = p.call.N = max(lengths)
    p.call.starts_q, p.call.dtype = 1, dtype
    total = sum(lengths)
    sizes = ctypes.c_int64(total), ctypes.c_int64(most)
    plans().plan_attention_backward(ctypes.byref(p), *sizes, ctypes.byref(plan))
    assert plan.block_d == D and plan.shared_bytes + 1024 <= most
    starts = itertools.accumulate(lengths, initial=0)
    taken = [
        start // plan.block_m + b + tile
        for b, (start, length) in enumerate(zip(starts, lengths, strict=False))
        for tile in range(-(-length // plan.block_m))
    ]
    assert len(set(taken)) == len(taken) and max(taken, default=0) < p.slots
    assert plan.rows == p.slots * plan.block_m


@pytest.mark.parametrize("D, least", ((64, 97), (128, 73), (256, 69)))
def test_what_fits_no_chip_is_told(ptx_cache, D, least):
    """Float32 takes `least` KB, of which 1 beside its tiles; where there is less the plan has no width."""
    for kilobytes, planned in ((least, D), (least - 1, 0)):
        p, plan = AttentionBwdParams(), AttentionBwdPlan()
        p.call.B, p.call.H, p.call.group, p.call.M, p.call.N = 1, 1, 1, 40, 40
        p.call.D, p.call.D_v, p.call.dtype = D, D, DTYPES[F32]
        sizes = ctypes.c_int64(0), ctypes.c_int64(kilobytes * 1024)
        plans().plan_attention_backward(ctypes.byref(p), *sizes, ctypes.byref(plan))
        assert plan.block_d == planned


@pytest.mark.slow
def test_every_instantiation_runs(gradient_emulator):
    for D, dtype, most in itertools.product((63, 64, 127, 128, 200), TYPES, (A100, ADA)):
        if most == ADA and D < 200:
            continue
        gradient_emulator.most_shared = most
        judge_here(some_inputs(D, dtype, M=70, N=170, window=(100, 90)) | {"sink": Draw(dtype).floats(2)})
    folders = f"-I{CSRC}", f"-I{CSRC / 'cuda'}"
    text = nvcc.compile_text(CSRC / "cuda" / "launch_attention_bwd.cu", "80", *folders)
    ran = {name for name, _ in gradient_emulator.launched if "bwd" in name}
    assert ran == set(re.findall(r"\.entry (\w+)\(", text))


@pytest.mark.slow
def test_any_call():
    @hypothesis.given(st.data(), sets_of_features(), st.sampled_from(TYPES))
    @hypothesis.settings(max_examples=60, phases=(hypothesis.Phase.generate,))
    def checked(data, features, dtype):
        inputs, fn_only, plain_only = data.draw(calls(features)).inputs(dtype)
        judge_here(inputs, fn_only=fn_only, plain_only=plain_only)

    checked()
