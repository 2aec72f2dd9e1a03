"""The CUDA norms, run from their PTX: right values and gradients for every width, type and layout."""

import itertools

import pytest
import torch

import fastformer
from fastformer.testing import LAYOUTS, assert_as_accurate, laid_out, norm_inputs
from tests.ops import philox, plain
from tests.ops.judging import DTYPES, judge

from .emulated import kernels

WIDTHS = (1, 3, 8, 31, 64, 100, 384, 768, 1000, 1024, 1288, 1608, 4096, 8200)
KINDS = ("layer", "rms")
F32, BF16, F16 = DTYPES
SEED = 12345678901234567


def judge_add_norm(inputs, kind, dropout_p=0.0):
    """add_norm on cuda against the plain formula, with the decisions that philox.py says were taken."""
    fn_only, plain_only = {"kind": kind, "dropout_p": dropout_p}, {"kind": kind}
    if dropout_p:
        *_, columns = shape = inputs["x"].shape
        keep = philox.norm_keep(inputs["x"].numel() // columns, columns, SEED, dropout_p).view(shape)
        fn_only["seed"] = torch.tensor([SEED])
        plain_only |= {"keep": keep, "keep_scale": philox.keep_scale(dropout_p)}
    judge(fastformer.add_norm, plain.add_norm, inputs, backend="cuda", fn_only=fn_only, plain_only=plain_only)


def judge_plain_norm(inputs, kind):
    """layer_norm or rms_norm on cuda against torch's own."""
    inputs = {"input": inputs["x"], "weight": inputs["weight"], "bias": inputs["bias"]}
    columns = inputs["input"].shape[-1:]
    if kind == "rms":
        del inputs["bias"]
        ours = lambda input, weight, backend=None: fastformer.rms_norm(
            input, columns, weight, 1e-5, backend=backend
        )
        theirs = lambda input, weight: plain.norm(input, weight, kind="rms")
    else:
        ours = lambda input, weight, bias, backend=None: fastformer.layer_norm(
            input, columns, weight, bias, backend=backend
        )
        theirs = lambda input, weight, bias: plain.norm(input, weight, bias)
    judge(ours, theirs, inputs, backend="cuda")


# Every width and type in the quick run, but not every pair of them.
QUICK = [(KINDS[place % 2], width, DTYPES[place % 3]) for place, width in enumerate(WIDTHS) if width <= 1024]
ALL = [case for case in itertools.product(KINDS, (*WIDTHS, 65536), DTYPES) if case not in QUICK]


@pytest.mark.parametrize(
    "kind,width,dtype", [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)]
)
def test_every_width(emulator, kind, width, dtype):
    rows = 5 if width < 4096 else 2
    emulator.multiprocessors = 1
    judge_plain_norm(norm_inputs(rows, width, dtype=dtype, requires_grad=True), kind)


