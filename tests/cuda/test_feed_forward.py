"""CUDA feed_forward, run from its PTX: right for every activation, size, type and layout, with gradients."""

import re

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fastformer
from fastformer.testing import feed_forward_inputs, outputs_and_gradients
from tests import ptxvm
from tests.ops import philox, plain
from tests.ops.judging import assert_same_bits, judge, without_grad
from tests.ptxvm import nvcc

from .emulated_feed_forward import FLAGS
from .structures import CSRC

pytestmark = pytest.mark.usefixtures("feed_forward_emulator")

BF16, F16, F32 = DTYPES = torch.bfloat16, torch.float16, torch.float32
ACTIVATIONS = (*plain.ACTIVATIONS, *plain.GATED_ACTIVATIONS)
SEED, P = -0x123456789ABCDEF, 0.3


def call(activation, *rows, **more):
    gated = activation in plain.GATED_ACTIVATIONS
    given = {"dtype": BF16, "requires_grad": True, **more}
    return feed_forward_inputs(*rows, gated=gated, **given) | {"activation": activation}


def judge_inputs(inputs, p=0.0, recompute=False):
    """Against the plain formula, with the decisions that philox.py says were taken."""
    fn_only, plain_only = {"recompute": recompute}, {}
    if p:
        fn_only |= {"dropout_p": p, "seed": torch.tensor([SEED])}
        shape = (*inputs["x"].shape[:-1], inputs["w1"].shape[0])
        keep = philox.feed_forward_keep(inputs["x"].shape[:-1].numel(), shape[-1], SEED, p).view(shape)
        plain_only = {"keep": keep, "keep_scale": philox.keep_scale(p)}
    functions = fastformer.feed_forward, plain.feed_forward
    judge(*functions, inputs, backend="cuda", fn_only=fn_only, plain_only=plain_only)


def judge_call(activation, *rows, p=0.0, recompute=False, **more):
    judge_inputs(call(activation, *rows, **more), p, recompute)


QUICK = [(activation, BF16) for activation in ("relu", "relu2", "silu", "geglu", "geglu_tanh")]
QUICK += [("gelu_tanh", F32), ("swiglu", F32)]


@pytest.mark.parametrize(
    "activation, dtype",
    [
        *QUICK,
        *(
            pytest.param(activation, dtype, marks=pytest.mark.slow)
            for activation in ACTIVATIONS
            for dtype in DTYPES
            if (activation, dtype) not in QUICK
        ),
    ],
)
def test_every_activation(activation, dtype):
    judge_call(activation, 9, E=24, F=40, E_out=16, dtype=dtype, p=P)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_biases_and_recomputed(dtype, activation):
    judge_call(activation, 3, 5, E=24, F=40, bias=False, dtype=dtype, recompute=True)


# Rows, E, F, E_out: one element; odd ones, of which no row is aligned; aligned ones past a tile. Then an
# operand with aligned rows beside one without, exact tiles, and more of each.
SIZES = ((1, 1, 1, 1), (7, 33, 35, 31), (130, 40, 136, 24))
MORE_SIZES = (
    (33, 40, 130, 24),
    (130, 131, 133, 137),
    (260, 264, 200, 136),
    (129, 32, 256, 128),
    (128, 64, 65, 128),
    (2, 8, 300, 3),
)


@pytest.mark.parametrize(
    "sizes", (*SIZES, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in MORE_SIZES)), ids=str
)
@pytest.mark.parametrize(
    "activation, dtype",
    [
        ("gelu", BF16),
        ("relu", F32),
        pytest.param("swiglu", BF16, marks=pytest.mark.slow),
        pytest.param("swiglu", F32, marks=pytest.mark.slow),
    ],
)
def test_sizes(activation, dtype, sizes):
    rows, E, F, E_out = sizes
    judge_call(activation, rows, E=E, F=F, E_out=E_out, dtype=dtype, p=P)


@pytest.mark.parametrize("F", (136, pytest.param(130, marks=pytest.mark.slow)))
@pytest.mark.parametrize("dtype", (BF16, pytest.param(F32, marks=pytest.mark.slow)))
def test_a_gate_past_its_tile(dtype, F):
    judge_call("swiglu", 9, E=40, F=F, E_out=24, dtype=dtype, p=P, recompute=True)


