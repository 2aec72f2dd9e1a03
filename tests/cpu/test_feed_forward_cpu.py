"""The raw feed-forward operator of the CPU at every ISA level."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastformer.backends import cpu
from fastformer.specs import FEED_FORWARD_TENSORS, FeedForwardSpec
from fastformer.testing import (
    LAYOUTS,
    assert_as_accurate,
    cotangents,
    feed_forward_inputs,
    in_float64,
    laid_out,
    outputs_and_gradients,
)

from ..ops import plain
from ..ops.judging import another_draw, assert_accurate_over_draws, assert_same_bits
from ..ops.philox import feed_forward_keep, keep_scale

if cpu.ready() is not None:
    pytest.skip(cpu.ready(), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (*plain.ACTIVATIONS, *plain.GATED_ACTIVATIONS)
# Up to 32 rows the kernels take dot products, beyond they pack panels.
ROWS = (1, 2, 3, 7, 32, 33, 34, 47, 100)
# avx512bf16 multiplies bfloat16 two at a time, the other levels multiply float32.
OPERANDS = (torch.float32, torch.bfloat16)
# Measured 5.3e-6 at -10.8 on every level: the exponent there, 84, is rounded twice to 24 bits.
TAIL_ERROR = 8e-6
DIFFERENTIABLE = FEED_FORWARD_TENSORS[:7]


def arguments(inputs, activation, p, seed):
    """The spec, and the tensors in the order of specs.py."""
    gated = activation in plain.GATED_ACTIVATIONS
    spec = FeedForwardSpec(plain.GATED_ACTIVATIONS.get(activation, activation), gated, p)
    tensors = inputs | {"seed": None if seed is None else torch.tensor([seed])}
    return spec, [tensors.get(name) for name in FEED_FORWARD_TENSORS]


def run(inputs, activation="gelu", p=0.0, seed=None, save_pre=False):
    """(out, pre, pre_gate) of the raw operator."""
    spec, tensors = arguments(inputs, activation, p, seed)
    return cpu.feed_forward_fwd(spec, *tensors, save_pre=save_pre)


def gradients(inputs, grad_out, activation="gelu", p=0.0, seed=None, needs=DIFFERENTIABLE, recompute=False):
    """The raw operator's gradients by name, of those tensors in `needs` that are there."""
    spec, tensors = arguments(inputs, activation, p, seed)
    nothing = inputs["x"].new_empty(0)
    saved = (nothing, nothing) if recompute else run(inputs, activation, p, seed, save_pre=True)[1:]
    needed = tuple(name in needs for name in DIFFERENTIABLE)
    grads = cpu.feed_forward_bwd(spec, needed, grad_out, *saved, *tensors)
    assert all((grad is None) != need for grad, need in zip(grads, needed, strict=True))
    named = dict(zip(DIFFERENTIABLE, grads, strict=True))
    missing = [name for name in needs if inputs.get(name) is None]
    assert all(named[name].shape == (0,) for name in missing)
    return {f"d_{name}": named[name] for name in needs if name not in missing}


def check_gradients(inputs, activation="gelu", p=0.0, seed=None, keep=None, grad_layout="contiguous", **how):
    """Judge every gradient, in as many draws as it takes to tell chance from a mistake."""
    dropped = {} if keep is None else {"keep": keep, "keep_scale": keep_scale(p)}
    inputs = {n: t if t is None else t.detach().requires_grad_() for n, t in inputs.items()}

    def three_results(draw):
        drawn = another_draw(inputs, draw) if draw else inputs
        baseline = outputs_and_gradients(plain.feed_forward, **drawn, activation=activation, **dropped)
        exact = outputs_and_gradients(
            plain.feed_forward, **in_float64(drawn), activation=activation, **dropped
        )
        (grad_out,) = cotangents([baseline.pop("out0")])
        exact.pop("out0")
        values = {n: t if t is None else t.detach() for n, t in drawn.items()}
        actual = gradients(values, laid_out(grad_out, grad_layout), activation, p, seed, **how)
        return {name: actual[name] for name in baseline}, baseline, exact

    assert_accurate_over_draws(three_results, f"{activation}:")


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_activations(activation, dtype):
    gated = activation in plain.GATED_ACTIVATIONS
    for rows, recompute in ((5, False), (50, False), (50, True)):
        inputs = feed_forward_inputs(rows, E=40, F=70, E_out=19, gated=gated, dtype=dtype)
        check_gradients(inputs, activation, recompute=recompute)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_gradients_of_rows(rows, bias, dtype):
    check_gradients(feed_forward_inputs(rows, E=64, F=128, bias=bias, dtype=dtype))


