"""Attention's gradients and returned weights on the Triton backend, by its interpreter."""

from __future__ import annotations

import pytest
import torch

import fastformer
from fastformer.testing import attention_inputs, outputs_and_gradients, poison_keys
from tests.ops.attention_cases import CASES, PACKED, Draw, call, kernels_serve, packed_call
from tests.ops.attention_draws import Drawn
from tests.ops.attention_judge import judge_attention
from tests.ops.judging import DTYPES, assert_same_bits
from tests.ops.test_attention_properties import ALL, FEATURES, PAIRS, WITHOUT_SHRINKING, sweep

LAYOUTS = ("transposed", "sliced", "unaligned", "last_strided", "broadcast")
# Broadcast over nothing, over each dimension and over all of them.
BIAS_SHAPES = ((2, 3, 40, 70), (1, 3, 40, 70), (2, 1, 40, 70), (2, 3, 1, 70), (2, 3, 40, 1), (1, 1, 1, 1))


def check(drawn, dtype):
    inputs, fn_only, plain_only = drawn.inputs(dtype)
    judge_attention(inputs, backend="triton", fn_only=fn_only, plain_only=plain_only)


@pytest.mark.slow
@pytest.mark.parametrize("feature", ("nothing", *FEATURES))
def test_alone(feature):
    sweep(check, (feature,), 6, DTYPES, phases=WITHOUT_SHRINKING)


@pytest.mark.parametrize("features", ALL, ids=("lower_right", "upper_left", "packed"))
def test_all_at_once(features):
    sweep(check, features, 1, DTYPES, phases=WITHOUT_SHRINKING)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_in_pairs(pair):
    sweep(check, pair, 4, DTYPES, phases=WITHOUT_SHRINKING)


@pytest.mark.slow
@pytest.mark.parametrize("features", ALL, ids=("lower_right", "upper_left", "packed"))
def test_all_at_once_many_times(features):
    sweep(check, features, 60, DTYPES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case(name, dtype):
    inputs = call(name, dtype, return_lse=True)
    judge_attention(inputs, backend="triton", must_serve=kernels_serve(inputs))


@pytest.mark.parametrize("name", PACKED)
def test_packed(name):
    inputs, longest = packed_call(name, DTYPES[list(PACKED).index(name) % 3])
    judge_attention(inputs, backend="triton", fn_only=longest)


@pytest.mark.parametrize(
    "layout",
    ("sliced", *(pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS if layout != "sliced")),
)
def test_layouts(layout):
    """Everything outside the tensors' own elements is NaN."""
    inputs = attention_inputs(B=1, H=2, M=20, N=45, D=20, layout=layout, requires_grad=True)
    judge_attention(inputs, backend="triton")


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_bias_of_every_shape(shape):
    d = Draw(torch.float32)
    inputs = attention_inputs(2, 3, 40, 70, 16, requires_grad=True)
    more = {"bias": d.floats(*shape), "sink": d.floats(3), "softcap": 3.0, "return_lse": True}
    judge_attention(inputs | more, backend="triton")


@pytest.mark.parametrize("rows", (1, 2))
@pytest.mark.parametrize(("M", "N"), ((33, 70), (70, 33), (1, 70), (70, 1)))
def test_relative_bias(M, N, rows):
    d = Draw(torch.float32)
    inputs = attention_inputs(2, 2, M, N, 16, requires_grad=True)
    judge_attention(inputs | {"relative_bias": d.floats(rows, M + N - 1)}, backend="triton")


def test_chains_of_float32_are_short():
    """Beside torch's products, which are summed up in lanes: one chain over 96 columns of a large product is
    five times as far from exact, and 1.4 times as far as is allowed."""
    drawn = Drawn(
        2,
        2,
        2,
        85,
        2,
        96,
        96,
        "contiguous",
        1725,
        (),
        (),
        {"relative_bias": {"rows": "H", "wide": False}, "lse": True},
    )
    check(drawn, torch.float32)


@pytest.mark.parametrize("weights", ("per_head", "mean"))
def test_weights(weights):
    inputs = attention_inputs(2, 4, 37, 70, 16, H_kv=2, requires_grad=True)
    inputs |= {"return_weights": weights, "causal": "lower_right", "return_lse": True}
    judge_attention(inputs, backend="triton")


def test_heads_of_a_group_see_different_keys():
    """No query head sees a whole tile of keys that the other one reads."""
    inputs = attention_inputs(1, 4, 20, 160, 16, H_kv=2, requires_grad=True)
    mask = torch.zeros(1, 4, 1, 160, dtype=torch.bool)
    mask[:, 0, :, :10] = mask[:, 1, :, 140:] = mask[:, 2, :, 60:70] = mask[:, 3, :, 3:150:2] = True
    judge_attention(inputs | {"mask": mask, "return_lse": True}, backend="triton")


@pytest.mark.parametrize("poison", (torch.nan, torch.inf), ids=str)
def test_hidden_keys_under_a_softcap_change_no_bit(poison):
    inputs = attention_inputs(H=2, M=20, N=70, D=40, requires_grad=True)
    real = Draw(torch.float32).bools(2, 70, p=0.5)
    how = {"key_padding_mask": real, "softcap": 3.0, "return_lse": True, "return_weights": True}
    how["backend"] = "triton"
    clean = outputs_and_gradients(fastformer.attention, **inputs, **how)
    poisoned = dict(inputs)
    poisoned["key"], poisoned["value"] = (
        t.requires_grad_()
        for t in poison_keys(inputs["key"].detach(), inputs["value"].detach(), real, poison)
    )
    assert_same_bits(clean, outputs_and_gradients(fastformer.attention, **poisoned, **how))


def test_twice_the_same_bits():
    inputs = attention_inputs(1, 2, 70, 80, 16, dtype=torch.float16, requires_grad=True)
    how = {"dropout_p": 0.3, "seed": 5, "causal": "lower_right", "return_lse": True, "backend": "triton"}
    first, second = (outputs_and_gradients(fastformer.attention, **inputs, **how) for _ in range(2))
    assert_same_bits(first, second)


def test_wide_heads_with_dropout_and_biases():
    """Whose gradients of values are added up after those of keys."""
    nowhere = {"broadcast": (False,) * 4, "layout": "contiguous"}
    choices = {
        "mask": nowhere | {"dead_rows": True},
        "bias": nowhere | {"wide": False, "kind": "plain"},
        "dropout": {"p": 0.25, "seed": 7},
        "lse": True,
    }
    check(Drawn(1, 2, 1, 20, 40, D=200, D_v=24, layout="contiguous", seed=3, choices=choices), torch.float32)