@pytest.mark.parametrize(
    "layout",
    (
        "sliced",
        *(
            pytest.param(layout, marks=pytest.mark.slow)
            for layout in ("transposed", "unaligned", "broadcast", "last_strided")
        ),
    ),
)
@pytest.mark.parametrize("dtype", (BF16, pytest.param(F32, marks=pytest.mark.slow)))
def test_layouts(dtype, layout):
    judge_call("geglu", 3, 9, E=24, F=40, layout=layout, dtype=dtype, recompute=True)


@pytest.mark.parametrize("E, dtype", ((40, BF16), (37, BF16), (36, F32), (37, F32)))
def test_rows_are_read_in_place(feed_forward_emulator, E, dtype):
    """Rows further apart than they are wide: nothing is copied, and where there are whole units of 16 bytes
    these are read."""
    inputs = without_grad(call("swiglu", 21, E=E, F=72, dtype=dtype))
    for place, name in enumerate(("x", "w1", "w_gate", "w2"), 1):
        rows, columns = inputs[name].shape
        wide = torch.full((rows, (columns + 7) // 8 * 8 + 16 * place), torch.nan, dtype=dtype)
        inputs[name] = wide[:, 8 : 8 + columns].copy_(inputs[name])
    judge_inputs(inputs)
    (_, _, hidden, _), (_, _, linear, _) = feed_forward_emulator.launched
    assert [hidden.a.data, hidden.b.data, linear.b.data] == [inputs[n].data_ptr() for n in ("x", "w1", "w2")]
    assert hidden.gate.data == inputs["w_gate"].data_ptr() and hidden.gate.stride != hidden.b.stride
    assert hidden.aligned_a == hidden.aligned_b == (E != 37) and linear.aligned_b


@pytest.mark.parametrize("rows", ((0,), (3, 0)), ids=str)
def test_no_rows(rows):
    judge_call("reglu", *rows, E=24, F=40)


@pytest.mark.parametrize("activation", (pytest.param("gelu", marks=pytest.mark.slow), "geglu"))
@pytest.mark.parametrize("empty", ("E", "F", "E_out"))
def test_no_columns(empty, activation):
    judge_call(activation, 5, **({"E": 24, "F": 40, "E_out": 16} | {empty: 0}))


@pytest.mark.parametrize("rows", ((), pytest.param((2, 3), marks=pytest.mark.slow)), ids=str)
def test_leading_dimensions(rows):
    judge_call("silu", *rows, E=24, F=40, recompute=True)


@pytest.mark.parametrize("needs", ("x", "w1", "b1", "w_gate", "b_gate", "w2", "b2"))
def test_gradient_of_one_input_alone(feed_forward_emulator, needs):
    inputs = without_grad(call("swiglu", 5, E=24, F=40))
    inputs[needs].requires_grad_()
    judge_inputs(inputs)
    backward = [name for name, *_ in feed_forward_emulator.launched[2:]]
    last = {"x": ["input_gradient"], "w1": ["weight_gradient"], "w_gate": ["weight_gradient"]}
    last |= {"w2": ["weight_gradient"], "b1": ["sums"], "b_gate": ["sums"]}
    assert backward == (["sums"] if needs == "b2" else ["hidden_gradient", *last[needs]])


@pytest.mark.parametrize("dtype", (BF16, pytest.param(F32, marks=pytest.mark.slow)))
@pytest.mark.parametrize("activation", ("relu", pytest.param("swiglu", marks=pytest.mark.slow)))
def test_parts_of_k_are_added(feed_forward_emulator, activation, dtype):
    """Of 1030 columns of k in steps of 32, or 16, the last part is shorter."""
    feed_forward_emulator.multiprocessors = 8
    inputs = call(activation, 3, E=16, F=1030, E_out=17, dtype=dtype)
    inputs |= {name: t.detach() for name, t in inputs.items() if name not in ("x", "activation")}
    judge_inputs(inputs)
    parts = [bool(params.parts) for name, _, params, _ in feed_forward_emulator.launched if name != "sums"]
    assert parts == [False, True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F32))
def test_parts_of_many_rows_are_added(feed_forward_emulator, dtype):
    """Gradients of weights, whose k is rows, and sums of columns in two stages."""
    feed_forward_emulator.multiprocessors = 8
    judge_call("gelu_tanh", 1100, E=16, F=24, E_out=17, dtype=dtype, p=P)
    names = [name for name, *_ in feed_forward_emulator.launched]
    assert names.count("sums") == 1 + 1 + 1 + 2


@pytest.mark.parametrize("p", (0.3, 1.0))
@pytest.mark.parametrize("activation, F", (("relu", 136), ("reglu", 72)))
def test_what_dropout_keeps(activation, F, p):
    """Hidden rows of ones, seen through the identity: where they are kept, and nowhere else."""
    inputs = without_grad(call(activation, 35, E=8, F=F, E_out=F))
    ones = {"x": 1.0, "w1": 0.125, "b1": 0.0, "b2": 0.0, "w_gate": 0.125, "b_gate": 0.0}
    inputs |= {name: torch.full_like(inputs[name], ones[name]) for name in inputs.keys() & ones.keys()}
    inputs["w2"] = torch.eye(F, dtype=BF16)
    out = fastformer.feed_forward(**inputs, dropout_p=p, seed=torch.tensor([SEED]), backend="cuda")
    keep = philox.feed_forward_keep(35, F, SEED, p)
    assert torch.equal(out, torch.where(keep, philox.keep_scale(p), 0.0).to(BF16))


@pytest.mark.parametrize(
    "activation, dtype",
    [("gelu", BF16), *(pytest.param("swiglu", dtype, marks=pytest.mark.slow) for dtype in (BF16, F32))],
)
def test_same_bits_twice_and_recomputed(activation, dtype):
    inputs = call(activation, 37, E=40, F=72, dtype=dtype) | {"dropout_p": P, "seed": torch.tensor([SEED])}
    first, second, again = (
        outputs_and_gradients(fastformer.feed_forward, **inputs, recompute=recompute, backend="cuda")
        for recompute in (False, False, True)
    )
    assert_same_bits(first, second)
    assert_same_bits(first, again)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", (BF16, F32))
def test_activations_far_from_zero(dtype, activation):
    inputs = call(activation, 9, dtype=dtype)
    inputs["x"] = (inputs["x"].detach() * 60).requires_grad_()
    judge_inputs(inputs)


@pytest.mark.parametrize(
    "bad, dtype",
    [
        (torch.nan, BF16),
        (torch.inf, F32),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((torch.inf, BF16), (torch.nan, F32))),
    ],
)
def test_nonfinite_values_stay_in_their_row(bad, dtype):
    inputs = without_grad(call("gelu", 40, dtype=dtype))
    clean = fastformer.feed_forward(**inputs, backend="cuda")
    inputs["x"][39, 3] = bad
    judge_inputs(inputs)
    dirty = fastformer.feed_forward(**inputs, backend="cuda")
    assert torch.equal(clean[:39], dirty[:39]) and not dirty[39].isfinite().all()