@pytest.mark.parametrize(
    "width", [8, 100, 768, *(pytest.param(width, marks=pytest.mark.slow) for width in (12288, 16400))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(emulator, dtype, width):
    rows = 9 if width < 4096 else 2
    judge_add_norm(norm_inputs(rows, width, dtype=dtype, requires_grad=True), "layer", 0.3)


MIXES = [
    (x, residual, parameter)
    for x, residual, parameter in itertools.product(DTYPES, repeat=3)
    if not x == residual == parameter
]


@pytest.mark.parametrize(
    "x,residual,parameter",
    [
        (BF16, F32, F32),
        (F16, F16, F32),
        (F32, BF16, BF16),
        *(pytest.param(*mix, marks=pytest.mark.slow) for mix in MIXES),
    ],
)
@pytest.mark.parametrize("width", [72, pytest.param(75, marks=pytest.mark.slow)])
def test_mixed_types(emulator, x, residual, parameter, width):
    inputs = norm_inputs(
        4, width, dtype=x, residual_dtype=residual, param_dtype=parameter, requires_grad=True
    )
    judge_add_norm(inputs, "layer", 0.2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype,width", [(BF16, 64), *(pytest.param(F32, width, marks=pytest.mark.slow) for width in (1, 64, 100))]
)
def test_layouts(emulator, layout, dtype, width):
    """Three-dimensional inputs, and parameters that are not aligned."""
    inputs = norm_inputs(2, 3, width, dtype=dtype, layout=layout, requires_grad=True)
    if layout == "unaligned":
        inputs |= {name: laid_out(inputs[name], layout) for name in ("weight", "bias")}
    judge_add_norm(inputs, "layer")


def test_row_strides_are_read_in_place(emulator):
    """Rows further apart than they are wide, aligned: the vector kernel serves them."""
    wide = torch.randn(6, 160).to(BF16)
    wide[:, 64:] = torch.nan
    inputs = norm_inputs(6, 64, dtype=BF16) | {"x": wide[:, :64]}
    judge_add_norm(inputs, "layer")
    assert "norm_fwd_kept_kernel" in emulator.launched[0][0]


@pytest.mark.parametrize("absent", ["weight", "bias", "weight and bias"])
def test_absent_parameters(emulator, absent):
    inputs = norm_inputs(3, 40, requires_grad=True)
    inputs = {name: None if name in absent.split() else tensor for name, tensor in inputs.items()}
    judge_add_norm(inputs, "layer")


def test_frozen_parameters_cost_no_reduction(emulator):
    inputs = norm_inputs(3, 40)
    inputs["x"].requires_grad_()
    judge_add_norm(inputs, "layer")
    assert [name for name, _ in emulator.launched if "bwd" in name and "kept" not in name] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_one_column_has_no_gradient(emulator, dtype):
    inputs = norm_inputs(5, 1, dtype=dtype, requires_grad=True)
    out = fastformer.layer_norm(inputs["x"], (1,), inputs["weight"], inputs["bias"], backend="cuda")
    out.sum().backward()
    assert not inputs["x"].grad.any()


@pytest.mark.parametrize("offset", [100.0, -3000.0])
def test_means_far_from_zero(emulator, offset):
    judge_plain_norm(norm_inputs(4, 1024, offset=offset, requires_grad=True), "layer")


def test_rows_of_nonfinite_values(emulator):
    inputs = norm_inputs(5, 64)
    inputs["x"][1, 3], inputs["x"][2, 60], inputs["x"][3] = torch.nan, torch.inf, 7.0
    inputs["x"].requires_grad_()
    judge_plain_norm(inputs, "layer")


@pytest.mark.parametrize("width", [8, 9])
def test_no_rows(emulator, width):
    inputs = norm_inputs(0, width, requires_grad=True)
    out, s = fastformer.add_norm(**inputs, backend="cuda")
    (out.sum() + s.sum()).backward()
    assert out.shape == s.shape == (0, width)
    assert inputs["weight"].grad.equal(torch.zeros(width)) and inputs["bias"].grad.equal(torch.zeros(width))


@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_sum_has_the_contract_s_bits(emulator, dtype, residual_dtype, p):
    """s = rn(residual + rn(x * scale)), and a dropped x is 0 whatever it held."""
    if p == 0.0 and dtype != residual_dtype and BF16 in (dtype, residual_dtype):
        pytest.skip("the other mixes without dropout show the same")
    inputs = norm_inputs(3, 43, dtype=dtype, residual_dtype=residual_dtype, seed=5)
    keep = torch.ones(3, 43, dtype=torch.bool) if p == 0 else philox.norm_keep(3, 43, SEED, p)
    inputs["x"][~keep] = torch.nan
    _, s = fastformer.add_norm(**inputs, dropout_p=p, seed=torch.tensor([SEED]), backend="cuda")
    scaled = inputs["x"].float() * philox.keep_scale(p) if p else inputs["x"].float()
    expected = inputs["residual"].float() + torch.where(keep, scaled, 0.0)
    assert s.equal(expected.to(torch.promote_types(dtype, residual_dtype)))


def test_what_is_normalised_is_the_sum_as_it_is_written(emulator):
    """To the bit, where before it was rounded it would give other ones."""
    inputs = norm_inputs(4, 64, dtype=BF16)
    out, s = fastformer.add_norm(**inputs, backend="cuda")
    again = fastformer.layer_norm(s, (64,), inputs["weight"], inputs["bias"], backend="cuda")
    assert again.equal(out)


def test_statistics(emulator):
    """mean and rstd as the operators return them, in float32 whatever the dtype."""
    x = norm_inputs(3, 4, 96, dtype=BF16)["x"]
    _, _, mean, rstd = torch.ops.fastformer.norm_fwd_cuda(x, None, None, None, None, False, 1e-5, 0.0)
    for actual, of in (
        (mean, lambda v: v.mean(-1)),
        (rstd, lambda v: (v.var(-1, correction=0) + 1e-5).rsqrt()),
    ):
        assert_as_accurate(actual, of(x.float()), of(x.double()))


# (kind, columns, dtype of x, of residual): every kernel that the launcher can launch, in both directions.
INSTANTIATIONS = [
    *((width, dtype, dtype) for width in (64, 544) for dtype in DTYPES),
    *((width, dtype, dtype) for width in (1288, 1608, 8200) for dtype in (BF16, F16)),
    (64, BF16, F32),
    (33, F32, F32),
    (16388, BF16, F32),
]


@pytest.mark.parametrize("arch", ["80", pytest.param("90", marks=pytest.mark.slow)])
def test_every_instantiation_runs(emulator, arch):
    emulator.arch, emulator.multiprocessors = arch, 1
    for width, x, residual in INSTANTIATIONS:
        inputs = norm_inputs(1, width, dtype=x, residual_dtype=residual, requires_grad=True)
        judge_add_norm(inputs, "layer", 0.5 if width == 64 else 0.0)
    assert {name for name, _ in emulator.launched} == set(kernels(arch).kernels)
