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
    return {
        name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }


def judge(fn, plain, inputs, *, backend, must_serve=True, fn_only=None, plain_only=None):
    """Compare `fn(**inputs, **fn_only)` on `backend` with `plain(**inputs, **plain_only)`, gradients included.

    The oracle is the reference backend on float64 copies; for the reference itself it is `plain` on them.
    A backend that refuses although it `must_serve` fails the test. Returns whether the call was served.
    """
    skip_unless_built(backend)
    fn_only, plain_only = fn_only or {}, plain_only or {}
    try:
        actual = outputs_and_gradients(fn, **inputs, **fn_only, backend=backend)
    except fastformer.BackendError as refusal:
        assert backend is not None, f"no backend serves the call: {refusal}"
        assert not must_serve, f"{backend} must serve this call, and refuses it: {refusal}"
        assert backend in str(refusal), f"the refusal does not name the backend: {refusal}"
        return False
    baseline = outputs_and_gradients(plain, **inputs, **plain_only)
    if backend == "reference":
        expected = outputs_and_gradients(plain, **in_float64(inputs), **in_float64(plain_only))
    else:
        expected = oracle(fn, **inputs, **fn_only)
    assert_as_accurate(actual, baseline, expected, f"{backend or 'auto'}:")
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
