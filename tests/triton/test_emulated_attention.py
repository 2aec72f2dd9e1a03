"""Attention on the Triton backend: the PTX that Triton compiles for sm_80 and sm_90, run by ptxvm."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import fastformer
from fastformer.testing import attention_inputs
from tests.ops import philox
from tests.ops.attention_cases import CASES, PACKED, Draw, call, kernels_serve, packed_call
from tests.ops.attention_judge import judge_attention
from tests.ops.judging import assert_same_bits, without_grad

from .offline import Emulation

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=["sm_80", "sm_90"])
def emulation(request, monkeypatch):
    return Emulation(monkeypatch, request.param)


def judge_case(name, dtype):
    inputs = call(name, dtype, requires_grad=False, return_lse=True)
    judge_attention(inputs, backend="triton", must_serve=kernels_serve(inputs))


@pytest.mark.parametrize("name", ("everything", "lengths and causal"))
def test_some_cases(emulation, name):
    judge_case(name, BF16)


def test_few_queries_of_grouped_heads(emulation):
    """Rows of a tile are of several heads, and the keys are split."""
    d = Draw(BF16)
    inputs = attention_inputs(1, 6, 3, 600, 24, D_v=40, H_kv=2, dtype=BF16)
    inputs |= {"mask": d.dead_rows(6, 3, 600), "bias": d.floats(6, 3, 600), "sink": d.floats(6)}
    inputs |= {"relative_bias": d.floats(6, 602), "causal": "lower_right"}
    judge_attention(without_grad(inputs) | {"return_lse": True}, backend="triton")
    assert "_combine_kernel" in emulation.counters


def plain_inputs(D, dtype=BF16, **more):
    """Two full blocks of the widest and a ragged one; two tiles of queries."""
    return attention_inputs(B=1, H=2, H_kv=1, M=140, N=300, D=D, dtype=dtype) | {"return_lse": True} | more


def test_full_and_edge_blocks(emulation):
    judge_attention(plain_inputs(64, causal="lower_right"), backend="triton")


@pytest.mark.slow
def test_a_mask_of_wide_float32_heads(monkeypatch):
    """Of which a product in one chain of multiply-adds misses the rule, out by 1.7 times what is allowed."""
    Emulation(monkeypatch, "sm_80")
    inputs = attention_inputs(1, 16, 1, 300, 256) | {"mask": Draw(F32).bools(1, 1, 1, 300)}
    inputs |= {name: inputs[name] * 1.7 for name in ("query", "key")}
    judge_attention(inputs | {"return_lse": True}, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
@pytest.mark.parametrize("D", (64, 80, 128, 256))
def test_full_and_edge_blocks_of_every_width(emulation, D, dtype):
    for more in ({}, {"causal": "lower_right"}, {"window": (90, 40)}, {"key_lengths": torch.tensor([270])}):
        judge_attention(plain_inputs(D, dtype, **more), backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F16, F32), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case(emulation, name, dtype):
    judge_case(name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_packed(emulation, name):
    inputs, longest = packed_call(name, BF16)
    judge_attention(without_grad(inputs), backend="triton", fn_only=longest)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ("transposed", "sliced", "unaligned", "last_strided", "broadcast"))
def test_layouts(emulation, layout):
    for D in (64, 20):
        inputs = attention_inputs(N=150, D=D, dtype=BF16, layout=layout)
        judge_attention(inputs, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", ({}, {"causal": "lower_right"}, {"key_lengths": torch.tensor([1500, 3])}), ids=str
)
def test_many_keys_are_split(emulation, more):
    inputs = attention_inputs(B=2, H=2, M=3, N=1500, D=64, dtype=BF16)
    inputs |= {"sink": Draw(BF16).floats(2).detach(), "return_lse": True} | more
    judge_attention(inputs, backend="triton")
    assert "_combine_kernel" in emulation.counters


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
def test_dropout(emulation, dtype):
    """The contract's map says what is kept; twice gives the same bits."""
    inputs = attention_inputs(B=2, H=3, M=70, N=140, D=32, dtype=dtype)
    dropout = {"dropout_p": 0.3, "seed": torch.tensor([-0x123456789ABCDEF])}
    keep = philox.attention_keep(2, 3, 70, 140, -0x123456789ABCDEF, 0.3)
    plain_only = {"keep": keep, "keep_scale": philox.keep_scale(0.3)}
    judge_attention(inputs, backend="triton", fn_only=dropout, plain_only=plain_only)
    first, second = (fastformer.attention(**inputs, **dropout, backend="triton") for _ in range(2))
    assert_same_bits({"out": first}, {"out": second})
