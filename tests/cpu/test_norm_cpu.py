"""The raw norm operators of the CPU at every ISA level; users meet their machine's best only."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastformer.backends import cpu
from fastformer.specs import NormSpec
from fastformer.testing import LAYOUTS, assert_as_accurate, laid_out

from ..ops.philox import keep_scale, norm_keep

if cpu.ready() is not None:
    pytest.skip(cpu.ready(), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("layer", "rms")
COLUMNS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 64, 100, 384, 768, 1000, 1024, 4096, 65536)
EPS = 1e-5


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(rows, C, dtype=torch.float32, residual_dtype=None, param_dtype=None):
    """x, residual, weight, bias."""
    return (
        draw(rows, C, dtype=dtype, seed=1),
        draw(rows, C, dtype=residual_dtype or dtype, seed=2),
        draw(C, dtype=param_dtype or dtype, seed=3),
        draw(C, dtype=param_dtype or dtype, seed=4),
    )


def run(kind, x, residual, weight, bias, grad_out, grad_sum, p=0.0, seed=None):
    """Every output of both raw operators, by name."""
    spec = NormSpec(kind, EPS, p)
    seed = None if seed is None else torch.tensor([seed])
    out, s, mean, rstd = cpu.norm_fwd(spec, x, residual, weight, bias, seed)
    named = {"out": out, "sum": s, "mean": mean, "rstd": rstd}
    saved = x if residual is None else s
    gradients = cpu.norm_bwd(spec, grad_out, grad_sum, saved, weight, mean, rstd, seed, True, True)
    return named | dict(zip(("ds", "dx", "dweight", "dbias"), gradients, strict=True))


def composition(kind, x, residual, weight, bias, grad_out, grad_sum):
    """out, sum, ds, dweight and dbias by torch's own operators in the arguments' dtype, without dropout."""
    s = (x + residual).detach().requires_grad_()
    weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
    shape = s.shape[-1:]
    if kind == "layer":
        out = F.layer_norm(s, shape, weight, bias, EPS)
    else:
        out = F.rms_norm(s, shape, weight, EPS) + bias
    ds, dweight, dbias = torch.autograd.grad((out, s), (s, weight, bias), (grad_out, grad_sum))
    return {"out": out.detach(), "sum": s.detach(), "ds": ds, "dweight": dweight, "dbias": dbias}


def assert_same_bits(first, second):
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_width(kind, dtype):
    for C in COLUMNS:
        rows = max(3, 256 // C)
        tensors = inputs(rows, C, dtype)
        grads = draw(rows, C, dtype=dtype, seed=5), draw(rows, C, dtype=dtype, seed=6)
        outputs = run(kind, *tensors, *grads)
        baseline = composition(kind, *tensors, *grads)
        actual = {name: outputs[name].to(baseline[name].dtype) for name in baseline}
        expected = composition(kind, *(t.double() for t in tensors + grads))
        assert_as_accurate(actual, baseline, expected, f"C = {C}")

        s = outputs["sum"].double()
        mean = s.mean(-1) if kind == "layer" else torch.zeros(rows, dtype=torch.float64)
        rstd = ((s - mean[:, None]).square().mean(-1) + EPS).rsqrt()
        torch.testing.assert_close(outputs["mean"], mean.float() if kind == "layer" else torch.empty(0))
        torch.testing.assert_close(outputs["rstd"], rstd.float())


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_dtypes(kind):
    rows, C = 3, 37
    for dtype, residual_dtype, param_dtype in itertools.product(DTYPES, repeat=3):
        x, residual, weight, bias = inputs(rows, C, dtype, residual_dtype, param_dtype)
        joint = torch.promote_types(dtype, residual_dtype)
        grads = draw(rows, C, dtype=joint, seed=5), draw(rows, C, dtype=joint, seed=6)
        actual = run(kind, x, residual, weight, bias, *grads)
        assert actual["out"].dtype == actual["sum"].dtype == actual["ds"].dtype == joint
        # The same values in one dtype.
        same = run(kind, x.to(joint), residual.to(joint), weight.float(), bias.float(), *grads)
        assert_same_bits(actual, same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_draws_the_contract_s_bits(dtype):
    rows = 3
    for C, p in itertools.product((1, 7, 8, 65, 127, 128, 129, 1000), (0.1, 0.5, 1.0)):
        x, residual, weight, bias = inputs(rows, C, dtype)
        x[0, 0] = torch.nan  # a dropped element may be anything
        keep = norm_keep(rows, C, seed=-(2**62) - 5, p=p)
        residual[~keep & (draw(rows, C, seed=7) > 1)] = -0.0
        grads = draw(rows, C, dtype=dtype, seed=5), draw(rows, C, dtype=dtype, seed=6)
        actual = run("layer", x, residual, weight, bias, *grads, p=p, seed=-(2**62) - 5)
        scale = torch.tensor(keep_scale(p))
        s = residual.float() + torch.where(keep, x.float() * scale, 0.0)
        # As bits, so that +0 and -0 differ.
        assert torch.equal(*(t.nan_to_num(9).view(torch.uint8) for t in (actual["sum"], s.to(dtype))))
        assert torch.equal(actual["dx"] != 0, keep & (actual["ds"] != 0)) or s.isnan().any()
        if dtype == torch.float32:
            dx = torch.where(keep, actual["ds"] * scale, 0.0)
            torch.testing.assert_close(actual["dx"], dx, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(layout):
    x, residual, weight, bias = (laid_out(t, layout) for t in inputs(6, 35))
    grads = [laid_out(draw(6, 35, seed=seed), layout) for seed in (5, 6)]
    actual = run("layer", x, residual, weight, bias, *grads, p=0.1, seed=3)
    plain = [t.contiguous() for t in (x, residual, weight, bias, *grads)]
    assert_same_bits(actual, run("layer", *plain, p=0.1, seed=3))


def test_leading_dimensions_count_as_rows():
    x, residual, weight, bias = inputs(24, 9)
    grads = draw(24, 9, seed=5), draw(24, 9, seed=6)
    flat = run("layer", x, residual, weight, bias, *grads)
    for shape in ((2, 3, 4, 9), (24, 1, 9)):
        views = [t.view(shape) for t in (x, residual, *grads)]
        deep = run("layer", *views[:2], weight, bias, *views[2:])
        assert deep["out"].shape == shape and deep["mean"].shape == shape[:-1]
        assert_same_bits({name: deep[name].view(flat[name].shape) for name in flat}, flat)
    # Rows that no one stride reaches are copied.
    permuted = (t.view(4, 6, 9).transpose(0, 1).contiguous().transpose(0, 1) for t in (x, residual))
    deep = run("layer", *permuted, weight, bias, *(t.view(4, 6, 9) for t in grads))
    assert_same_bits({name: deep[name].view(flat[name].shape) for name in flat}, flat)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype):
    tensors = inputs(3000, 100, dtype)
    grads = draw(3000, 100, dtype=dtype, seed=5), draw(3000, 100, dtype=dtype, seed=6)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # the fixture puts it back
        results.append(run("layer", *tensors, *grads, p=0.1, seed=1))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_beyond_the_caches_are_the_same(dtype):
    """They are written by streaming stores."""
    C = 512
    rows = (17 << 20) // (C * dtype.itemsize)
    x, residual, weight, bias = inputs(1, C, dtype)
    shift = torch.arange(rows, dtype=torch.float32).remainder(97)[:, None].to(dtype) / 64
    x, residual = x * shift, residual + shift
    spec = NormSpec("layer", EPS)
    out, s, mean, rstd = cpu.norm_fwd(spec, x, residual, weight, bias, None)
    ds = cpu.norm_bwd(spec, x, residual, s, weight, mean, rstd, None, False, False)[0]
    for begin in range(0, rows, 2001):
        part = slice(begin, begin + 61)
        small = cpu.norm_fwd(spec, x[part], residual[part], weight, bias, None)
        assert_same_bits(dict(enumerate(small)), dict(enumerate(t[part] for t in (out, s, mean, rstd))))
        rows_of = (x[part], residual[part], s[part], weight, mean[part], rstd[part])
        small_ds = cpu.norm_bwd(spec, *rows_of, None, False, False)[0]
        assert_same_bits({"ds": small_ds}, {"ds": ds[part]})


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,)], ids=str)
def test_no_rows_and_one_row_without_leading_dimension(shape):
    x, weight, bias = draw(*shape, seed=1), draw(5, seed=2), draw(5, seed=3)
    outputs = run("layer", x, x, weight, bias, x, None)
    assert outputs["out"].shape == outputs["sum"].shape == outputs["ds"].shape == shape
    assert outputs["mean"].shape == outputs["rstd"].shape == shape[:-1]
    assert outputs["dweight"].shape == outputs["dbias"].shape == (5,)
    if x.numel() == 0:
        assert not outputs["dweight"].any() and not outputs["dbias"].any()


def test_absent_arguments():
    x, residual, weight, _ = inputs(4, 21)
    ones, zeros, grad = torch.ones(21), torch.zeros(21), draw(4, 21, seed=5)
    plain = run("layer", x, None, None, None, grad, None)
    assert plain["sum"].shape == plain["dx"].shape == (0,)
    assert_same_bits(plain, run("layer", x, None, ones, zeros, grad, None))
    rms = run("rms", x, residual, weight, None, grad, None)
    assert rms["mean"].shape == (0,)
    assert_same_bits(rms, run("rms", x, residual, weight, zeros, grad, torch.zeros_like(grad)))
    spec = NormSpec("rms", EPS)
    without = cpu.norm_bwd(spec, grad, None, x, None, rms["mean"], rms["rstd"], None, False, False)
    assert [t.shape for t in without] == [(4, 21), (0,), (0,), (0,)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_row(bad):
    x, residual, weight, bias = inputs(7, 40)
    grads = draw(7, 40, seed=5), draw(7, 40, seed=6)
    clean = run("layer", x, residual, weight, bias, *grads)
    x[3, 33] = bad
    outputs = run("layer", x, residual, weight, bias, *grads)
    others = [0, 1, 2, 4, 5, 6]
    for name in ("out", "sum", "mean", "rstd", "ds"):
        assert torch.equal(outputs[name][others], clean[name][others]), name
    assert outputs["out"][3].isnan().all() and outputs["ds"][3].isnan().all()
    assert outputs["dweight"].isnan().all() and torch.equal(outputs["dbias"], clean["dbias"])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradient_of_a_constant_row_that_rounding_moves(dtype):
    """1 + eps/2 is no 16-bit number: the statistics must be those of the rounded row that backward reads."""
    C = 24
    x = torch.ones(1, C, dtype=dtype)
    residual = torch.full_like(x, torch.finfo(dtype).eps / 2)
    grad = draw(1, C, dtype=dtype, seed=5)
    outputs = run("layer", x, residual, torch.ones(C), torch.zeros(C), grad, None)
    expected = (grad.double() - grad.double().mean()) * EPS**-0.5
    torch.testing.assert_close(outputs["ds"].double(), expected, rtol=0.01, atol=0.5)
    assert outputs["dweight"].abs().max() < 1e-2


def test_refusals_are_sentences():
    x = draw(2, 4)
    spec = NormSpec("layer", EPS)
    assert cpu.why_not("norm_fwd", spec, (x, x, None, None, None)) is None
    assert "float64" in cpu.why_not("norm_fwd", spec, (x.double(), None, None, None, None))
    assert "CPU tensors" in cpu.why_not("norm_bwd", spec, (x.to("meta"), None, None, None, None))
    assert "column" in cpu.why_not("norm_fwd", spec, (x[:, :0], None, None, None, None))
