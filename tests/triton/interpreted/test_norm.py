"""Norms on the Triton backend, through the public functions, in Triton's interpreter."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

import fastformer
from fastformer.testing import LAYOUTS, laid_out, norm_inputs, outputs_and_gradients
from tests.ops import philox, plain
from tests.ops.judging import DTYPES, assert_same_bits, judge

KINDS = ("layer", "rms")
slow = partial(pytest.param, marks=pytest.mark.slow)
# From 8193 columns on backward goes in chunks, from 16385 on forward does too.
COLUMNS = (1, 3, 7, 8, 31, 64, 100, 384, 768, 1000, 1024, 4096, 8200)
WIDE = (slow(8192), slow(16384), slow(20000), 65536)


def layer_or_rms_norm(input, weight=None, *, kind, backend=None):
    norm = fastformer.layer_norm if kind == "layer" else fastformer.rms_norm
    return norm(input, input.shape[-1:], weight, backend=backend)


def plain_layer_or_rms_norm(input, weight=None, *, kind):
    return plain.norm(input, weight, kind=kind)


@pytest.mark.parametrize("C", COLUMNS)
def test_every_width(C):
    """Every dtype and kind at some of the widths; the operators' contract has every combination."""
    index = COLUMNS.index(C)
    kind, other = KINDS[index % 2], KINDS[1 - index % 2]
    inputs = norm_inputs(5 if C <= 1024 else 2, C, dtype=DTYPES[index % 3], requires_grad=True)
    judge(fastformer.add_norm, plain.add_norm, inputs | {"kind": kind}, backend="triton")
    call = {"input": inputs["x"], "weight": inputs["weight"], "kind": other}
    judge(layer_or_rms_norm, plain_layer_or_rms_norm, call, backend="triton")


@pytest.mark.parametrize("C", WIDE)
def test_wide_rows(C):
    inputs = norm_inputs(2, C, dtype=torch.bfloat16, requires_grad=True)
    judge(fastformer.add_norm, plain.add_norm, inputs, backend="triton")


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3))[1:-1:3], ids=str)
def test_mixed_dtypes(dtypes):
    x, residual, param = dtypes
    inputs = norm_inputs(3, 40, dtype=x, residual_dtype=residual, param_dtype=param, requires_grad=True)
    judge(fastformer.add_norm, plain.add_norm, inputs, backend="triton")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Everything outside the tensors' own elements is NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = norm_inputs(3, 5, 24, dtype=dtype, layout=layout, requires_grad=True)
        judge(fastformer.add_norm, plain.add_norm, inputs, backend="triton")


def test_each_input_has_its_own_strides():
    inputs = norm_inputs(5, 24, requires_grad=True)
    for name, layout in (("x", "sliced"), ("residual", "transposed"), ("residual", "sliced")):
        changed = inputs | {name: laid_out(inputs[name], layout)}
        judge(fastformer.add_norm, plain.add_norm, changed, backend="triton")


def test_strided_gradients():
    inputs = norm_inputs(4, 5, 24, requires_grad=True)
    for grads in (
        [torch.ones(()).expand(4, 5, 24)] * 2,
        [torch.randn(24, 5, 4).permute(2, 1, 0), torch.randn(5, 4, 24).transpose(0, 1)],
        [torch.randn(4, 5, 48)[..., ::2], torch.randn(4, 5, 30)[..., 3:27]],
    ):
        found, expected = (
            outputs_and_gradients(fastformer.add_norm, **inputs, backend="triton", grad_outputs=outs)
            for outs in (grads, [g.contiguous() for g in grads])
        )
        assert_same_bits(found, expected)


@pytest.mark.parametrize("affine", ("neither", "weight", "bias"))
def test_optional_weight_and_bias(affine):
    inputs = norm_inputs(5, 33, requires_grad=True)
    for name in ("weight", "bias"):
        if affine != name:
            inputs[name] = None
    judge(fastformer.add_norm, plain.add_norm, inputs, backend="triton")
    judge(fastformer.add_norm, plain.add_norm, inputs | {"kind": "rms"}, backend="triton")


@pytest.mark.parametrize("needs", ("x", "residual", "weight", "bias"))
def test_gradient_of_one_input_alone(needs):
    inputs = norm_inputs(5, 33)
    inputs[needs].requires_grad_()
    judge(fastformer.add_norm, plain.add_norm, inputs, backend="triton")


