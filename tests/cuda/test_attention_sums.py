"""CUDA's gradients that are sums over attention's scores, run from PTX: those of a broadcast bias and of
relative_bias."""

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
from tests.ops.attention_cases import PACKED, Draw, packed_call
from tests.ops.attention_draws import calls, sets_of_features, together
from tests.ops.attention_judge import judge_attention
from tests.ops.dropout_calls import dropout_of
from tests.ops.judging import assert_same_bits
from tests.ptxvm import nvcc

from .emulated_attention_sums import (
    DELTAS,
    DIAGONALS,
    MATRIX,
    ROW,
    WEIGHTS,
    AttentionSumsParams,
    AttentionSumsPlan,
)
from .structures import CSRC, plans

pytestmark = pytest.mark.usefixtures("gradient_emulator")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TYPES = BF16, F16, F32
B, H, M, N = 2, 2, 66, 90
BROADCASTS = {
    "".join(name for name, one in zip("BHMN", pattern, strict=True) if one) or "none": pattern
    for pattern in itertools.product((False, True), repeat=4)
}
FAST = ("BHM", "HN")


def judge_here(inputs, **how):
    judge_attention(inputs, backend="cuda", **how)


def some_inputs(dtype=BF16, D=24, **shape):
    """Ragged tiles of queries and of keys, and heads that share keys."""
    shape = {"B": B, "H": H, "H_kv": 1, "M": M, "N": N, **shape}
    return attention_inputs(**shape, D=D, dtype=dtype, requires_grad=True) | {"return_lse": True}


def slow_unless(fast, names):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "dtype", (BF16, *(pytest.param(t, marks=pytest.mark.slow) for t in (F16, F32))), ids=str
)
@pytest.mark.parametrize("broadcast", slow_unless(FAST, BROADCASTS))
def test_bias_of_every_broadcast_shape(broadcast, dtype):
    """A sink of much weight keeps what is constant over the keys from cancelling out of every result."""
    shape = [1 if one else size for one, size in zip(BROADCASTS[broadcast], (B, H, M, N), strict=True)]
    d = Draw(dtype)
    sink = (d.floats(H).detach() + 4).requires_grad_()
    judge_here(some_inputs(dtype) | {"bias": d.floats(*shape), "sink": sink})


MORE = {
    "causal": lambda d: {"causal": "lower_right"},
    "window and lengths": lambda d: {"window": (20, 30), "key_lengths": torch.tensor([90, 61])},
    "padding and softcap": lambda d: {"key_padding_mask": d.bools(B, N), "softcap": 3.0},
    "mask": lambda d: {"mask": d.dead_rows(B, 1, M, N)},
    "key mask": lambda d: {"mask": d.bools(1, H, 1, N), "scale": -0.4},
}


@pytest.mark.parametrize("more", slow_unless(("padding and softcap",), MORE))
def test_matrix_beside_other_arguments(more):
    d = Draw(BF16)
    judge_here(some_inputs() | {"bias": d.floats(1, H, M, N), "sink": d.floats(H)} | MORE[more](d))


@pytest.mark.parametrize("more", slow_unless(("window and lengths",), MORE))
def test_row_beside_other_arguments(more):
    d = Draw(BF16)
    judge_here(some_inputs() | {"bias": d.floats(B, 1, 1, N), "sink": d.floats(H)} | MORE[more](d))


@pytest.mark.slow
@pytest.mark.parametrize("wide", (False, True))
def test_a_bias_of_another_type(wide):
    """float32 beside 16 bits, whose gradient is float32 too; and with -inf in it."""
    d = Draw(torch.float32 if wide else F16)
    judge_here(some_inputs(F16, M=40, N=70) | {"bias": d.with_minus_inf(H, 40, 70)})


SHAPES = [
    (m, n, rows) for m, n in ((70, 130), (130, 70), (1, 1), (1, 200), (200, 1), (64, 128)) for rows in (1, H)
]


@pytest.mark.parametrize("shape", slow_unless(((70, 130, H),), SHAPES), ids=str)
def test_relative_bias(shape):
    m, n, rows = shape
    d = Draw(BF16)
    more = {"relative_bias": d.floats(rows, m + n - 1), "sink": d.floats(H)}
    judge_here(some_inputs(M=m, N=n) | more)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
