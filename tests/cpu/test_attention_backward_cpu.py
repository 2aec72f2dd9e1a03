"""attention with gradients and weights at every ISA level; the contract's own tests see only the best."""

from __future__ import annotations

import pytest
import torch

import fastformer
from fastformer.backends import cpu
from fastformer.testing import attention_inputs, outputs_and_gradients

from ..ops import plain
from ..ops.judging import DTYPES, assert_same_bits, judge
from ..ops.philox import attention_keep

if cpu.ready() is not None:
    pytest.skip(cpu.ready(), allow_module_level=True)

# Where a block of keys of backward ends (128), where one of queries does (96), and neither.
LENGTHS = ((1, 1), (5, 128), (12, 129), (96, 127), (97, 257), (193, 40))


def floats(*shape, dtype=torch.float32, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def bools(*shape, share=0.6, seed=6):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def check(inputs, **plain_only):
    if plain_only:
        fn_only = {"dropout_p": 0.3, "seed": 9}
        judge(
            fastformer.attention,
            plain.attention,
            inputs,
            backend="cpu",
            fn_only=fn_only,
            plain_only=plain_only,
        )
    else:
        judge(fastformer.attention, plain.attention, inputs, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "D_v"), [(1, 3), (17, 40), (64, 64), (80, 129), (256, 200)])
def test_head_dims(D, D_v, dtype):
    inputs = attention_inputs(1, 4, 37, 150, D, D_v=D_v, H_kv=2, dtype=dtype, requires_grad=True)
    check(inputs | {"causal": "lower_right", "return_lse": True})


@pytest.mark.parametrize(("M", "N"), LENGTHS)
@pytest.mark.parametrize("causal", (False, "upper_left", "lower_right"))
def test_lengths(M, N, causal):
    check(attention_inputs(1, 2, M, N, 24, requires_grad=True) | {"causal": causal, "return_lse": True})


@pytest.mark.parametrize("window", [(0, 0), (7, None), (None, 3), (130, 20)])
def test_windows(window):
    for M, N in ((150, 290), (290, 150)):
        inputs = attention_inputs(1, 2, M, N, 16, requires_grad=True)
        check(inputs | {"window": window, "corner": "lower_right", "return_lse": True})


BIAS_SHAPES = [(b, h, m, n) for b in (1, 2) for h in (1, 3) for m in (1, 50) for n in (1, 140)]


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_bias_of_every_shape(shape):
    inputs = attention_inputs(2, 3, 50, 140, 16, requires_grad=True)
    sink = floats(3, seed=7)
    check(inputs | {"bias": floats(*shape), "sink": sink, "softcap": 3.0, "return_lse": True})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_at_once(dtype):
    inputs = attention_inputs(2, 4, 110, 270, 40, D_v=24, H_kv=2, dtype=dtype, requires_grad=True)
    inputs |= {
        "mask": bools(2, 1, 110, 270),
        "key_padding_mask": bools(2, 270, share=0.9, seed=8),
        "key_lengths": torch.tensor([270, 140]),
        "window": (150, 60),
        "corner": "lower_right",
        "bias": floats(1, 4, 110, 270, dtype=dtype),
        "relative_bias": floats(4, 379, dtype=dtype, seed=9),
        "softcap": 5.0,
        "sink": floats(4, dtype=dtype, seed=10),
        "return_lse": True,
        "return_weights": True,
    }
    check(inputs)
    check(
        inputs, keep=attention_keep(2, 4, 110, 270, 9, 0.3), keep_scale=65536 / (65536 - round(0.3 * 65536))
    )


@pytest.mark.parametrize("weights", ("per_head", "mean"))
def test_weights(weights):
    inputs = attention_inputs(2, 3, 60, 200, 16, requires_grad=True)
    inputs |= {"return_weights": weights, "causal": "lower_right", "relative_bias": floats(1, 259)}
    check(inputs)


def test_sequences_packed_together_are_what_each_is_alone():
    lengths_q, lengths_k = (30, 0, 111, 1), (140, 5, 20, 0)
    bounds = [torch.tensor((0, *lengths)).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    query = floats(sum(lengths_q), 4, 24)
    key, value = floats(sum(lengths_k), 2, 24, seed=6), floats(sum(lengths_k), 2, 8, seed=7)
    how = {"causal": "lower_right", "return_lse": True, "backend": "cpu"}
    packed = outputs_and_gradients(
        fastformer.attention,
        query=query,
        key=key,
        value=value,
        cu_seqlens_q=bounds[0],
        cu_seqlens_k=bounds[1],
        **how,
    )
    assert packed["out0"].shape == (142, 4, 8) and packed["out1"].shape == (4, 142)
    for q, k in zip(zip(bounds[0], bounds[0][1:]), zip(bounds[1], bounds[1][1:]), strict=True):  # noqa: B905
        alone = fastformer.attention(
            *(t[slice(*at)].transpose(0, 1)[None] for t, at in ((query, q), (key, k), (value, k))), **how
        )
        torch.testing.assert_close(packed["out0"][slice(*q)], alone[0][0].transpose(0, 1), rtol=0, atol=0)
        torch.testing.assert_close(packed["out1"][:, slice(*q)], alone[1][0], rtol=0, atol=0)


# The gradient of a bias comes from backward's own tiles or from a pass of its own, as the threads are many.
@pytest.mark.parametrize(
    ("dtype", "bias"),
    [
        (torch.float32, (1, 1, 700, 1100)),
        (torch.bfloat16, (1, 4, 700, 1100)),
        (torch.float32, (2, 1, 1, 1100)),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_threads(dtype, bias):
    inputs = attention_inputs(2, 4, 700, 1100, 32, H_kv=2, dtype=dtype, requires_grad=True)
    inputs |= {"bias": floats(*bias, dtype=dtype), "relative_bias": floats(4, 1799), "sink": floats(4)}
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(
            outputs_and_gradients(
                fastformer.attention, **inputs, return_lse=True, return_weights="mean", dropout_p=0.1, seed=3,
                backend="cpu",
            )
        )  # fmt: skip
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])
