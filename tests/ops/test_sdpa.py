"""torch's own names take torch's own samples: scaled_dot_product_attention, layer_norm, rms_norm."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import fastformer
from fastformer.testing import assert_as_accurate, in_float64, outputs_and_gradients

from .judging import DTYPES, FLOAT64_TOLERANCE, pooled, skip_unless_built

SDPA = "scaled_dot_product_attention"
OPINFO = {
    op.name.removeprefix("nn.functional."): op
    for op in op_db
    if op.name in (f"nn.functional.{SDPA}", "nn.functional.layer_norm", "nn.functional.rms_norm")
}


def results_beside_torchs(name, call, dtype):
    """Ours, torch's in `dtype` (the baseline) and torch's in float64 (the oracle)."""
    theirs, ours = getattr(F, name), getattr(fastformer, name)

    def run(fn, arguments):
        parameters = inspect.signature(ours).parameters
        named = dict(zip(parameters, arguments[0], strict=False)) | arguments[1]
        # torch's builtins do not tell their signatures, so both go by ours.
        return outputs_and_gradients(lambda **kwargs: fn(**kwargs), **named)

    exact = in_float64(call)
    if name == "rms_norm" and "eps" not in call[1]:
        # Without eps torch adds the epsilon of the type it computes in, which float64 changes.
        exact[1]["eps"] = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps
    return run(ours, call), run(theirs, call), run(theirs, exact)


def judge_against_torch(name, call, dtype):
    found, baseline, exact = results_beside_torchs(name, call, dtype)
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact, **FLOAT64_TOLERANCE, equal_nan=True)
    else:
        assert_as_accurate(found, baseline, exact, name)


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
@pytest.mark.parametrize("name", sorted(OPINFO))
def test_torchs_samples(name, dtype):
    # The samples are tiny (96 numbers) and their scores large (up to 95), so one sample's largest error is
    # chance, torch's own included: the error is judged over all samples together.
    judged = []
    count = 0
    for sample in OPINFO[name].sample_inputs("cpu", dtype, requires_grad=True):
        if sample.kwargs.get("dropout_p"):
            # torch draws other numbers: see test_dropout for the values.
            out = getattr(fastformer, name)(sample.input, *sample.args, **sample.kwargs)
            wanted = F.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
            assert out.shape == wanted.shape and out.dtype == dtype and out.isfinite().all()
        else:
            judged.append(results_beside_torchs(name, ((sample.input, *sample.args), sample.kwargs), dtype))
            assert all(
                found.shape == exact.shape
                for found, _, exact in zip(*(r.values() for r in judged[-1]), strict=True)
            )
        count += 1
    assert count >= 6
    found, baseline, exact = (pooled(results) for results in zip(*judged, strict=True))
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact, **FLOAT64_TOLERANCE, equal_nan=True)
    else:
        assert_as_accurate(found, baseline, exact, name)


def test_the_signature_is_torchs():
    wanted = {
        "query": inspect.Parameter.empty,
        "key": inspect.Parameter.empty,
        "value": inspect.Parameter.empty,
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }
    parameters = inspect.signature(fastformer.scaled_dot_product_attention).parameters
    assert {name: p.default for name, p in parameters.items()} == wanted
    assert list(parameters) == list(wanted)


def tensors(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)


SHAPES = {
    "2-D": ((5, 8), (7, 8), (7, 6)),
    "3-D": ((2, 5, 8), (2, 7, 8), (2, 7, 6)),
    "4-D": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "5-D": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 6)),
    "4-D query, 3-D key": ((2, 3, 5, 8), (3, 7, 8), (3, 7, 6)),
    "3-D query, 4-D key": ((3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "broadcast batch": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 6)),
    "broadcast heads": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    "broadcast query": ((1, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "empty batch": ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 6)),
    "no keys": ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 6)),
    "no queries": ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
}


@pytest.mark.parametrize("causal", (False, True), ids=("", "causal"))
@pytest.mark.parametrize("name", SHAPES)
def test_every_rank(name, causal):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        call = (tensors(*SHAPES[name], dtype=dtype), {"is_causal": causal})
        judge_against_torch(SDPA, call, dtype)


@pytest.mark.parametrize("mask", (None, "bool", "float"))
@pytest.mark.parametrize("name", SHAPES)
def test_every_rank_goes_to_cpu_in_both_directions(name, mask):
    skip_unless_built("cpu")
    inputs = tensors(*SHAPES[name])
    attn_mask = {None: None, "bool": torch.ones(5, 7) > 0, "float": torch.zeros(5, 7, requires_grad=True)}[
        mask
    ]
    if attn_mask is not None:
        attn_mask = attn_mask[: inputs[0].shape[-2], : inputs[1].shape[-2]]
    chosen = fastformer.explain(getattr(fastformer, SDPA), *inputs, attn_mask=attn_mask)
    assert chosen.backends == {"attention_fwd": "cpu", "attention_bwd": "cpu"}, str(chosen)


MASK_SHAPES = ((5, 7), (1, 7), (5, 1), (3, 5, 7), (2, 1, 5, 7), (2, 3, 1, 7), (1, 1, 1, 7), (2, 3, 5, 7))


@pytest.mark.parametrize("mask_shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ("bool", "float", "float with grad"))
def test_masks(kind, mask_shape):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        (mask,) = tensors(mask_shape, dtype=dtype, seed=3)
        mask = mask.detach()
        if mask_shape[-1] == 1 and kind == "float with grad":
            continue  # see test_a_mask_that_is_constant_over_the_keys_has_no_gradient
        if kind == "bool":
            mask = mask > -0.3
        else:
            mask = mask.masked_fill(mask > 1, -torch.inf).requires_grad_(kind == "float with grad")
        judge_against_torch(SDPA, (tensors(*SHAPES["4-D"], dtype=dtype), {"attn_mask": mask}), dtype)


def test_a_mask_that_is_constant_over_the_keys_has_no_gradient():
    """What is exactly 0 in mathematics is a sum of 42 terms that cancel, each rounded once."""
    inputs = tensors(*SHAPES["4-D"])
    (wide,) = tensors((2, 3, 5, 7), seed=3)
    narrow = torch.zeros(5, 1, requires_grad=True)
    call = fastformer.scaled_dot_product_attention
    terms = torch.autograd.grad(call(*inputs, attn_mask=wide).sum(), wide)[0].abs().max().item()
    gradient = torch.autograd.grad(call(*inputs, attn_mask=narrow).sum(), narrow)[0]
    assert gradient.abs().max().item() <= 42 * torch.finfo(torch.float32).eps * terms


@pytest.mark.parametrize("rank", (2, 3, 5))
def test_masks_of_other_ranks(rank):
    q, k, v = SHAPES[f"{rank}-D"]
    (mask,) = tensors((*q[:-1], k[-2]), seed=3)
    call = (tensors(q, k, v), {"attn_mask": mask.detach() > 0})
    judge_against_torch(SDPA, call, torch.float32)


@pytest.mark.parametrize("heads", ((4, 2), (6, 1), (4, 4)), ids=str)
def test_enable_gqa(heads):
    H, H_kv = heads
    shapes = ((2, H, 5, 8), (2, H_kv, 7, 8), (2, H_kv, 7, 8))
    for causal, scale in itertools.product((False, True), (None, 0.7)):
        call = (tensors(*shapes), {"enable_gqa": True, "is_causal": causal, "scale": scale})
        judge_against_torch(SDPA, call, torch.float32)


def test_heads_that_differ_need_enable_gqa():
    with pytest.raises(ValueError, match=r"enable_gqa|heads"):
        fastformer.scaled_dot_product_attention(*tensors((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)))


def test_dead_rows():
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    for dtype in (torch.float64, torch.float32):
        judge_against_torch(SDPA, (tensors(*SHAPES["4-D"], dtype=dtype), {"attn_mask": mask}), dtype)
        bias = torch.zeros(5, 7, dtype=dtype).masked_fill(~mask, -torch.inf).requires_grad_()
        judge_against_torch(SDPA, (tensors(*SHAPES["4-D"], dtype=dtype), {"attn_mask": bias}), dtype)


def test_the_largest_negative_number_is_no_mask():
    bias = torch.zeros(5, 7)
    bias[1] = torch.finfo(torch.float32).min
    judge_against_torch(SDPA, (tensors(*SHAPES["4-D"]), {"attn_mask": bias}), torch.float32)


def test_a_float64_mask_on_float32_is_rejected_as_in_torch():
    with pytest.raises((TypeError, ValueError), match=r"attn_mask|mask|bias"):
        fastformer.scaled_dot_product_attention(
            *tensors(*SHAPES["4-D"]), attn_mask=torch.zeros(5, 7, dtype=torch.float64)
        )


def test_torchs_module_accepts_the_function_in_its_place(monkeypatch):
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 6, 32, requires_grad=True)
    wanted = attention(x, x, x, need_weights=False)[0]
    calls = []

    def ours(*args, **kwargs):
        calls.append(1)
        return fastformer.scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(F, SDPA, ours)
    found = attention(x, x, x, need_weights=False)[0]
    assert calls
    torch.testing.assert_close(found, wanted)
