"""layer_norm, rms_norm and add_norm on every backend that CPU tensors can go to, forward and backward."""

from __future__ import annotations

import functools
import itertools

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import fastformer
from fastformer.testing import LAYOUTS, norm_inputs

from . import plain
from .judging import (
    BACKENDS,
    DTYPES,
    HAS_EXTENSION,
    assert_reference_means_plain,
    judge,
    skip_unless_built,
)

KINDS = ("layer", "rms")
COLUMNS = (1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 100, 255, 768, 1023, 1024, 1025, 4096, 8191, 65536, 65539)


def normed(input, weight=None, bias=None, *, kind, eps=1e-5, backend=None):
    """fastformer's norm without residual, in the signature of `plain.norm`."""
    shape = input.shape[-1:]
    if kind == "layer":
        return fastformer.layer_norm(input, shape, weight, bias, eps, backend=backend)
    assert bias is None
    return fastformer.rms_norm(input, shape, weight, eps, backend=backend)


def plain_normed(input, weight=None, bias=None, *, kind, eps=1e-5):
    return plain.norm(input, weight, bias, kind=kind, eps=eps)


def plain_call(inputs, kind):
    call = {"input": inputs["x"], "weight": inputs["weight"], "kind": kind}
    return call | {"bias": inputs["bias"]} if kind == "layer" else call