@pytest.mark.parametrize(
    ("E", "F", "E_out"),
    [(1, 1, 1), (3, 5, 2), (17, 33, 31), (520, 130, 129), (48, 1030, 16), (31, 2083, 9), (130, 47, 1061)],
)
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_gradients_of_widths(E, F, E_out, dtype):
    for rows in (2, 41):
        check_gradients(feed_forward_inputs(rows, E=E, F=F, E_out=E_out, dtype=dtype), "gelu_tanh")
        check_gradients(feed_forward_inputs(rows, E=E, F=F, E_out=E_out, gated=True, dtype=dtype), "swiglu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_gradients_of_layouts(layout, dtype):
    for recompute in (False, True):
        inputs = feed_forward_inputs(3, 20, E=24, F=40, gated=True, layout=layout, dtype=dtype)
        check_gradients(inputs, "geglu", recompute=recompute)
    if layout != "broadcast":
        check_gradients(feed_forward_inputs(3, 20, E=24, F=40, dtype=dtype), "silu", grad_layout=layout)


@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_gradient_of_a_sum_has_no_strides(dtype):
    inputs = feed_forward_inputs(7, E=24, F=40, dtype=dtype)
    ones = torch.ones((), dtype=dtype).expand(7, 24)
    assert_same_bits(gradients(inputs, ones), gradients(inputs, ones.contiguous()))


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_many_blocks_of_rows(dtype, recompute):
    # 1536 rows are the largest block, and 512 what every level sums in one part.
    inputs = feed_forward_inputs(1601, E=8, F=40, E_out=33, gated=True, dtype=dtype)
    keep = feed_forward_keep(1601, 40, 7, 0.25)
    check_gradients(inputs, "geglu", 0.25, 7, keep, recompute=recompute)


@pytest.mark.parametrize("p", (0.1, 0.5, 1.0))
@pytest.mark.parametrize("activation", ("reglu", "gelu"))
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_gradients_of_dropout(activation, p, dtype):
    for rows in (3, 37):
        inputs = feed_forward_inputs(rows, E=24, F=300, gated=activation == "reglu", dtype=dtype)
        check_gradients(inputs, activation, p, -5, feed_forward_keep(rows, 300, -5, p))


@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_dropout_decides_each_hidden_gradient(dtype):
    # With w1 = w2 = 1 and positive x, dx is the hidden gradient: its zeros are the map.
    one, rows = torch.eye(200, dtype=dtype), 1601
    x = torch.ones(rows, 200, dtype=dtype)
    inputs = {"x": x, "w1": one, "b1": None, "w2": one, "b2": None}
    dx = gradients(inputs, torch.ones_like(x), "relu", 0.3, 11, needs=("x",))["d_x"]
    assert torch.equal(dx != 0, feed_forward_keep(rows, 200, 11, 0.3))


@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_needs(dtype):
    """What else is wanted changes no bit of a gradient."""
    for gated, activation in ((False, "gelu"), (True, "swiglu")):
        inputs = feed_forward_inputs(21, E=24, F=40, E_out=18, gated=gated, dtype=dtype)
        grad_out = torch.randn(21, 18).to(dtype)
        for recompute in (False, True):
            everything = gradients(inputs, grad_out, activation, 0.2, 3, recompute=recompute)
            for count in range(len(DIFFERENTIABLE)):
                for needs in itertools.combinations(DIFFERENTIABLE, count):
                    some = gradients(inputs, grad_out, activation, 0.2, 3, needs, recompute)
                    assert_same_bits(some, {name: everything[name] for name in some})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recomputed_is_what_was_saved(activation, dtype):
    for rows in (3, 70):
        gated = activation in plain.GATED_ACTIVATIONS
        inputs = feed_forward_inputs(rows, E=40, F=75, gated=gated, dtype=dtype)
        grad_out = torch.randn(rows, 40).to(dtype)
        saved, again = (gradients(inputs, grad_out, activation, recompute=r) for r in (False, True))
        assert_same_bits(saved, again)


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_gradients_of_no_rows(dtype, recompute):
    inputs = feed_forward_inputs(0, 5, E=24, F=40, E_out=18, gated=True, dtype=dtype)
    grads = gradients(inputs, torch.empty(0, 5, 18, dtype=dtype), "swiglu", recompute=recompute)
    for name, grad in grads.items():
        assert grad.dtype == dtype and grad.shape == inputs[name.removeprefix("d_")].shape
        assert (grad == 0).all()


@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
def test_slope_of_every_size(activation):
    # As test_activation_of_every_size: dx is the slope itself.
    sizes = torch.linspace(-12, 12, 4001)
    special = torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30, torch.nan, torch.inf, -torch.inf])
    one = torch.ones(1, 1)
    for x in (sizes, special):
        x = x.clamp(-1e15, 1e15) if activation == "relu2" else x
        inputs = {"x": x[:, None].requires_grad_(), "w1": one, "b1": None, "w2": one, "b2": None}
        ones = [torch.ones(len(x), 1)]
        baseline, exact = (
            outputs_and_gradients(plain.feed_forward, **of, activation=activation, grad_outputs=ones)["d_x"]
            for of in (inputs, in_float64(inputs))
        )
        inputs["x"] = inputs["x"].detach()
        assert_as_accurate(gradients(inputs, *ones, activation)["d_x"], baseline, exact, activation)


