"""Rows and keys of attention that nobody may see, and numbers that are not finite."""

from __future__ import annotations

import functools

import pytest
import torch

import fastformer
from fastformer.testing import attention_inputs, outputs_and_gradients, poison_keys

from .attention_cases import Draw, call
from .attention_judge import judge_attention
from .judging import BACKENDS, DTYPES, assert_same_bits, skip_unless_built


def finite_everywhere(results, but=()):
    return all(value.isfinite().all() for name, value in results.items() if name not in but)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cause", ("mask", "bias", "lengths", "padding", "corner"))
def test_dead_rows_are_zero_and_pass_no_gradient(cause, backend):
    skip_unless_built(backend)
    inputs = attention_inputs(M=40, N=20, requires_grad=True)
    dead = torch.zeros(2, 4, 40, dtype=torch.bool)
    if cause in ("mask", "bias"):
        dead[1, 2, 5:17] = True
        inputs["mask"] = ~dead[..., None].expand(2, 4, 40, 20)
        if cause == "bias":
            inputs["bias"] = torch.zeros(2, 4, 40, 20).masked_fill_(~inputs.pop("mask"), -torch.inf)
            inputs["bias"].requires_grad_()
    elif cause == "lengths":
        dead[0] = True
        inputs["key_lengths"] = torch.tensor([0, 20])
    elif cause == "padding":
        dead[1] = True
        inputs["key_padding_mask"] = torch.tensor([True, False])[:, None].expand(2, 20)
    else:
        dead[..., :20] = True
        inputs["causal"] = "lower_right"
    results = outputs_and_gradients(fastformer.attention, **inputs, return_lse=True, backend=backend)
    out, lse = results["out0"], results["out1"]
    assert (out[dead] == 0).all()
    assert (lse[dead] == -torch.inf).all()
    assert out[~dead].ne(0).any() and lse[~dead].isfinite().all()
    assert finite_everywhere(results, but=("out1",))
    assert (results["d_query"][dead] == 0).all() and results["d_query"][~dead].ne(0).any()
    if cause == "bias":
        assert (results["d_bias"][dead] == 0).all()
    for batch in range(2):
        if dead[batch].all():
            assert (results["d_key"][batch] == 0).all() and (results["d_value"][batch] == 0).all()


