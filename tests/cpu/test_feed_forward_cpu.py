"""The raw feed-forward operator of the CPU at every ISA level."""

from __future__ import annotations

import pytest
import torch

from fastformer.backends import cpu
from fastformer.specs import FEED_FORWARD_TENSORS, FeedForwardSpec
from fastformer.testing import LAYOUTS, assert_as_accurate, feed_forward_inputs, in_float64, laid_out

from ..ops import plain
from ..ops.philox import feed_forward_keep, keep_scale

if cpu.ready() is not None:
    pytest.skip(cpu.ready(), allow_module_level=True)

from fastformer import _C

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (*plain.ACTIVATIONS, *plain.GATED_ACTIVATIONS)
# Up to 32 rows the kernels take dot products, beyond they pack panels.
ROWS = (1, 2, 3, 7, 32, 33, 34, 47, 100)
# avx512bf16 multiplies bfloat16 two at a time, the other levels multiply float32.
OPERANDS = (torch.float32, torch.bfloat16)


@pytest.fixture(params=_C.build_info()["isa_levels"], autouse=True)
def isa(request):
    best = _C.isa()
    if not _C.set_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(threads)
    _C.set_isa(best)


def run(inputs, activation="gelu", p=0.0, seed=None, save_pre=False):
    """(out, pre, pre_gate) of the raw operator."""
    gated = activation in plain.GATED_ACTIVATIONS
    spec = FeedForwardSpec(plain.GATED_ACTIVATIONS.get(activation, activation), gated, p)
    tensors = inputs | {"seed": None if seed is None else torch.tensor([seed])}
    return cpu.feed_forward_fwd(
        spec, *(tensors.get(name) for name in FEED_FORWARD_TENSORS), save_pre=save_pre
    )


def check(inputs, activation="gelu"):
    out = run(inputs, activation)[0]
    baseline = plain.feed_forward(**inputs, activation=activation)
    assert_as_accurate(out, baseline, plain.feed_forward(**in_float64(inputs), activation=activation), "out")
    return out


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(activation, dtype):
    gated = activation in plain.GATED_ACTIVATIONS
    for rows in (5, 50):
        check(feed_forward_inputs(rows, E=40, F=70, E_out=19, gated=gated, dtype=dtype), activation)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_rows(rows, bias, dtype):
    check(feed_forward_inputs(rows, E=64, F=128, bias=bias, dtype=dtype))


@pytest.mark.parametrize(
    ("E", "F", "E_out"),
    [(1, 1, 1), (3, 5, 2), (17, 33, 31), (520, 130, 129), (48, 1030, 16), (31, 2083, 9), (1061, 47, 130)],
)
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_widths(E, F, E_out, dtype):
    for rows in (2, 40):
        check(feed_forward_inputs(rows, E=E, F=F, E_out=E_out, dtype=dtype), "gelu_tanh")
        check(feed_forward_inputs(rows, E=E, F=F, E_out=E_out, gated=True, dtype=dtype), "swiglu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_layouts(layout, dtype):
    check(feed_forward_inputs(3, 20, E=24, F=40, gated=True, layout=layout, dtype=dtype), "geglu")
    check(feed_forward_inputs(4, E=24, F=40, layout=layout, dtype=dtype))


def test_leading_dimensions():
    out = check(feed_forward_inputs(2, 3, 7, E=24, F=40))
    assert out.shape == (2, 3, 7, 24)
    vector = feed_forward_inputs(E=24, F=40)
    assert check(vector).shape == (24,)
    assert run(feed_forward_inputs(0, 5, E=24, F=40))[0].shape == (0, 5, 24)


@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_many_blocks_of_rows(dtype):
    # 1536 rows are the largest block.
    inputs = feed_forward_inputs(1601, E=8, F=40, dtype=dtype)
    check(inputs)
    keep = feed_forward_keep(1601, 40, 7, 0.25)
    expected = plain.feed_forward(**in_float64(inputs), keep=keep, keep_scale=keep_scale(0.25))
    baseline = plain.feed_forward(**inputs, keep=keep, keep_scale=keep_scale(0.25))
    assert_as_accurate(run(inputs, p=0.25, seed=7)[0], baseline, expected, "out")


@pytest.mark.parametrize("p", (0.1, 0.5, 1.0))
@pytest.mark.parametrize("rows", (3, 37))
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_dropout(rows, p, dtype):
    inputs = feed_forward_inputs(rows, E=24, F=300, gated=True, dtype=dtype)
    keep, seed = feed_forward_keep(rows, 300, -5, p), -5
    dropped = {"activation": "reglu", "keep": keep, "keep_scale": keep_scale(p)}
    expected = plain.feed_forward(**in_float64(inputs), **dropped)
    assert_as_accurate(
        run(inputs, "reglu", p, seed)[0], plain.feed_forward(**inputs, **dropped), expected, "out"
    )


def test_dropout_decides_each_hidden_element():
    # With F = E_out and w2 = 1 the output is the hidden row: its zeros are the map.
    inputs = feed_forward_inputs(40, E=8, F=200, E_out=200, bias=False) | {"w2": torch.eye(200)}
    hidden = run(inputs, p=0.3, seed=11)[0]
    assert torch.equal(hidden != 0, feed_forward_keep(40, 200, 11, 0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (5, 45))
def test_saved_for_backward(rows, dtype):
    inputs = feed_forward_inputs(rows, E=40, F=75, gated=True, dtype=dtype)
    out, pre, pre_gate = run(inputs, "swiglu", save_pre=True)
    assert torch.equal(out, run(inputs, "swiglu")[0])
    for actual, weight, bias in ((pre, "w1", "b1"), (pre_gate, "w_gate", "b_gate")):
        linear = [inputs[name] for name in ("x", weight, bias)]
        expected = torch.nn.functional.linear(*in_float64(linear))
        assert_as_accurate(actual, torch.nn.functional.linear(*linear), expected, weight)
    assert [t.shape for t in run(inputs, "swiglu")[1:]] == [(0,), (0,)]


@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
def test_activation_of_every_size(activation):
    # One column in and out, so that out is the activation itself; both tails and what is not finite.
    x = torch.cat(
        [torch.linspace(-12, 12, 4001), torch.tensor([1e-30, -1e30, 1e30, torch.nan, torch.inf, -torch.inf])]
    )
    one = torch.ones(1, 1)
    inputs = {"x": x[:, None], "w1": one, "b1": None, "w2": one, "b2": None}
    if activation == "relu2":
        inputs["x"] = inputs["x"].clamp(-1e15, 1e15)
    check(inputs, activation)


@pytest.mark.parametrize("rows", (4, 50))
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_nan_stays_in_its_row(rows, dtype):
    inputs = feed_forward_inputs(rows, E=41, F=75, dtype=dtype)
    clean = run(inputs)[0]
    inputs["x"][2, 5] = torch.nan
    out = run(inputs)[0]
    others = torch.arange(rows) != 2
    assert out[2].isnan().all() and torch.equal(out[others], clean[others])


@pytest.mark.parametrize("rows", (3, 70))
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_bits_do_not_depend_on_threads(rows, dtype):
    inputs = feed_forward_inputs(rows, E=600, F=1101, E_out=260, dtype=dtype)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(run(inputs)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_denormals_work_again_after_the_call():
    inputs = feed_forward_inputs(4, E=24, F=40)
    inputs["x"] = laid_out(inputs["x"] * -40, "contiguous")
    check(inputs)
    assert torch.tensor(1e-40).mul(1.0) != 0