@pytest.mark.parametrize("more", MORE)
def test_relative_bias_beside_other_arguments(more, dtype):
    d = Draw(dtype)
    judge_here(some_inputs(dtype) | {"relative_bias": d.floats(H, M + N - 1)} | MORE[more](d))


ONE_KEY = {
    "padding": {"key_padding_mask": torch.arange(N) == torch.tensor([[50], [3]])},
    "window": {"window": (0, 0)},
}


@pytest.mark.parametrize("name", slow_unless(("padding",), ONE_KEY))
def test_rows_that_see_one_key(name):
    """They pass no gradient through their scores but lse's."""
    d = Draw(BF16)
    more = ONE_KEY[name] | {"bias": d.floats(1, H, M, N), "relative_bias": d.floats(1, M + N - 1)}
    judge_here(some_inputs() | more)


@pytest.mark.parametrize("name", slow_unless(("cross",), PACKED))
def test_packed(name):
    """With a bias for all sequences, unless the case has its own; where there are no keys there is no sum."""
    inputs, longest = packed_call(name, BF16)
    d = Draw(BF16, seed=5)
    m, n = longest.values()
    inputs = {"bias": d.floats(1, 1, m, n), "relative_bias": d.floats(4, m + n - 1)} | inputs
    judge_here(inputs, fn_only=longest)


BIASES = {"matrix": (1, H, M, N), "row": (1, 1, 1, N)}


@pytest.mark.parametrize("name", slow_unless(("row",), BIASES))
def test_dropout(name):
    d = Draw(F16)
    fn_only, plain_only = dropout_of(0.3, B, H, M, N)
    more = {"bias": d.floats(*BIASES[name]), "relative_bias": d.floats(H, M + N - 1)}
    judge_here(some_inputs(F16) | more, fn_only=fn_only, plain_only=plain_only)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("D, D_v", ((1, 1), (64, 64), (65, 20), (128, 128), (100, 200), (256, 256)))
def test_every_width(D, D_v, dtype):
    d = Draw(dtype)
    more = {"bias": d.floats(H, M, N), "relative_bias": d.floats(1, M + N - 1)}
    judge_here(some_inputs(dtype, D, D_v=D_v) | more)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
@pytest.mark.parametrize("layout", ("unaligned", "transposed", "sliced", "broadcast"))
def test_layouts(layout, dtype):
    d = Draw(dtype)
    more = {"bias": d.floats(H, M, N), "relative_bias": d.floats(1, M + N - 1), "sink": d.floats(H)}
    judge_here(some_inputs(dtype, D=72, layout=layout) | more)


@pytest.mark.slow
def test_hidden_keys_may_hold_anything():
    """Not a bit of any gradient changes, of what is summed over heads and over queries."""
    d = Draw(BF16)
    hide = d.bools(B, N)
    more = {"relative_bias": d.floats(H, M + N - 1), "key_padding_mask": hide}
    for shape in ((B, 1, M, N), (1, 1, 1, N)):
        clean = some_inputs(H_kv=H) | more | {"bias": d.floats(*shape)}
        dirty = clean | {name: clean[name].detach().clone() for name in ("key", "value")}
        dirty["key"].transpose(1, 2)[~hide] = torch.inf
        dirty["value"].transpose(1, 2)[~hide] = torch.nan
        for name in ("key", "value"):
            dirty[name].requires_grad_()
        first, second = (
            outputs_and_gradients(fastformer.attention, **inputs, backend="cuda") for inputs in (clean, dirty)
        )
        assert_same_bits(first, second)


@pytest.mark.slow
def test_twice_the_same_bits(gradient_emulator):
    """Whatever runs first, too; and what has shares gets the same sum in another place."""
    d = Draw(BF16)
    more = {"bias": d.floats(1, 1, 1, N), "relative_bias": d.floats(1, M + N - 1)}
    first = outputs_and_gradients(fastformer.attention, **some_inputs(), **more, backend="cuda")
    gradient_emulator.checks = ptxvm.Checks(schedule_seed=1)
    second = outputs_and_gradients(fastformer.attention, **some_inputs(), **more, backend="cuda")
    assert_same_bits(first, second)


