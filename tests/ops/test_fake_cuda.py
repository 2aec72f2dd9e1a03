"""Calls on CUDA tensors traced where no GPU is: the Triton backend is chosen, and nothing runs.

Without gradients, because torch's autograd ends the process at a CUDA tensor that it has no GPU for, and
without arguments that are indexed on the way, which it refuses.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton")

import fastformer
from fastformer.backends import cuda
from fastformer.backends import triton as backend
from fastformer.ops.attention import _ATTENTION
from fastformer.ops.autograd import Call
from fastformer.ops.feed_forward import _FEED_FORWARD
from fastformer.ops.norm import _NORM
from fastformer.specs import AttentionSpec, FeedForwardSpec, NormSpec

from .operators import as_tuple, called_operators

H, D, E, F = 4, 16, 24, 40
BF16, F32 = torch.bfloat16, torch.float32


def attention(q, k, v, mask, bias, seed):
    more = {"mask": mask, "bias": bias, "dropout_p": 0.1, "seed": seed}
    return fastformer.attention(q, k, v, causal="lower_right", return_lse=True, **more)


def feed_forward(x, w1, w2, w_gate):
    return fastformer.feed_forward(x, w1, None, w2, None, w_gate=w_gate, activation="swiglu")


def paged_attention(*tensors):
    return fastformer.paged_attention(*tensors, window=(30, None), return_lse=True)


# {operator: (call, shapes and dtypes of its tensors for n rows)}.
CALLS = {
    "attention": (
        attention,
        lambda n: (
            *(((2, H, m, D), BF16) for m in (n, 3 * n, 3 * n)),
            ((2, 1, n, 3 * n), torch.bool),
            ((1, H, n, 3 * n), BF16),
            ((1,), torch.int64),
        ),
    ),
    "paged_attention": (
        paged_attention,
        lambda n: (
            ((2, H, n, D), BF16),
            *(((5 * n, 2 * n, 2, D), BF16),) * 2,
            ((2, 3 * n), torch.int32),
            ((2,), torch.int64),
        ),
    ),
    "norm": (
        lambda x, residual, weight: fastformer.add_norm(x, residual, weight, dropout_p=0.1),
        lambda n: (((n, 2 * n, E), BF16), ((n, 2 * n, E), F32), ((E,), BF16)),
    ),
    "feed_forward": (
        feed_forward,
        lambda n: (((n, 2 * n, E), BF16), ((F, E), BF16), ((E, F), BF16), ((F, E), BF16)),
    ),
}


def tensors(name, n, device):
    return tuple(torch.ones(shape, dtype=dtype, device=device) for shape, dtype in CALLS[name][1](n))


def facts(results):
    return [(t.shape, t.dtype, t.stride()) for t in as_tuple(results)]


@pytest.fixture(autouse=True)
def no_gpu():
    """As where torch sees none; what was found out about the device is not kept."""
    with pytest.MonkeyPatch.context() as patch:
        # pytest captures every log, and torch writes long traces for whoever listens.
        patch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for question in (backend._device_refusal, cuda._device_refusal, cuda.ready):
            question.cache_clear()
        torch._dynamo.reset()
        yield
    for question in (backend._device_refusal, cuda._device_refusal, cuda.ready):
        question.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_triton_is_chosen_for_fake_tensors(name):
    call, _ = CALLS[name]
    wanted = facts(call(*tensors(name, 3, "cpu")))
    with FakeTensorMode():
        inputs = tensors(name, 3, "cuda")
        assert fastformer.explain(call, *inputs).backends[f"{name}_fwd"] == "triton"
        found = as_tuple(call(*inputs))
    assert facts(found) == wanted
    assert all(out.device == torch.device("cuda", 0) for out in found)


@pytest.mark.parametrize("name", CALLS)
def test_compiled_in_one_graph_with_dynamic_shapes(name):
    call, _ = CALLS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for n in (3, 5):
        wanted = facts(call(*tensors(name, n, "cpu")))
        with FakeTensorMode(shape_env=ShapeEnv()):
            found = compiled(*tensors(name, n, "cuda"))
        assert facts(found) == wanted
        assert all(out.device.type == "cuda" for out in as_tuple(found))
    assert f"fastformer.{name}_fwd_triton.default" in called_operators(*counter.graphs)


@pytest.mark.parametrize("name", CALLS)
def test_exported_with_dynamic_shapes(name):
    call, _ = CALLS[name]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return as_tuple(call(*tensors))

    with FakeTensorMode(shape_env=ShapeEnv()):
        inputs = tensors(name, 3, "cuda")
        # A dimension is dynamic where another n changes it.
        shapes = tuple(
            {place: torch.export.Dim.AUTO for place, size in enumerate(t.shape) if size != other.shape[place]}
            for t, other in zip(inputs, tensors(name, 5, "cuda"), strict=True)
        )
        program = torch.export.export(Module(), inputs, dynamic_shapes={"tensors": shapes})
    assert f"fastformer.{name}_fwd_triton.default" in called_operators(program.graph_module)
    out = next(iter(program.graph.output_node().args[0])).meta["val"]
    assert out.device.type == "cuda"
    assert any(isinstance(size, torch.SymInt) for size in out.shape)


def gradients(operator, spec, tensors, needs):
    """Those that backward's raw operator gives, by a call of the Triton backend in both directions."""
    call = Call(operator, spec, backend, backend)
    outputs = operator.forward(call, tensors)
    grads = outputs[: operator.differentiable(spec, tensors)]
    return operator.backward(backend, spec, needs, grads, operator.saved(tensors, outputs))


BACKWARD = {
    "attention": (
        _ATTENTION,
        AttentionSpec(0.3, right=0, dropout_p=0.1),
        lambda at: (*(at(2, H, 5, D) for _ in range(3)), None, None, None, at(H, 5, 5), at(H, 9), at(H)),
    ),
    "norm": (_NORM, NormSpec("layer", 1e-5, 0.1), lambda at: (at(3, 5, E), at(3, 5, E), at(E), at(E))),
    "feed_forward": (
        _FEED_FORWARD,
        FeedForwardSpec("silu", gated=True, dropout_p=0.1),
        lambda at: (at(3, 5, E), at(F, E), at(F), at(F, E), at(F), at(E, F), at(E)),
    ),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_of_fake_tensors(name):
    operator, spec, draw = BACKWARD[name]
    with FakeTensorMode():
        given = draw(lambda *shape: torch.ones(shape, dtype=BF16, device="cuda"))
        seed = torch.ones(1, dtype=torch.int64, device="cuda")
        rest = (None, None) if name == "attention" else ()
        inputs = (*given, seed, *rest)
        needs = (*(t is not None for t in given), False, *(False for _ in rest))
        found = gradients(operator, spec, inputs, needs)
    assert len(found) == len(inputs)
    for gradient, tensor, need in zip(found, inputs, needs, strict=True):
        assert (gradient is not None) == need
        if gradient is not None:
            assert (gradient.shape, gradient.device) == (tensor.shape, torch.device("cuda", 0))


def test_an_old_triton_is_refused_with_its_version(monkeypatch):
    """torch 2.11 brings 3.6 along, whose compiler refuses the kernels."""
    monkeypatch.setattr("triton.__version__", "3.6.0")
    backend._old_triton.cache_clear()
    try:
        with FakeTensorMode():
            x = torch.ones(3, E, device="cuda")
            with pytest.raises(fastformer.BackendError, match=r"triton 3\.7.*3\.6\.0 is installed"):
                fastformer.rms_norm(x, (E,), backend="triton")
    finally:
        backend._old_triton.cache_clear()
