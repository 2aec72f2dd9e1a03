"""The one comparison that every operator test makes, and which backends it is made for."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import fastformer
from fastformer.testing import assert_as_accurate, in_float64, oracle, outputs_and_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What serves CPU tensors. None is what users get: the fastest backend that serves the call.
BACKENDS = ("reference", "cpu", None)
HAS_EXTENSION = importlib.util.find_spec("fastformer._C") is not None

# float64 against float64: the same mathematics in another order of summation.
FLOAT64_TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def skip_unless_built(backend):
    if backend == "cpu" and not HAS_EXTENSION:
        pytest.skip("the cpu backend needs the compiled extension fastformer._C")


def without_grad(inputs):
    """What has no gradient stays the same tensor, so that one given twice still is one."""
    return {
        name: value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value
        for name, value in inputs.items()
    }


# One draw's largest error is chance: of 150 draws of float32 attention torch's own fused kernel misses the
# rule in one, at 1.2 times what is allowed. A draw that misses it is judged again together with these many
# others, where chance evens out and a mistake does not; with more of them where a result is small (a sink's
# gradient has H elements), until there are enough elements to speak of a largest error.
MORE_DRAWS, MOST_DRAWS = 7, 127
ENOUGH_ELEMENTS = 256


def another_draw(inputs, seed):
    """`inputs` with the values of every floating tensor in another order and of another size, all together.

    A tensor of one element has no other order. Equal values stay equal, and numbers at the end of the dtype's
    range and beyond it stay what they are.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(value):
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            return value
        order = torch.randperm(value.numel(), generator=generator)
        size = torch.rand((), generator=generator).add(0.5).to(value.dtype)
        values = value.detach().flatten()[order].view(value.shape)
        values = torch.where(values.abs() < 1e4, values * size, values)
        return values.requires_grad_(value.requires_grad)

    return {name: shuffled(value) for name, value in inputs.items()}


def pooled(results):
    """One vector of all results of the same name; not every result need have every name."""
    names = dict.fromkeys(name for result in results for name in result)
    return {name: torch.cat([r[name].flatten() for r in results if name in r]) for name in names}


def with_error(baseline, exact, error):
    """`baseline` further from `exact` by `error`, element by element, for the names in `error`."""
    return {
        name: (t + torch.where(t < exact[name], -1, 1) * error[name]).to(t.dtype) if name in error else t
        for name, t in baseline.items()
    }


def assert_accurate_over_draws(three_results, what, unavoidable=None):
    """`three_results(draw)` -> actual, baseline and oracle of draw 0, 1, ..., each a dict of tensors.

    `unavoidable(draw)` -> the errors that a baseline is granted where one draw alone misses the rule.
    """
    first = three_results(0)
    try:
        assert_as_accurate(*first, what)
    except AssertionError:
        smallest = min((t.numel() for t in first[0].values() if t.numel()), default=1)
        more = min(max(MORE_DRAWS, ENOUGH_ELEMENTS // smallest - 1), MOST_DRAWS)
        draws = [first] + [three_results(draw) for draw in range(1, 1 + more)]
        if unavoidable is not None:
            draws = [
                (actual, with_error(baseline, exact, unavoidable(draw)), exact)
                for draw, (actual, baseline, exact) in enumerate(draws)
            ]
        for actual, _, exact in draws:
            assert {k: t.shape for k, t in actual.items()} == {k: t.shape for k, t in exact.items()}, what
        actual, baseline, exact = (pooled(results) for results in zip(*draws, strict=True))
        assert_as_accurate(actual, baseline, exact, f"{what} over {len(draws)} draws,")


def judge(
    fn, plain, inputs, *, backend, must_serve=True, fn_only=None, plain_only=None, unavoidable=None, **how
):
    """Compare `fn(**inputs, **fn_only)` on `backend` with `plain(**inputs, **plain_only)` and gradients.

    The oracle is the reference backend on float64 copies; for the reference itself it is `plain` on them.
    A backend that refuses although it `must_serve` fails the test. `how` goes to `outputs_and_gradients`.
    `unavoidable(inputs, plain_only)` names the errors that a kernel has and the plain formula happens not to.
    Returns whether the call was served.
    """
    skip_unless_built(backend)
    fn_only, plain_only = fn_only or {}, plain_only or {}

    def drawn_inputs(draw):
        return another_draw(inputs, draw) if draw else inputs

    def three_results(draw):
        drawn = drawn_inputs(draw)
        actual = outputs_and_gradients(fn, **drawn, **fn_only, backend=backend, **how)
        baseline = outputs_and_gradients(plain, **drawn, **plain_only, **how)
        if backend == "reference":
            exact = outputs_and_gradients(plain, **in_float64(drawn), **in_float64(plain_only), **how)
        else:
            exact = oracle(fn, **drawn, **fn_only, **how)
        return actual, baseline, exact

    try:
        granted = unavoidable and (lambda draw: unavoidable(drawn_inputs(draw), plain_only))
        assert_accurate_over_draws(three_results, f"{backend or 'auto'}:", granted)
    except fastformer.BackendError as refusal:
        assert backend is not None, f"no backend serves the call: {refusal}"
        assert not must_serve, f"{backend} must serve this call, and refuses it: {refusal}"
        assert backend in str(refusal), f"the refusal does not name the backend: {refusal}"
        return False
    return True


def assert_reference_means_plain(fn, plain, inputs, *, fn_only=None, plain_only=None):
    """The reference on float64 gives what `plain` gives on float64, gradients included."""
    inputs = in_float64(inputs)
    actual = outputs_and_gradients(fn, **inputs, **in_float64(fn_only or {}), backend="reference")
    expected = outputs_and_gradients(plain, **inputs, **in_float64(plain_only or {}))
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(
            actual[name].double(),
            expected[name],
            **FLOAT64_TOLERANCE,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], rtol=0, atol=0, equal_nan=True, msg=lambda t, name=name: f"{name}: {t}"
        )