@pytest.mark.parametrize("weights", (True, "per_head", "mean"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_rows_have_zero_weights(backend, weights):
    skip_unless_built(backend)
    inputs = call("mask, dead rows", torch.float32, return_weights=weights, backend=backend)
    results = outputs_and_gradients(fastformer.attention, **inputs)
    weights = results["out1"]
    assert finite_everywhere(results)
    dead = ~inputs["mask"].any(-1)
    if weights.dim() == 4:
        assert (weights[dead] == 0).all()
        torch.testing.assert_close(weights.sum(-1), (~dead).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dead_row_with_a_sink_has_the_sink_as_its_lse(backend):
    skip_unless_built(backend)
    inputs = call("sink, dead rows", torch.float32, return_lse=True, backend=backend)
    results = outputs_and_gradients(fastformer.attention, **inputs)
    dead = ~inputs["mask"].expand(2, 4, 33, 45).any(-1)
    sink = inputs["sink"].detach()[None, :, None].expand(2, 4, 33)
    torch.testing.assert_close(results["out1"][dead], sink[dead])
    assert (results["out0"][dead] == 0).all() and finite_everywhere(results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", (torch.nan, torch.inf, -torch.inf), ids=str)
@pytest.mark.parametrize("how", ("padding", "lengths", "mask", "mask per head"))
def test_keys_hidden_from_every_query_change_no_bit(how, poison, backend):
    skip_unless_built(backend)
    N = 150
    for dtype in (torch.float32, torch.bfloat16):
        inputs = attention_inputs(H=2, M=20, N=N, D=40, dtype=dtype, requires_grad=True)
        real = Draw(dtype).bools(2, N, p=0.5)
        if how == "padding":
            arguments = {"key_padding_mask": real}
        elif how == "lengths":
            real = torch.arange(N) < torch.tensor([70, 129])[:, None]
            arguments = {"key_lengths": torch.tensor([70, 129])}
        else:
            arguments = {"mask": real[:, None, None, :]}
        if how == "mask per head":
            arguments["mask"] = real[:, None, None, :].repeat(1, 2, 1, 1)
            arguments["mask"][0, 1] = True
            real[0] = True
        run = functools.partial(
            outputs_and_gradients, fastformer.attention, return_lse=True, backend=backend, **arguments
        )
        clean = run(**inputs)
        inputs["key"], inputs["value"] = poison_keys(inputs["key"], inputs["value"], real, poison)
        poisoned = run(**inputs)
        assert finite_everywhere(poisoned)
        assert_same_bits(clean, poisoned)
        hidden = (~real)[:, None, :].expand(2, 2, N)
        assert (poisoned["d_key"][hidden] == 0).all() and (poisoned["d_value"][hidden] == 0).all()


@pytest.mark.parametrize(
    "arguments", ("bias", "relative_bias", "softcap", "sink", "window", "return_weights", "dropout_p")
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_change_no_bit_of_any_argument(backend, arguments):
    skip_unless_built(backend)
    d, N = Draw(torch.float32), 70
    inputs = attention_inputs(M=40, N=N, requires_grad=True)
    real = d.bools(2, N, p=0.5)
    more = {
        "bias": {"bias": d.floats(4, 40, N)},
        "relative_bias": {"relative_bias": d.floats(4, 40 + N - 1)},
        "softcap": {"softcap": 2.0},
        "sink": {"sink": d.floats(4)},
        "window": {"window": (20, 20)},
        "return_weights": {"return_weights": True},
        "dropout_p": {"dropout_p": 0.3, "seed": 5},
    }[arguments]
    run = functools.partial(
        outputs_and_gradients, fastformer.attention, key_padding_mask=real, backend=backend, **more
    )
    clean = run(**inputs)
    inputs["key"], inputs["value"] = poison_keys(inputs["key"], inputs["value"], real)
    assert_same_bits(clean, run(**inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_query_stays_in_its_row(backend):
    skip_unless_built(backend)
    inputs = attention_inputs(M=40, N=70)
    run = functools.partial(fastformer.attention, return_lse=True, backend=backend)
    out, lse = run(**inputs)
    inputs["query"][1, 2, 7, 3] = torch.nan
    nan_out, nan_lse = run(**inputs)
    assert nan_out[1, 2, 7].isnan().all() and nan_lse[1, 2, 7].isnan()
    out[1, 2, 7], lse[1, 2, 7] = torch.nan, torch.nan
    assert_same_bits({"out": out, "lse": lse}, {"out": nan_out, "lse": nan_lse})


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_the_bias_counts_only_where_it_is_visible(backend):
    skip_unless_built(backend)
    inputs = attention_inputs(M=10, N=10)
    bias = torch.zeros(10, 10)
    run = lambda: fastformer.attention(**inputs, bias=bias, causal=True, backend=backend)
    out = run()
    bias[4, 8] = torch.nan
    assert torch.equal(run(), out)
    bias[4, 2] = torch.nan
    nan_out = run()
    assert nan_out[:, :, 4].isnan().all()
    assert torch.equal(nan_out[:, :, 5:], out[:, :, 5:]) and torch.equal(nan_out[:, :, :4], out[:, :, :4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype, backend):
    inputs = attention_inputs(M=20, N=70, dtype=dtype, requires_grad=True)
    for name in ("query", "key"):
        inputs[name] = (inputs[name].detach() * 100).requires_grad_()
    inputs["causal"] = "lower_right"
    if dtype == torch.float16:
        inputs["scale"] = 2**-10  # torch's own composition, the baseline, holds its scores in float16
    judge_attention(inputs, backend=backend)