@pytest.mark.parametrize("C", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_means_the_plain_formula(kind, C):
    inputs = norm_inputs(2, 3, C, dtype=torch.float64, requires_grad=True)
    assert_reference_means_plain(normed, plain_normed, plain_call(inputs, kind))
    assert_reference_means_plain(fastformer.add_norm, plain.add_norm, inputs | {"kind": kind})


@pytest.mark.parametrize("C", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_every_width(backend, kind, dtype, C):
    inputs = norm_inputs(5, C, dtype=dtype, requires_grad=True)
    judge(normed, plain_normed, plain_call(inputs, kind), backend=backend)


@pytest.mark.parametrize("C", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_norm_of_every_width(backend, kind, dtype, C):
    inputs = norm_inputs(5, C, dtype=dtype, requires_grad=True)
    judge(fastformer.add_norm, plain.add_norm, inputs | {"kind": kind}, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_cpu_tensors_go_to_cpu(kind):
    skip_unless_built("cpu")
    for dtype, C in itertools.product(DTYPES, (1, 17, 65539)):
        inputs = norm_inputs(5, C, dtype=dtype, requires_grad=True)
        assert fastformer.explain(fastformer.add_norm, **inputs, kind=kind).backend == "cpu"
    assert fastformer.explain(fastformer.layer_norm, inputs["x"], (C,)).backend == "cpu"
    assert fastformer.explain(fastformer.rms_norm, inputs["x"], (C,)).backend == "cpu"


@pytest.mark.parametrize(
    "x_dtype, residual_dtype, param_dtype",
    [t for t in itertools.product(DTYPES, repeat=3) if len(set(t)) > 1],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(backend, x_dtype, residual_dtype, param_dtype):
    for kind in KINDS:
        inputs = norm_inputs(
            4, 96, dtype=x_dtype, residual_dtype=residual_dtype, param_dtype=param_dtype, requires_grad=True
        )
        judge(fastformer.add_norm, plain.add_norm, inputs | {"kind": kind}, backend=backend)
        if x_dtype == residual_dtype:
            judge(normed, plain_normed, plain_call(inputs, kind), backend=backend)


def test_results_have_the_promoted_dtype():
    inputs = norm_inputs(4, 8, dtype=torch.bfloat16, residual_dtype=torch.float32)
    assert {t.dtype for t in fastformer.add_norm(**inputs)} == {torch.float32}
    inputs = norm_inputs(4, 8, dtype=torch.bfloat16, residual_dtype=torch.float16)
    assert {t.dtype for t in fastformer.add_norm(**inputs)} == {torch.float32}
    inputs = norm_inputs(4, 8, dtype=torch.bfloat16, param_dtype=torch.float32)
    assert {t.dtype for t in fastformer.add_norm(**inputs)} == {torch.bfloat16}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend, layout):
    for dtype, kind in itertools.product((torch.float32, torch.bfloat16), KINDS):
        inputs = norm_inputs(3, 5, 40, dtype=dtype, layout=layout, requires_grad=True)
        judge(fastformer.add_norm, plain.add_norm, inputs | {"kind": kind}, backend=backend)
        judge(normed, plain_normed, plain_call(inputs, kind), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_gradients(backend):
    """An expanded or transposed incoming gradient is read through its strides."""
    inputs = norm_inputs(6, 7, 24, requires_grad=True)
    for grads in (
        [torch.ones(()).expand(6, 7, 24)] * 2,
        [torch.randn(24, 7, 6).permute(2, 1, 0), torch.randn(7, 6, 24).transpose(0, 1)],
        [torch.randn(6, 7, 48)[..., ::2], torch.randn(6, 7, 30)[..., 3:27]],
    ):
        judge(fastformer.add_norm, plain.add_norm, inputs, backend=backend, grad_outputs=grads)


@pytest.mark.parametrize("affine", ("neither", "weight", "bias", "both"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_weight_and_bias(backend, affine):
    inputs = norm_inputs(5, 33, requires_grad=True)
    for name in ("weight", "bias"):
        if affine not in (name, "both"):
            inputs[name] = None
    judge(fastformer.add_norm, plain.add_norm, inputs, backend=backend)
    judge(fastformer.add_norm, plain.add_norm, inputs | {"kind": "rms"}, backend=backend)
    judge(normed, plain_normed, plain_call(inputs, "layer"), backend=backend)


@pytest.mark.parametrize("needs", ("x", "residual", "weight", "bias"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_input_alone(backend, needs):
    inputs = norm_inputs(5, 33)
    inputs[needs].requires_grad_()
    judge(fastformer.add_norm, plain.add_norm, inputs, backend=backend)


@pytest.mark.parametrize("used", (0, 1))
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_one_output_alone(backend, used):
    """Pre-norm uses both outputs, post-norm the first alone; the other's gradient does not exist then."""
    skip_unless_built(backend)

    def one(add_norm, x, residual, weight, bias, backend=None):
        more = {"backend": backend} if add_norm is fastformer.add_norm else {}
        return add_norm(x, residual, weight, bias, **more)[used]

    ours, theirs = functools.partial(one, fastformer.add_norm), functools.partial(one, plain.add_norm)
    judge(ours, theirs, norm_inputs(5, 33, requires_grad=True), backend=backend)


@pytest.mark.parametrize("shape", ((0, 8), (3, 0, 8), (8,), (1, 1, 1, 1, 8), (2, 3, 4, 5, 8)), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions(backend, shape):
    inputs = norm_inputs(*shape, requires_grad=True)
    for kind in KINDS:
        judge(fastformer.add_norm, plain.add_norm, inputs | {"kind": kind}, backend=backend)
        judge(normed, plain_normed, plain_call(inputs, kind), backend=backend)


@pytest.mark.parametrize("rows", (1, 2, 63, 1000))
@pytest.mark.parametrize("backend", BACKENDS)
def test_reduction_over_many_rows(backend, rows):
    inputs = norm_inputs(rows, 72, requires_grad=True)
    judge(fastformer.add_norm, plain.add_norm, inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_far_from_zero(dtype, backend):
    """E[x²] − E[x]² would lose every digit of the variance here."""
    inputs = norm_inputs(100, 512, dtype=dtype, offset=1000.0, requires_grad=True)
    judge(normed, plain_normed, plain_call(inputs, "layer"), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", (1, 2, 40))
def test_gradients_of_nearly_constant_rows(C, dtype, backend):
    """The saved sum is rounded to 16 bits: x-hat by statistics of the unrounded one is noise."""
    inputs = norm_inputs(64, C, dtype=dtype, requires_grad=True)
    inputs["x"] = (inputs["x"].detach() * 2**-8 + 50).requires_grad_()
    inputs["residual"] = (inputs["residual"].detach() * 2**-8).requires_grad_()
    judge(fastformer.add_norm, plain.add_norm, inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows(backend):
    skip_unless_built(backend)
    for dtype in DTYPES:
        inputs = norm_inputs(3, 40, dtype=dtype)
        x = torch.tensor([[0.0], [3.0], [-0.125]], dtype=dtype).expand(3, 40)
        out = fastformer.layer_norm(x, (40,), inputs["weight"], inputs["bias"], backend=backend)
        assert torch.equal(out, inputs["bias"].expand(3, 40))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf), ids=str)
def test_nonfinite_values_stay_in_their_row(bad, backend):
    skip_unless_built(backend)
    for kind in KINDS:
        inputs = norm_inputs(6, 40, requires_grad=True)
        clean = fastformer.add_norm(**inputs, kind=kind, backend=backend)
        x = inputs["x"].detach().clone()
        x[2, 7] = bad
        inputs["x"] = x.requires_grad_()
        judge(fastformer.add_norm, plain.add_norm, inputs | {"kind": kind}, backend=backend)
        dirty = fastformer.add_norm(**inputs, kind=kind, backend=backend)
        others = [0, 1, 3, 4, 5]
        assert all(torch.equal(a[others], b[others]) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", (0.0, 1e-12, 0.5))
def test_eps(eps, backend):
    inputs = norm_inputs(5, 33, requires_grad=True)
    for kind in KINDS:
        judge(fastformer.add_norm, plain.add_norm, inputs | {"kind": kind, "eps": eps}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
def test_rms_norm_without_eps_is_torchs(dtype, backend):
    """torch adds the machine epsilon of the type it computes in, float32 for the narrow ones."""
    skip_unless_built(backend)
    if dtype == torch.float64 and backend not in (None, "reference"):
        pytest.skip("float64 goes to the reference")
    x = torch.full((2, 8), 1e-3, dtype=dtype)
    torch.testing.assert_close(fastformer.rms_norm(x, (8,), backend=backend), F.rms_norm(x, (8,)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalized", (1, 2, 3))
def test_normalized_shape_of_several_dimensions(normalized, backend):
    skip_unless_built(backend)
    x = norm_inputs(2, 3, 4, 5)["x"]
    shape = x.shape[-normalized:]
    weight, bias = torch.randn(shape), torch.randn(shape)
    for ours, theirs, parameters in (
        (fastformer.layer_norm, F.layer_norm, (weight, bias)),
        (fastformer.rms_norm, F.rms_norm, (weight,)),
    ):
        out = ours(x, shape, *parameters, backend=backend)
        torch.testing.assert_close(out, theirs(x, shape, *parameters))
        torch.testing.assert_close(ours(x, list(shape), *parameters, backend=backend), out)


@pytest.mark.skipif(not HAS_EXTENSION, reason="compares the cpu backend")
def test_the_sum_has_the_same_bits_everywhere():
    """s = round(residual + x), which leaves no freedom; with dropout see test_dropout."""
    for dtype, residual_dtype in itertools.product(DTYPES, repeat=2):
        inputs = norm_inputs(7, 130, dtype=dtype, residual_dtype=residual_dtype)
        expected = (inputs["residual"].float() + inputs["x"].float()).to(
            torch.promote_types(dtype, residual_dtype)
        )
        for backend in BACKENDS:
            assert torch.equal(fastformer.add_norm(**inputs, backend=backend)[1], expected)


@st.composite
def calls(draw):
    rows, C = draw(st.lists(st.integers(1, 6), min_size=0, max_size=3)), draw(st.integers(1, 300))
    dtypes = {name: draw(st.sampled_from(DTYPES)) for name in ("dtype", "residual_dtype", "param_dtype")}
    layout = draw(st.sampled_from(("contiguous", "transposed", "sliced", "unaligned", "last_strided")))
    if len(rows) == 0 and layout == "transposed":
        layout = "contiguous"
    inputs = norm_inputs(
        *rows,
        C,
        **dtypes,
        layout=layout,
        requires_grad=True,
        seed=draw(st.integers(0, 9)),
        offset=draw(st.sampled_from((0.0, 3.0))),
    )
    for name in ("weight", "bias"):
        if not draw(st.booleans()):
            inputs[name] = None
    return inputs | {"kind": draw(st.sampled_from(KINDS)), "eps": draw(st.sampled_from((1e-5, 1e-3)))}


@hypothesis.given(calls(), st.sampled_from(BACKENDS))
def test_any_call(inputs, backend):
    judge(fastformer.add_norm, plain.add_norm, inputs, backend=backend)


@pytest.mark.slow
@hypothesis.settings(max_examples=2000)
@hypothesis.given(calls(), st.sampled_from(BACKENDS))
def test_many_calls(inputs, backend):
    judge(fastformer.add_norm, plain.add_norm, inputs, backend=backend)


@hypothesis.given(st.integers(1, 5), st.integers(2, 50), st.floats(0.5, 20), st.floats(-5, 5))
def test_layer_norm_ignores_scale_and_shift_of_a_row(rows, C, factor, shift):
    x = norm_inputs(rows, C, dtype=torch.float64)["x"]
    hypothesis.assume(x.std(-1).min() > 1e-3)
    moved = fastformer.layer_norm(x * factor + shift, (C,), eps=0.0)
    torch.testing.assert_close(moved, fastformer.layer_norm(x, (C,), eps=0.0))
