"""Norms on the Triton backend: the PTX that Triton compiles for sm_80 and sm_90, run by ptxvm."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastformer.triton_kernels import norm_bwd, norm_fwd

import fastformer
from fastformer.testing import norm_inputs, outputs_and_gradients
from tests.ops import philox, plain
from tests.ops.judging import assert_same_bits, judge

from .offline import Emulation

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=["sm_80", "sm_90"])
def emulation(request, monkeypatch):
    return Emulation(monkeypatch, request.param)


def judge_add_norm(rows, C, x, residual, param, kind, **more):
    inputs = norm_inputs(
        rows, C, dtype=x, residual_dtype=residual, param_dtype=param, requires_grad=True, **more
    )
    judge(fastformer.add_norm, plain.add_norm, inputs | {"kind": kind}, backend="triton")


@pytest.mark.parametrize(
    "rows, C, dtypes, kind", [(19, 40, (BF16, BF16, F32), "layer"), (3, 999, (F32, F32, F32), "rms")], ids=str
)
def test_add_norm(emulation, rows, C, dtypes, kind):
    judge_add_norm(rows, C, *dtypes, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("layer", "rms"))
@pytest.mark.parametrize("dtypes", ((F16, F16, F16), (BF16, F32, F32), (F32, F16, BF16)), ids=str)
@pytest.mark.parametrize(
    "rows, C", ((300, 3), (40, 31), (33, 64), (5, 768), (3, 4096), (18, 8200), (2, 20001))
)
def test_more_add_norms(emulation, rows, C, dtypes, kind):
    judge_add_norm(rows, C, *dtypes, kind)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ("transposed", "sliced", "unaligned", "broadcast"))
def test_layouts(emulation, layout):
    inputs = norm_inputs(3, 5, 24, dtype=BF16, layout=layout, requires_grad=True)
    judge(fastformer.add_norm, plain.add_norm, inputs, backend="triton")


@pytest.mark.parametrize(
    "rows, C, x, residual",
    [
        (5, 264, BF16, BF16),
        pytest.param(3, 1001, F32, F32, marks=pytest.mark.slow),
        pytest.param(20, 21, F16, F32, marks=pytest.mark.slow),
        pytest.param(2, 16500, BF16, BF16, marks=pytest.mark.slow),
    ],
)
def test_dropout(emulation, rows, C, x, residual):
    """The contract's map says what is kept; the sum has every backend's bits; twice gives the same bits."""
    seed, p = -0x123456789ABCDEF, 0.3
    inputs = norm_inputs(rows, C, dtype=x, residual_dtype=residual, param_dtype=F32, requires_grad=True)
    keep, scale = philox.norm_keep(rows, C, seed, p), philox.keep_scale(p)
    dropout = {"dropout_p": p, "seed": torch.tensor([seed])}
    judge(
        fastformer.add_norm,
        plain.add_norm,
        inputs,
        backend="triton",
        fn_only=dropout,
        plain_only={"keep": keep, "keep_scale": scale},
    )
    first, second = (
        outputs_and_gradients(fastformer.add_norm, **inputs, **dropout, backend="triton") for _ in range(2)
    )
    assert_same_bits(first, second)
    kept = torch.where(keep, inputs["x"].float() * scale, 0.0)
    assert torch.equal(first["out1"], (inputs["residual"].float() + kept).to(first["out1"].dtype))


def test_traffic(emulation):
    """Each input is read once and each output written once, in whole sectors and without bank conflicts."""
    rows, C = 128, 256
    x, residual, grad_out, grad_sum = torch.randn(4, rows, C).to(BF16).unbind()
    tensor = rows * C * 2
    _, s, mean, rstd = norm_fwd.norm_fwd(x, residual, None, None, None, False, 1e-5, 0.0)
    norm_bwd.norm_bwd(grad_out, grad_sum, s, None, mean, rstd, None, False, 0.0, True, True)
    forward, backward = emulation.counters["_norm_fwd_kernel"], emulation.counters["_norm_bwd_kernel"]
    assert 2 * tensor <= forward.global_load_bytes <= 1.05 * 2 * tensor
    assert 2 * tensor <= forward.global_store_bytes <= 1.05 * 2 * tensor
    # 32 lanes of a warp ask for the same mean and rstd: bytes requested, one sector fetched.
    assert 3 * tensor <= 32 * backward.global_load_sectors <= 1.05 * 3 * tensor
    partials = 2 * 4 * 2 * C  # dweight and dbias, of two programs on the one multiprocessor
    assert tensor <= backward.global_store_bytes - partials <= 1.05 * tensor
    for counters in emulation.counters.values():
        assert counters.bank_conflicts == 0
        assert counters.store_efficiency > 0.95
