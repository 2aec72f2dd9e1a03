"""torch.compile with one graph and dynamic shapes, torch.export and fake tensors, for every operator."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import fastformer
from fastformer.testing import assert_as_accurate, attention_inputs, outputs_and_gradients

from . import plain
from .judging import HAS_EXTENSION
from .operators import OPERATORS, as_tuple, called_operators

# A compilation takes seconds, so every run compiles one operator of each kind, and -m slow all of them.
SOME = (
    "attention, all arguments",
    "layer_norm",
    "add_norm, dropout",
    "feed_forward, swiglu",
)


def every_operator_slowly(*always):
    return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in OPERATORS]


@pytest.fixture(autouse=True)
def fresh_dynamo(monkeypatch):
    # pytest captures every log, and torch writes long traces for whoever listens.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def named(inputs):
    return {f"t{index}": t for index, t in enumerate(inputs)}


def by_name(fn):
    return lambda **tensors: as_tuple(fn(*tensors.values()))


@pytest.mark.parametrize("name", every_operator_slowly(*SOME))
def test_one_graph_with_dynamic_shapes(name):
    operator = OPERATORS[name]
    compiled = torch.compile(operator.ours, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = named(operator.inputs(torch.float32))
    found = outputs_and_gradients(by_name(compiled), **inputs)
    baseline = outputs_and_gradients(by_name(operator.plain), **inputs)
    exact = outputs_and_gradients(by_name(operator.plain), **named(operator.inputs(torch.float64)))
    assert_as_accurate(found, baseline, exact, name)
    with torch.no_grad():
        forward = as_tuple(compiled(*operator.inputs(torch.float32, requires_grad=False)))
    for index, out in enumerate(forward):
        key = f"out{index}"
        assert_as_accurate(out, baseline[key], exact[key], f"{name}, without gradient, {key}")


DYNAMIC = {
    "attention": lambda n: tuple(attention_inputs(B=n, H=4, M=3 * n, N=5 * n, D=8, seed=n).values()),
    "layer_norm": lambda n: (torch.randn(n, 2 * n, 16),),
    "add_norm": lambda n: (torch.randn(n, 2 * n, 16), torch.randn(n, 2 * n, 16)),
    "feed_forward": lambda n: (torch.randn(n, 2 * n, 8), torch.randn(20, 8), torch.randn(8, 20)),
}
DYNAMIC_CALLS = {
    "attention": lambda q, k, v: fastformer.attention(q, k, v, causal="lower_right"),
    "layer_norm": lambda x: fastformer.layer_norm(x, (16,)),
    "add_norm": lambda x, residual: fastformer.add_norm(x, residual, kind="rms"),
    "feed_forward": lambda x, w1, w2: fastformer.feed_forward(x, w1, None, w2, None, activation="silu"),
}


@pytest.mark.parametrize("grad", (pytest.param(False, marks=pytest.mark.slow), True), ids=("", "grad"))
@pytest.mark.parametrize("name", DYNAMIC)
def test_another_shape_compiles_nothing_new(name, grad):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(DYNAMIC_CALLS[name], fullgraph=True, dynamic=True, backend=counter)
    compiled_once = None
    for n in (3, 4, 7):
        inputs = tuple(t.requires_grad_(grad) for t in DYNAMIC[name](n))
        found = as_tuple(compiled(*inputs))
        for out, wanted in zip(found, as_tuple(DYNAMIC_CALLS[name](*inputs)), strict=True):
            torch.testing.assert_close(out, wanted)
        if grad:
            sum(out.sum() for out in found).backward()
        compiled_once = compiled_once or counter.frame_count
    assert counter.frame_count == compiled_once
    if HAS_EXTENSION:
        operator = name if name in ("attention", "feed_forward") else "norm"
        assert f"fastformer.{operator}_fwd_cpu.default" in called_operators(*counter.graphs)


def test_a_block_under_inductor():
    def block(query, key, value, residual, weight, bias):
        out = fastformer.attention(query, key, value, causal=True)
        out = out.transpose(1, 2).flatten(2)
        normed, s = fastformer.add_norm(out * 0.5, residual, weight, bias)
        return normed.tanh(), s

    def plain_block(query, key, value, residual, weight, bias):
        out = plain.attention(query, key, value, causal=True)
        out = out.transpose(1, 2).flatten(2)
        normed, s = plain.add_norm(out * 0.5, residual, weight, bias)
        return normed.tanh(), s

    def inputs(dtype):
        more = {"residual": torch.randn(2, 33, 64), "weight": torch.randn(64), "bias": torch.randn(64)}
        more = {name: t.to(dtype).requires_grad_() for name, t in more.items()}
        return attention_inputs(dtype=dtype, requires_grad=True) | more

    torch.manual_seed(0)
    narrow = inputs(torch.float32)
    wide = {name: t.detach().double().requires_grad_() for name, t in narrow.items()}
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    found = outputs_and_gradients(lambda **t: compiled(**t), **narrow)
    baseline = outputs_and_gradients(plain_block, **narrow)
    assert_as_accurate(found, baseline, outputs_and_gradients(plain_block, **wide), "inductor")


def test_compiled_dropout_follows_manual_seed():
    def step(x, residual):
        return fastformer.add_norm(x, residual, dropout_p=0.5)[1]

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    x, residual = torch.ones(8, 64), torch.zeros(8, 64)
    torch.manual_seed(5)
    first, second = compiled(x, residual), compiled(x, residual)
    torch.manual_seed(5)
    assert torch.equal(compiled(x, residual), first)
    assert torch.equal(compiled(x, residual), second)
    assert not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 2.0}


def test_a_compiled_function_obeys_use_backend():
    def step(x):
        return fastformer.layer_norm(x, (16,))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    with fastformer.use_backend("reference"):
        torch.testing.assert_close(compiled(x), step(x))
    torch.testing.assert_close(compiled(x), step(x))


@pytest.mark.parametrize("name", every_operator_slowly("attention, all arguments"))
def test_export(name):
    operator = OPERATORS[name]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return as_tuple(operator.ours(*tensors))

    inputs = operator.inputs(torch.float32, requires_grad=False)
    program = torch.export.export(Module(), inputs)
    for found, wanted in zip(program.module()(*inputs), as_tuple(operator.ours(*inputs)), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", DYNAMIC)
def test_export_with_dynamic_shapes(name):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return as_tuple(DYNAMIC_CALLS[name](*tensors))

    auto = torch.export.Dim.AUTO
    inputs = DYNAMIC[name](3)
    shapes = tuple(
        (auto, auto, auto, None) if t.dim() == 4 else (auto, auto, None) if t.dim() == 3 else None
        for t in inputs
    )
    program = torch.export.export(Module(), inputs, dynamic_shapes={"tensors": shapes})
    for n in (3, 5):
        inputs = DYNAMIC[name](n)
        found, wanted = program.module()(*inputs), as_tuple(DYNAMIC_CALLS[name](*inputs))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_tensors_have_the_real_shapes(name):
    operator = OPERATORS[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        inputs = operator.inputs(dtype, requires_grad=False)
        real = as_tuple(operator.ours(*inputs))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = as_tuple(operator.ours(*(mode.from_tensor(t) for t in inputs)))
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())