def test_slope_in_the_tail_of_gelu_keeps_its_digits():
    # As small as 1e-26, it is judged as a share of itself.
    x = torch.linspace(-11, -1, 1001)[:, None]
    one = torch.ones(1, 1)
    inputs = {"x": x, "w1": one, "b1": None, "w2": one, "b2": None}
    slope = gradients(inputs, torch.ones_like(x), "gelu")["d_x"].double()
    z = x.double()
    # In float64 too, 1 + erf would cancel.
    exact = torch.special.erfc(-z * 0.5**0.5) / 2 + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
    assert (slope / exact - 1).abs().max() < TAIL_ERROR


@pytest.mark.parametrize("rows", (4, 50))
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_nan_gradient_stays_in_its_row(rows, dtype):
    inputs = feed_forward_inputs(rows, E=41, F=75, E_out=23, dtype=dtype)
    grad_out = torch.randn(rows, 23).to(dtype)
    clean = gradients(inputs, grad_out)
    grad_out[2, 5] = torch.nan
    dirty = gradients(inputs, grad_out)
    others = torch.arange(rows) != 2
    assert dirty["d_x"][2].isnan().all() and torch.equal(dirty["d_x"][others], clean["d_x"][others])
    others = torch.arange(23) != 5
    for name in ("d_w2", "d_b2"):
        assert dirty[name][5].isnan().all() and torch.equal(dirty[name][others], clean[name][others])


@pytest.mark.parametrize("rows", (3, 70, 1601))
@pytest.mark.parametrize("dtype", OPERANDS, ids=str)
def test_bits_of_gradients_do_not_depend_on_threads(rows, dtype):
    E, F, E_out = (600, 1101, 260) if rows < 1000 else (70, 101, 66)
    inputs = feed_forward_inputs(rows, E=E, F=F, E_out=E_out, gated=True, dtype=dtype)
    grad_out = torch.randn(rows, E_out).to(dtype)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(gradients(inputs, grad_out, "geglu", 0.1, 1, recompute=rows == 70))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_denormals_work_again_after_backward():
    gradients(feed_forward_inputs(4, E=24, F=40), torch.randn(4, 24))
    assert torch.tensor(1e-40).mul(1.0) != 0


def test_wrong_gradients_are_refused():
    inputs = feed_forward_inputs(4, E=24, F=40)
    for wrong in (torch.randn(4, 23), torch.randn(5, 24), torch.randn(4, 24).bfloat16()):
        with pytest.raises(RuntimeError, match="grad_out must be"):
            gradients(inputs, wrong)
    spec, tensors = arguments(inputs, "gelu", 0.0, None)
    pre, nothing = torch.randn(4, 39), torch.empty(0)
    with pytest.raises(RuntimeError, match="pre is not what forward saved"):
        cpu.feed_forward_bwd(spec, (True,) * 7, torch.randn(4, 24), pre, nothing, *tensors)