@pytest.mark.parametrize("dtype", (BF16, pytest.param(F32, marks=pytest.mark.slow)), ids=str)
def test_sums_read_no_bank_twice_in_a_loop(gradient_emulator, dtype):
    """Nor when they write: of whole tiles there is nothing to wait for. D takes chunks."""
    bias = Draw(dtype).floats(1, 1, 64, 64)
    inputs = attention_inputs(B=1, H=2, M=64, D=128, dtype=dtype, requires_grad=True)
    outputs_and_gradients(fastformer.attention, **inputs, bias=bias, backend="cuda")
    (counters,) = (counters for name, counters in gradient_emulator.launched if "attention_sums" in name)
    assert counters.bank_conflicts == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
@pytest.mark.parametrize("arch", ("90", "100", "120"))
def test_other_targets(gradient_emulator, arch, dtype):
    gradient_emulator.arch = arch
    d = Draw(dtype)
    more = {"bias": d.floats(1, H, M, N), "relative_bias": d.floats(H, M + N - 1)}
    judge_here(some_inputs(dtype, D=80) | more)


@hypothesis.given(
    shape=st.tuples(*(st.integers(1, 9),) * 2, *(st.integers(1, 3000),) * 2),
    whole=st.tuples(st.booleans(), st.booleans()),
    kind=st.sampled_from((WEIGHTS, MATRIX, ROW, DIAGONALS, DELTAS)),
)
def test_every_tile_is_a_step_of_one_block(ptx_cache, shape, whole, kind):
    p, plan = AttentionSumsParams(kind=kind), AttentionSumsPlan()
    call = p.bwd.call
    call.B, call.H, call.M, call.N = shape
    call.D = call.D_v = 64
    target_B, target_H = (
        size if kept or kind == DELTAS else 1 for size, kept in zip(shape, whole, strict=False)
    )
    plans().plan_score_sums(ctypes.byref(p), target_B, target_H, ctypes.byref(plan))
    tiles_m, tiles_n = (-(-length // 64) for length in shape[2:])
    parts = plan.grid // (p.slabs * p.tiles_m * p.tiles_n)
    assert plan.grid == parts * p.slabs * p.tiles_m * p.tiles_n
    assert 0 < p.steps - (parts - 1) * p.part_steps <= p.part_steps, "an empty part, or steps without one"
    # Along a diagonal of tiles steps may leave the matrix.
    visited = plan.grid // parts * p.steps
    assert visited >= call.B * call.H * tiles_m * tiles_n
    if kind != DIAGONALS:
        assert visited == call.B * call.H * tiles_m * tiles_n
    columns = call.M + call.N - 1 if kind == DIAGONALS else call.N
    assert p.share_stride == target_B * target_H * columns * (
        call.M if kind in (WEIGHTS, MATRIX, DELTAS) else 1
    )
    assert plan.shares == {DIAGONALS: 2 * parts}.get(kind, parts if parts > 1 else 0)
    if parts > 1:
        assert plan.grid <= 512 and 4 * plan.shares * p.share_stride <= 8 << 20


@pytest.mark.slow
def test_every_kernel_runs(gradient_emulator):
    for dtype in (BF16, F32):
        judge_here(some_inputs(dtype) | {"bias": Draw(dtype).floats(1, 1, M, N)})
    folders = f"-I{CSRC}", f"-I{CSRC / 'cuda'}"
    text = nvcc.compile_text(CSRC / "cuda" / "launch_attention_sums.cu", "80", *folders)
    ran = {name for name, _ in gradient_emulator.launched if "attention_sums" in name or "shares" in name}
    assert ran == set(re.findall(r"\.entry (\w+)\(", text))


@pytest.mark.slow
def test_any_call():
    """Of those with a bias, or with a relative one, or both."""
    with_bias = sets_of_features().flatmap(
        lambda found: st.sampled_from(({"bias"}, {"relative_bias"}, {"bias", "relative_bias"})).map(
            found.union
        )
    )

    @hypothesis.given(st.data(), with_bias.filter(together), st.sampled_from(TYPES))
    @hypothesis.settings(max_examples=60, phases=(hypothesis.Phase.generate,))
    def checked(data, features, dtype):
        inputs, fn_only, plain_only = data.draw(calls(features)).inputs(dtype)
        judge_here(inputs, fn_only=fn_only, plain_only=plain_only)

    checked()
