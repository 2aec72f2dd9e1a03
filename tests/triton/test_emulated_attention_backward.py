"""Attention with gradients on the Triton backend: its PTX for sm_80 and sm_90, run by ptxvm."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import fastformer
from fastformer.testing import attention_inputs, outputs_and_gradients
from tests.ops.attention_cases import Draw
from tests.ops.attention_judge import judge_attention
from tests.ops.judging import DTYPES, assert_same_bits

from .offline import Emulation

BF16 = torch.bfloat16


@pytest.fixture(params=["sm_80", "sm_90"])
def emulation(request, monkeypatch):
    return Emulation(monkeypatch, request.param)


def everything(dtype, D, D_v):
    d = Draw(dtype)
    inputs = attention_inputs(1, 4, 37, 70, D, D_v=D_v, H_kv=2, dtype=dtype, requires_grad=True)
    return inputs | {
        "mask": d.bools(1, 1, 37, 70),
        "key_padding_mask": d.bools(1, 70),
        "window": (40, 30),
        "corner": "lower_right",
        "bias": d.floats(1, 4, 1, 70),
        "relative_bias": d.floats(4, 106),
        "softcap": 5.0,
        "sink": d.floats(4),
        "return_lse": True,
        "return_weights": True,
    }


def test_causal(emulation):
    inputs = attention_inputs(1, 2, 150, 170, 64, H_kv=1, dtype=BF16, requires_grad=True)
    judge_attention(inputs | {"causal": "lower_right", "return_lse": True}, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "D_v"), [(64, 64), (40, 96), (128, 128), (7, 256)])
@pytest.mark.parametrize("causal", (False, "lower_right"))
def test_head_dims(emulation, D, D_v, causal, dtype):
    inputs = attention_inputs(1, 2, 130, 140, D, D_v=D_v, dtype=dtype, requires_grad=True)
    judge_attention(inputs | {"causal": causal, "return_lse": True}, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("softcap", (None, 5.0))
@pytest.mark.parametrize("D", (64, 136, 200))
def test_one_key_weighs_one(emulation, D, softcap):
    """Every pass adds up the products of float32 in one order: else the weight is not 1 to the last place."""
    inputs = attention_inputs(1, 1, 20, 20, D, requires_grad=True)
    inputs |= {"window": (0, 0), "softcap": softcap, "return_weights": True}
    judge_attention(inputs, backend="triton")


# Weights and every gradient: the interpreter takes much that the compiler refuses.
@pytest.mark.parametrize(
    ("D", "D_v", "dtype"),
    [
        (24, 24, BF16),
        *(
            pytest.param(*widths, dtype, marks=pytest.mark.slow)
            for widths in ((64, 64), (40, 96), (7, 256))
            for dtype in DTYPES
        ),
    ],
    ids=str,
)
def test_everything_at_once(emulation, D, D_v, dtype):
    judge_attention(everything(dtype, D, D_v), backend="triton")


@pytest.mark.slow
def test_dropout_twice_the_same_bits(emulation):
    inputs = attention_inputs(1, 2, 50, 70, 64, dtype=BF16, requires_grad=True)
    how = {"dropout_p": 0.3, "seed": 5, "return_weights": True, "backend": "triton"}
    first, second = (outputs_and_gradients(fastformer.attention, **inputs, **how) for _ in range(2))
    assert_same_bits(first, second)
    reference = fastformer.attention(
        **inputs, dropout_p=0.3, seed=5, return_weights=True, backend="reference"
    )[1]
    assert torch.equal(first["out1"] == 0, reference == 0)