@pytest.mark.parametrize("shape", ((0, 8), (3, 0, 8), (8,), (1, 1, 1, 8), (2, 3, 2, 8)), ids=str)
def test_leading_dimensions(shape):
    inputs = norm_inputs(*shape, requires_grad=True)
    judge(fastformer.add_norm, plain.add_norm, inputs, backend="triton")


@pytest.mark.parametrize("rows", (300, slow(2000)))
def test_reduction_over_many_rows(rows):
    """More rows than the programs take in one step, and a last step that is not full."""
    inputs = norm_inputs(rows, 9, requires_grad=True)
    judge(fastformer.add_norm, plain.add_norm, inputs, backend="triton")


@pytest.mark.parametrize("C", (512, slow(20000)))
def test_a_mean_far_from_zero(C):
    inputs = norm_inputs(2, C, offset=1000.0, requires_grad=True)
    judge(fastformer.add_norm, plain.add_norm, inputs, backend="triton")


@pytest.mark.parametrize("bad", (torch.nan, torch.inf), ids=str)
def test_nonfinite_values_stay_in_their_row(bad):
    inputs = norm_inputs(6, 40, requires_grad=True)
    inputs["x"].data[2, 7] = bad
    judge(fastformer.add_norm, plain.add_norm, inputs, backend="triton")


@pytest.mark.parametrize("C", (5, 72, slow(1000), slow(16400)))
@pytest.mark.parametrize("p", (0.1, 1.0))
def test_dropout(p, C):
    """The kept elements are those of the contract's map, and the sum has the bits of every backend."""
    seed, dtypes = -0x123456789ABCDEF, (torch.float32, torch.bfloat16, torch.float16)
    inputs = norm_inputs(
        3, C, dtype=dtypes[C % 3], residual_dtype=dtypes[C % 2], param_dtype=torch.float32, requires_grad=True
    )
    keep, scale = philox.norm_keep(3, C, seed, p), philox.keep_scale(p)
    judge(
        fastformer.add_norm,
        plain.add_norm,
        inputs,
        backend="triton",
        fn_only={"dropout_p": p, "seed": torch.tensor([seed])},
        plain_only={"keep": keep, "keep_scale": scale},
    )
    s = fastformer.add_norm(**inputs, dropout_p=p, seed=torch.tensor([seed]), backend="triton")[1]
    x, residual = inputs["x"].float(), inputs["residual"].float()
    assert torch.equal(s, (residual + torch.where(keep, x * scale, 0.0)).to(s.dtype))


def test_dropped_values_may_be_anything():
    keep = philox.norm_keep(4, 64, 8, 0.5)
    inputs = norm_inputs(4, 64)
    inputs["x"] = inputs["x"].masked_fill(~keep, torch.nan)
    out, s = fastformer.add_norm(**inputs, dropout_p=0.5, seed=torch.tensor([8]), backend="triton")
    assert out.isfinite().all() and s.isfinite().all()


def test_same_bits_twice():
    inputs = norm_inputs(300, 5, requires_grad=True) | {"dropout_p": 0.3, "seed": torch.tensor([5])}
    first, second = (outputs_and_gradients(fastformer.add_norm, **inputs, backend="triton") for _ in range(2))
    assert_same_bits(first, second)


def test_other_dtypes_are_refused():
    with pytest.raises(fastformer.BackendError, match="float64"):
        fastformer.layer_norm(torch.randn(3, 4, dtype=torch.float64), (4,), backend="triton")


def test_the_raw_operators_check_out():
    x, w = torch.randn(3, 16), torch.randn(16)
    ops = torch.ops.fastformer
    args = (x, torch.randn(3, 16), w, None, torch.tensor([1]), False, 1e-5, 0.25)
    torch.library.opcheck(ops.norm_fwd_triton.default, args, test_utils=("test_schema", "test_faketensor"))
    out, s, mean, rstd = ops.norm_fwd_triton(*args)
    args = (out, None, s, w, mean, rstd, torch.tensor([1]), False, 0.25, True, True)
    torch.library.opcheck(ops.norm_bwd_triton.default, args, test_utils=("test_schema", "test_faketensor"))