@pytest.mark.parametrize(
    "name", ("w_gate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("x", "w1", "w2")))
)
def test_infinities_of_float32_in_every_product(name):
    """What the parts of a product make of them is NaN everywhere. Products of two infinities too, differences
    of two, and products with a number whose second part is zero."""
    inputs = call("reglu", 21, E=24, F=40, E_out=16, dtype=F32)
    with torch.no_grad():
        inputs[name][3, 5] = inputs["x"][4, -1] = torch.inf
        inputs[name][6, 5] = inputs[name][6, 8] = -torch.inf
        inputs["x"][:, 9] = 1.0
    judge_inputs(inputs)


def test_the_largest_float32():
    """The nearest number that tensor cores take is infinite."""
    inputs = without_grad(call("relu", 3, E=24, F=40, E_out=16, dtype=F32))
    inputs["x"][1, 2] = torch.finfo(F32).max
    inputs["w1"][:, 2] = 2.0**-125
    judge_inputs(inputs)


def test_few_products_of_float32():
    """Single products are rounded once."""
    inputs = without_grad(call("relu", 64, E=1, F=1, E_out=1, bias=False, dtype=F32))
    out = fastformer.feed_forward(**inputs, backend="cuda")
    assert torch.equal(out, (inputs["x"] * inputs["w1"]).relu() * inputs["w2"])


@pytest.mark.parametrize("E", (512, pytest.param(8192, marks=pytest.mark.slow)))
def test_long_sums_of_float32(E):
    """Of one sign, where what tensor cores cut off of each sum would add up."""
    inputs = without_grad(call("relu", 2, E=E, F=8, E_out=8, dtype=F32))
    inputs |= {name: inputs[name].abs() for name in ("x", "w1", "b1", "w2", "b2")}
    judge_inputs(inputs)


def launched(emulator, kernel):
    return [counters for name, _, _, counters in emulator.launched if name == kernel]


@pytest.mark.parametrize("dtype", (BF16, F32))
def test_traffic(feed_forward_emulator, dtype):
    """Of one tile of each product: operands are read once and results written once, in whole sectors and
    without bank conflicts."""
    rows, E, F = 128, 128, 128
    inputs = call("relu", rows, E=E, F=F, bias=False, dtype=dtype)
    out = fastformer.feed_forward(**inputs, backend="cuda")
    out.backward(torch.ones_like(out))
    matrix = dtype.itemsize * rows * E
    matrices = {  # read, and written
        "hidden": (2, 2),  # pre and hidden rows
        "linear": (2, 1),
        "hidden_gradient": (3, 2),  # with pre; dpre and hidden rows
        "input_gradient": (2, 1),
        "weight_gradient": (2, 1),
    }
    for kernel, (read, written) in matrices.items():
        for counters in launched(feed_forward_emulator, kernel):
            assert counters.bank_conflicts == 0, kernel
            assert counters.global_load_bytes == read * matrix, kernel
            assert counters.global_store_bytes == written * matrix, kernel
            assert counters.load_efficiency == counters.store_efficiency == 1.0, kernel


@pytest.mark.parametrize("schedule", (1, pytest.param(2, marks=pytest.mark.slow)))
@pytest.mark.parametrize(
    "dtype, rows, E", ((BF16, 37, 168), (F32, 9, 72), pytest.param(F32, 37, 168, marks=pytest.mark.slow))
)
def test_warps_in_any_order(feed_forward_emulator, dtype, rows, E, schedule):
    feed_forward_emulator.checks = ptxvm.Checks(schedule_seed=schedule)
    judge_call("swiglu", rows, E=E, F=72, E_out=24, dtype=dtype, p=P)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ("90", "100", "120"))
