"""The same call twice gives the same bits, gradients included."""

from __future__ import annotations

import functools

import pytest
import torch

import fastformer
from fastformer.testing import attention_inputs, feed_forward_inputs, norm_inputs, outputs_and_gradients

from .attention_cases import cumulated
from .judging import DTYPES, assert_same_bits, skip_unless_built, without_grad


def determinism_calls(dtype):
    attention = attention_inputs(B=3, H=4, H_kv=2, M=70, N=150, D=40, dtype=dtype, requires_grad=True)
    generator = torch.Generator().manual_seed(5)
    floats = lambda *shape: torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    norm = norm_inputs(257, 130, dtype=dtype, requires_grad=True)
    feed = feed_forward_inputs(70, E=48, F=130, gated=True, dtype=dtype, requires_grad=True)
    everything = {
        "mask": torch.rand(3, 4, 70, 150, generator=generator) < 0.8,
        "key_padding_mask": torch.rand(3, 150, generator=generator) < 0.9,
        "key_lengths": torch.tensor([150, 140, 37]),
        "window": (90, 40),
        "corner": "lower_right",
        "bias": floats(1, 4, 1, 150),
        "relative_bias": floats(1, 219),
        "softcap": 5.0,
        "sink": floats(4),
        "return_lse": True,
    }
    packed = {name: t.detach().transpose(1, 2).flatten(0, 1) for name, t in attention.items()}
    packed = {name: t.requires_grad_() for name, t in packed.items()}
    packed |= {"cu_seqlens_q": cumulated(7, 90, 1, 112), "cu_seqlens_k": cumulated(200, 100, 0, 150)}
    return {
        "attention": (fastformer.attention, attention | {"causal": "lower_right", "return_lse": True}),
        "broadcast bias": (
            fastformer.attention,
            attention | {"bias": floats(1, 4, 1, 150), "sink": floats(4)},
        ),
        "whole bias": (fastformer.attention, attention | {"bias": floats(3, 4, 70, 150)}),
        "relative bias": (fastformer.attention, attention | {"relative_bias": floats(1, 219)}),
        "everything": (fastformer.attention, attention | everything | {"return_weights": True}),
        "everything, mean weights": (
            fastformer.attention,
            attention | everything | {"return_weights": "mean"},
        ),
        "packed": (
            fastformer.attention,
            packed | {"relative_bias": floats(4, 112 + 200 - 1), "causal": "lower_right"},
        ),
        "layer": (fastformer.add_norm, norm),
        "rms": (fastformer.add_norm, norm | {"kind": "rms"}),
        "feed_forward": (fastformer.feed_forward, feed | {"activation": "swiglu"}),
        "recompute": (fastformer.feed_forward, feed | {"activation": "geglu", "recompute": True}),
    }


CALLS = tuple(determinism_calls(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_twice_the_same_bits(name, dtype):
    fn, inputs = determinism_calls(dtype)[name]
    dropout = {"dropout_p": 0.1, "seed": torch.tensor([6])}
    for more in ({}, dropout):
        run = functools.partial(outputs_and_gradients, fn, **inputs, **more)
        first = run()
        for _ in range(3):
            assert_same_bits(first, run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_number_of_threads_changes_no_bit_of_the_cpu_backend(name, dtype):
    skip_unless_built("cpu")
    fn, inputs = determinism_calls(dtype)[name]
    dropout = {"dropout_p": 0.1, "seed": torch.tensor([6])}
    threads = torch.get_num_threads()
    try:
        results = {False: [], True: []}
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for dropping, found in results.items():
                more = dropout if dropping else {}
                found.append(outputs_and_gradients(fn, **inputs, **more, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for first, *others in results.values():
        for other in others:
            assert_same_bits(first, other)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "packed"])
def test_an_element_of_the_batch_does_not_depend_on_the_others(name):
    """Rows (norm, feed_forward) and batch elements (attention) computed alone are those computed together."""
    fn, inputs = determinism_calls(torch.float32)[name]
    inputs = without_grad(inputs)
    first = fn(**inputs)
    changed = dict(inputs)
    for key in ("query", "key", "value", "x", "residual"):
        if key in changed:
            changed[key] = changed[key].clone()
            changed[key][1:] += 1
    second = fn(**changed)
    if isinstance(first, torch.Tensor):
        first, second = (first,), (second,)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[0], b[0])
    assert not torch.equal(first[0][1], second[0][1])
