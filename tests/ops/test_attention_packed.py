"""Packed sequences and jagged nested tensors, against the same sequences one after the other."""

from __future__ import annotations

import functools

import pytest
import torch

import fastformer
from fastformer.testing import outputs_and_gradients

from . import plain
from .attention_cases import PACKED, packed_call
from .attention_judge import judge_attention
from .judging import BACKENDS, DTYPES, assert_reference_means_plain, skip_unless_built


@pytest.mark.parametrize("name", PACKED)
def test_packed_reference(name):
    inputs, longest = packed_call(name, torch.float64)
    assert_reference_means_plain(fastformer.attention, plain.packed_attention, inputs)
    assert_reference_means_plain(fastformer.attention, plain.packed_attention, inputs, fn_only=longest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend, name, dtype):
    inputs, longest = packed_call(name, dtype)
    judge_attention(inputs, backend=backend, fn_only=longest)


@pytest.mark.parametrize("weights", ("per_head", "mean"))
@pytest.mark.parametrize("name", ("cross", "empty sequences", "everything"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_packed_sequences(backend, name, weights):
    """[S, H, max M, max N], zeros beyond a sequence's end."""
    inputs, longest = packed_call(name, torch.float32)
    inputs["return_weights"] = weights
    judge_attention(inputs, backend=backend, fn_only=longest)


@pytest.mark.parametrize("name", PACKED)
def test_packed_goes_to_cpu(name):
    skip_unless_built("cpu")
    inputs, _ = packed_call(name, torch.bfloat16)
    chosen = fastformer.explain(fastformer.attention, **inputs)
    assert chosen.backends == {"attention_fwd": "cpu", "attention_bwd": "cpu"}, str(chosen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_do_not_see_each_other(backend):
    skip_unless_built(backend)
    inputs, longest = packed_call("cross", torch.float32)
    run = functools.partial(outputs_and_gradients, fastformer.attention, **longest, backend=backend)
    clean = run(**inputs)
    for name in ("key", "value"):
        poisoned = inputs[name].detach().clone()
        poisoned[40:43] = torch.nan
        inputs[name] = poisoned.requires_grad_()
    dirty = run(**inputs)
    others = torch.cat([torch.arange(5), torch.arange(38, 39)])
    other_keys = torch.cat([torch.arange(40), torch.arange(43, 107)])
    assert dirty["out0"][5:38].isnan().all()
    assert torch.equal(clean["out0"][others], dirty["out0"][others])
    assert torch.equal(clean["d_query"][others], dirty["d_query"][others])
    assert torch.equal(clean["d_key"][other_keys], dirty["d_key"][other_keys])
    assert torch.equal(clean["d_value"][other_keys], dirty["d_value"][other_keys])


@pytest.mark.parametrize("causal", (False, True), ids=("", "causal"))
def test_jagged_nested_tensors(causal):
    sizes, H, D = (5, 33, 1), 4, 16
    generator = torch.Generator().manual_seed(0)
    pieces = [[torch.randn(n, H, D, generator=generator) for n in sizes] for _ in range(3)]
    leaves = [torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True) for parts in pieces]
    # One ragged structure for all three, as one projection would give them.
    key, value = (
        torch.nested.nested_tensor_from_jagged(leaf.values(), leaves[0].offsets()) for leaf in leaves[1:]
    )
    query = leaves[0]
    out = fastformer.attention(*(t.transpose(1, 2) for t in (query, key, value)), causal=causal)
    assert out.is_nested and out.layout == torch.jagged
    for index, found in enumerate(out.unbind()):
        q, k, v = (parts[index].transpose(0, 1)[None] for parts in pieces)
        torch.testing.assert_close(found, plain.attention(q, k, v, causal=causal)[0])
    out.values().square().sum().backward()
    assert query.grad is not None and query.grad.values().abs().sum() > 0
