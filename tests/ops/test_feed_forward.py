"""feed_forward: every activation, plain and gated, on every backend that CPU tensors can go to."""

from __future__ import annotations

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fastformer
from fastformer.testing import LAYOUTS, feed_forward_inputs

from . import philox, plain
from .judging import BACKENDS, DTYPES, assert_reference_means_plain, judge, skip_unless_built, without_grad

ACTIVATIONS = (*plain.ACTIVATIONS, *plain.GATED_ACTIVATIONS)


def call(activation, *rows, **more):
    gated = activation in plain.GATED_ACTIVATIONS
    inputs = feed_forward_inputs(*rows, gated=gated, **{"requires_grad": True, **more})
    return inputs | {"activation": activation}


def judge_all(inputs, backend, **more):
    judge(fastformer.feed_forward, plain.feed_forward, inputs, backend=backend, **more)


@pytest.mark.parametrize("recompute", (False, True), ids=("", "recompute"))
@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_means_the_plain_formula(activation, bias, recompute):
    inputs = call(activation, 3, 7, bias=bias, dtype=torch.float64, E_out=18)
    assert_reference_means_plain(
        fastformer.feed_forward, plain.feed_forward, inputs, fn_only={"recompute": recompute}
    )


@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_activation(backend, activation, dtype, bias):
    judge_all(call(activation, 3, 7, bias=bias, dtype=dtype), backend)


@pytest.mark.parametrize("activation", ("gelu", "swiglu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_recompute(backend, dtype, activation):
    inputs = call(activation, 3, 7, dtype=dtype)
    judge_all(inputs, backend, fn_only={"recompute": True})


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputing_changes_no_bit_of_the_result(backend, activation):
    skip_unless_built(backend)
    for dtype in DTYPES:
        inputs = call(activation, 70, dtype=dtype)
        saved, again = (
            fastformer.feed_forward(**inputs, recompute=recompute, backend=backend)
            for recompute in (False, True)
        )
        assert torch.equal(saved, again)


# E, F, E_out: one element, odd, exact tiles, past a tile.
SIZES = ((1, 1, 1), (3, 5, 7), (33, 65, 31), (64, 256, 64), (130, 300, 70), (384, 1536, 384))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("activation", ("gelu", "swiglu"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes(backend, activation, sizes):
    E, F, E_out = sizes
    for dtype, rows in ((torch.float32, 1), (torch.float32, 37), (torch.bfloat16, 37)):
        judge_all(call(activation, rows, E=E, F=F, E_out=E_out, dtype=dtype), backend)


@pytest.mark.parametrize("rows", ((), (0,), (3, 0), (1,), (200,), (2, 3, 4)), ids=str)
@pytest.mark.parametrize("activation", ("relu", "geglu"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions(backend, activation, rows):
    judge_all(call(activation, *rows), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ("gelu", "swiglu"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend, activation, layout):
    for dtype in (torch.float32, torch.bfloat16):
        judge_all(call(activation, 3, 7, layout=layout, dtype=dtype), backend)


@pytest.mark.parametrize("needs", ("x", "w1", "b1", "w_gate", "b_gate", "w2", "b2"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_input_alone(backend, needs):
    inputs = without_grad(call("swiglu", 3, 7))
    inputs[needs].requires_grad_()
    judge_all(inputs, backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cpu_tensors_go_to_cpu_in_both_directions(activation):
    skip_unless_built("cpu")
    for dtype in DTYPES:
        inputs = call(activation, 3, 7, dtype=dtype)
        chosen = fastformer.explain(fastformer.feed_forward, **inputs)
        assert chosen.backends == {"feed_forward_fwd": "cpu", "feed_forward_bwd": "cpu"}, str(chosen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_far_from_zero(backend):
    """exp overflows and erf saturates; the result does neither."""
    for activation in ACTIVATIONS:
        inputs = call(activation, 9)
        inputs["x"] = (inputs["x"].detach() * 60).requires_grad_()
        judge_all(inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf), ids=str)
def test_nonfinite_values_stay_in_their_row(bad, backend):
    skip_unless_built(backend)
    for activation in ("relu", "gelu"):
        inputs = without_grad(call(activation, 40))
        clean = fastformer.feed_forward(**inputs, backend=backend)
        inputs["x"][17, 3] = bad
        judge_all(inputs, backend)
        dirty = fastformer.feed_forward(**inputs, backend=backend)
        others = torch.arange(40) != 17
        assert torch.equal(clean[others], dirty[others]) and not dirty[17].isfinite().all()


@st.composite
def calls(draw):
    rows = draw(st.lists(st.integers(1, 5), max_size=2))
    sizes = {name: draw(st.integers(1, 80)) for name in ("E", "F", "E_out")}
    layout = draw(st.sampled_from(("contiguous", "sliced", "unaligned", "last_strided")))
    return call(
        draw(st.sampled_from(ACTIVATIONS)),
        *rows,
        **sizes,
        layout=layout,
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 9)),
    )


@hypothesis.given(calls(), st.sampled_from(BACKENDS), st.booleans())
def test_any_call(inputs, backend, recompute):
    judge_all(inputs, backend, fn_only={"recompute": recompute})


@hypothesis.given(calls(), st.sampled_from((0.1, 0.5, 0.75)), st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_any_call_with_dropout(inputs, p, seed, recompute):
    rows, F = inputs["x"].shape[:-1], inputs["w1"].shape[0]
    keep = philox.feed_forward_keep(rows.numel(), F, seed, p).view(*rows, F)
    scale = 65536 / (65536 - philox.threshold(p))
    judge_all(
        inputs,
        "cpu",
        fn_only={"dropout_p": p, "seed": seed, "recompute": recompute},
        plain_only={"keep": keep, "keep_scale": scale},
    )


@pytest.mark.slow
@hypothesis.settings(max_examples=2000)
@hypothesis.given(calls(), st.sampled_from(BACKENDS), st.booleans())
def test_many_calls(inputs, backend, recompute):
    judge_all(inputs, backend, fn_only={"recompute": recompute})


def test_gated_forms_multiply_by_the_ungated_product():
    """hidden = act(x w_gate^T + b_gate) * (x w1^T + b1): an open gate leaves x w1^T + b1."""
    inputs = feed_forward_inputs(5, gated=True, dtype=torch.float64)
    inputs["w_gate"].zero_()
    inputs["b_gate"].fill_(1.0)
    out = fastformer.feed_forward(**inputs, activation="reglu")
    hidden = inputs["x"] @ inputs["w1"].t() + inputs["b1"]
    torch.testing.assert_close(out, hidden @ inputs["w2"].t() + inputs["b2"])


def test_every_result_is_new():
    for activation, bias in itertools.product(("relu", "reglu"), (False, True)):
        inputs = without_grad(call(activation, 3, 4, bias=bias))
        before = {name: t.clone() for name, t in inputs.items() if isinstance(t, torch.Tensor)}
        fastformer.feed_forward(**inputs)
        assert all(torch.equal(inputs[name], t) for name, t in before.items())