@pytest.mark.parametrize("dtype", (BF16, F32))
def test_other_targets(feed_forward_emulator, dtype, arch):
    feed_forward_emulator.arch = arch
    judge_call("geglu", 140, E=72, F=136, E_out=40, dtype=dtype, p=P)
    judge_call("gelu_tanh", 21, E=67, F=35, E_out=33, dtype=dtype, p=P, recompute=True)


@pytest.mark.slow
def test_every_instantiation_runs(feed_forward_emulator):
    for dtype in DTYPES:
        judge_call("swiglu", 140, E=72, F=136, E_out=40, dtype=dtype, p=P)
    text = nvcc.compile_text(CSRC / "cuda" / "launch_feed_forward.cu", "80", *FLAGS)
    ran = {name for _, name, *_ in feed_forward_emulator.launched}
    assert ran == set(re.findall(r"\.entry (\w+)\(", text))


@st.composite
def calls(draw):
    rows = draw(st.lists(st.integers(1, 12), max_size=2))
    widths = st.integers(1, 20).map(lambda eights: 8 * eights) | st.integers(1, 140)
    return call(
        draw(st.sampled_from(ACTIVATIONS)),
        *rows,
        **{name: draw(widths) for name in ("E", "F", "E_out")},
        layout=draw(st.sampled_from(("contiguous", "sliced", "unaligned", "last_strided"))),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 9)),
    )


@pytest.mark.slow
def test_any_call():
    @hypothesis.given(calls(), st.sampled_from((0.0, 0.1, 0.75)), st.booleans())
    @hypothesis.settings(max_examples=100, phases=(hypothesis.Phase.generate,))
    def checked(inputs, p, recompute):
        judge_inputs(inputs, p, recompute)

    checked()
