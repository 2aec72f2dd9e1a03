"""Dropout: values and gradients, what users expect of a seed, what is refused."""

from __future__ import annotations

import functools

import pytest
import torch

import fastformer
from fastformer.testing import outputs_and_gradients

from . import philox
from .attention_judge import rounding_of_heavy_keys
from .dropout_calls import CALLS, dropout_calls, seed_tensor
from .judging import (
    BACKENDS,
    DTYPES,
    assert_reference_means_plain,
    assert_same_bits,
    judge,
    skip_unless_built,
)


@pytest.mark.parametrize("name", CALLS)
def test_reference_means_the_plain_formula(name):
    # At 1/2 and 3/4 the scale is exact in every dtype.
    for p in (0.5, 0.75):
        fn, plain_fn, inputs, keep = dropout_calls(torch.float64, p)[name]
        assert_reference_means_plain(
            fn,
            plain_fn,
            inputs,
            fn_only={"dropout_p": p, "seed": seed_tensor(4)},
            plain_only={"keep": keep, "keep_scale": philox.keep_scale(p)},
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, name, dtype):
    fn, plain_fn, inputs, keep = dropout_calls(dtype, 0.1)[name]
    judge(
        fn,
        plain_fn,
        inputs,
        backend=backend,
        fn_only={"dropout_p": 0.1, "seed": seed_tensor(4)},
        plain_only={"keep": keep, "keep_scale": 65536 / (65536 - philox.threshold(0.1))},
        unavoidable=rounding_of_heavy_keys if fn is fastformer.attention else None,
    )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("p", (1.0, 1 - 2**-18))
def test_everything_dropped(name, p):
    fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)[name]
    results = outputs_and_gradients(fn, **inputs, dropout_p=p)
    assert all(t.isfinite().all() for t in results.values())
    if name in ("layer", "rms"):
        assert torch.equal(results["out1"], inputs["residual"].detach())
        assert (results["d_x"] == 0).all() and (results["d_residual"] != 0).any()
    elif name in ("feed_forward", "recompute"):
        assert torch.equal(results["out0"], inputs["b2"].detach().expand(6, 5, 24))
        assert all((results[f"d_{n}"] == 0).all() for n in ("x", "w1", "b1", "w_gate", "b_gate", "w2"))
    else:
        assert (results["out0"] == 0).all()
        assert (results["d_value"] == 0).all()
        if name == "attention":
            assert (results["d_query"] == 0).all() and (results["d_key"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_drops_what_forward_dropped_when_nobody_gave_a_seed(backend):
    skip_unless_built(backend)
    N = 70
    value = (torch.eye(N) * N).expand(2, 3, N, N).clone().requires_grad_()
    zeros = torch.zeros(2, 3, N, 4)
    out = fastformer.attention(zeros, zeros, value, dropout_p=0.5, backend=backend)
    (grad,) = torch.autograd.grad(out, value, torch.eye(N).expand(2, 3, N, N))
    # grad[j, i] = weights[i, j], and out[i, j] = N weights[i, j].
    torch.testing.assert_close(grad.transpose(-1, -2) * N, out.detach())

    x = torch.ones(9, 72, requires_grad=True)
    out = fastformer.add_norm(x, torch.zeros(9, 72), dropout_p=0.5, backend=backend)[1]
    (grad,) = torch.autograd.grad(out, x, torch.ones(9, 72))
    assert torch.equal(grad, out.detach())

    for recompute in (False, True):
        b1 = torch.ones(50, requires_grad=True)
        out = fastformer.feed_forward(
            torch.zeros(1, 4),
            torch.zeros(50, 4),
            b1,
            torch.eye(50),
            None,
            dropout_p=0.5,
            activation="relu",
            recompute=recompute,
            backend=backend,
        )
        (grad,) = torch.autograd.grad(out, b1, torch.ones(1, 50))
        torch.testing.assert_close(grad, out.detach()[0])


@pytest.mark.parametrize("name", CALLS)
def test_manual_seed_reproduces(name):
    fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)[name]
    run = functools.partial(outputs_and_gradients, fn, **inputs, dropout_p=0.5)
    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert_same_bits(first, run())
    assert_same_bits(second, run())
    assert not torch.equal(first["out0"], second["out0"])


@pytest.mark.parametrize("name", CALLS)
def test_the_generator_moves_only_for_a_seed_that_is_drawn(name):
    fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)[name]
    before = torch.get_rng_state()
    outputs_and_gradients(fn, **inputs)
    outputs_and_gradients(fn, **inputs, dropout_p=0.5, seed=seed_tensor(1))
    assert torch.equal(torch.get_rng_state(), before)
    outputs_and_gradients(fn, **inputs, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), before)


def test_scaled_dot_product_attention_drops_by_the_same_map():
    torch.manual_seed(0)
    N, value = 70, (torch.eye(70) * 70).expand(1, 2, 70, 70)
    zeros = torch.zeros(1, 2, N, 4)
    out = fastformer.scaled_dot_product_attention(zeros, zeros, value, dropout_p=0.5)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    torch.manual_seed(0)
    assert torch.equal(out, fastformer.attention(zeros, zeros, value, dropout_p=0.5))


def test_no_dropout_ignores_the_seed():
    fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)["layer"]
    assert_same_bits(
        outputs_and_gradients(fn, **inputs), outputs_and_gradients(fn, **inputs, seed=seed_tensor(1))
    )


@pytest.mark.parametrize("p", (-0.1, 1.5, float("nan"), 2**-18, 1e-9, 2**-17))
@pytest.mark.parametrize("name", CALLS)
def test_probabilities_that_are_refused(name, p):
    fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)[name]
    with pytest.raises(ValueError, match="dropout_p"):
        fn(**inputs, dropout_p=p)


@pytest.mark.parametrize("p", (-0.1, 1.5, 2**-18))
def test_probabilities_that_sdpa_refuses(p):
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="dropout_p"):
        fastformer.scaled_dot_product_attention(q, q, q, dropout_p=p)


@pytest.mark.parametrize(
    "seed", (torch.tensor([1.0]), torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32), 0.5), ids=str
)
def test_seeds_that_are_refused(seed):
    for name in ("attention", "layer", "feed_forward"):
        fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)[name]
        with pytest.raises((TypeError, ValueError), match="seed"):
            fn(**inputs, dropout_p=0.5, seed=seed)
