"""What the cuda backend refuses, and why, and what it leaves to Triton."""

import math
import re
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastformer
from fastformer import dispatch
from fastformer.backends import cuda, triton
from fastformer.specs import AttentionSpec, FeedForwardSpec, NormSpec

SPEC = NormSpec("layer", 1e-5)
BUILD = {"nvcc": "13.0.88", "archs": ["8.0", "9.0", "10.0", "12.0+PTX"]}


@pytest.fixture
def machine(monkeypatch):
    """Everything is there: each test takes one thing away."""
    monkeypatch.setattr(cuda, "_build", lambda: (BUILD, ""))
    monkeypatch.setattr(cuda, "_driver_major", lambda: 13)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cached = (cuda.ready, cuda._device_refusal)
    for function in cached:
        function.cache_clear()
    yield monkeypatch
    for function in cached:
        function.cache_clear()


def test_a_full_machine_is_ready(machine):
    assert cuda.ready() is None


@pytest.mark.parametrize(
    "place,name,value,reason",
    [
        (
            cuda,
            "_build",
            lambda: (None, "fastformer._C was built without CUDA: nvcc was not found"),
            "without CUDA",
        ),
        (torch.version, "cuda", None, r"torch .* is built without CUDA"),
        (
            cuda,
            "_driver_major",
            lambda: 12,
            "need a driver for CUDA 13, and the driver serves CUDA 12 at most",
        ),
        (cuda, "_driver_major", lambda: 0, "the driver is not installed"),
        (torch.cuda, "is_available", lambda: False, "sees no GPU"),
        (
            torch.cuda,
            "get_device_capability",
            lambda device: (7, 5),
            "need compute capability 8.0.* has .*7.5",
        ),
        (torch.cuda, "get_device_capability", lambda device: (11, 0), "11.0, built in are 8.0, 9.0"),
    ],
)
def test_what_is_missing_is_said(machine, place, name, value, reason):
    machine.setattr(place, name, value)
    assert re.search(reason, cuda.ready())


@pytest.mark.parametrize(
    "archs,capability,covered",
    [
        (["8.0"], (8, 9), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (9, 1), False),
        (["12.0+PTX"], (11, 0), False),
    ],
)
def test_built_architectures(archs, capability, covered):
    assert cuda._covers(archs, capability) is covered


def test_cpu_tensors_are_refused():
    x = torch.randn(2, 8)
    assert "not cpu" in cuda.why_not("norm_fwd", SPEC, (x, None, None, None, None))
    with pytest.raises(fastformer.BackendError, match="it serves CUDA tensors, not cpu"):
        fastformer.layer_norm(x, (8,), backend="cuda")


@pytest.mark.parametrize("op", ["rope_fwd"])
def test_operators_to_come_are_refused(machine, op):
    assert cuda.why_not(op, None, (torch.randn(2, 8),)) == f"it has no {op} yet"


def test_float64_is_refused(machine):
    x = OnCuda((2, 8), torch.float64)
    assert "not float64" in cuda.why_not("norm_fwd", SPEC, (x, None, None, None, None))


GPU = torch.device("cuda", 0)


@dataclass
class OnCuda:
    """As much of a CUDA tensor as a refusal asks for, without a GPU."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = GPU

    def is_floating_point(self):
        return self.dtype.is_floating_point

    def numel(self):
        return math.prod(self.shape)

    def dim(self):
        return len(self.shape)


def attention_tensors(M=40, N=40, D=64, D_v=64, **more):
    shapes = ((2, 4, M, D), (2, 2, N, D), (2, 2, N, D_v))
    return *(OnCuda(shape, **more) for shape in shapes), *(None,) * 9


@pytest.mark.parametrize(
    "given, spec, reason",
    [
        ({}, {}, None),
        ({"D": 1, "D_v": 256}, {}, None),
        ({"M": 1, "N": 100_000}, {}, None),
        ({"dtype": torch.float16}, {"left": 3, "softcap": 2.0, "dropout_p": 0.1}, None),
        ({"dtype": torch.float32}, {}, None),
        ({"D": 257}, {}, "head dims of 1 to 256, and query's is 257"),
        ({"D_v": 0}, {}, "head dims of 1 to 256, and value's is 0"),
        ({"M": 2**28, "N": 2**28}, {}, "536870912 queries and keys of a head"),
        ({}, {"return_weights": "mean"}, None),
    ],
)
@pytest.mark.parametrize("op", ("attention_fwd", "attention_bwd"))
def test_what_attention_refuses(machine, op, given, spec, reason):
    said = cuda.why_not(op, AttentionSpec(0.1, **spec), attention_tensors(**given))
    assert said is None if reason is None else reason in said


def feed_forward_tensors(rows=4096, E=64, F=256, E_out=64, **more):
    shapes = (rows, E), (F, E), (F,), None, None, (E_out, F), (E_out,), None
    return tuple(shape and OnCuda(shape, **more) for shape in shapes)


@pytest.mark.parametrize(
    "given, reason",
    [
        ({}, None),
        ({"rows": 1, "E": 1, "F": 1, "E_out": 1, "dtype": torch.float16}, None),
        ({"dtype": torch.float32}, None),
        ({"dtype": torch.float64}, "not float64"),
        ({"rows": 2**31}, "at most 2147418112 rows"),
        ({"F": 2**31}, "at most 2147418112 rows, and such widths"),
    ],
)
@pytest.mark.parametrize("op", ("feed_forward_fwd", "feed_forward_bwd"))
def test_what_feed_forward_refuses(machine, op, given, reason):
    said = cuda.why_not(op, FeedForwardSpec("gelu"), feed_forward_tensors(**given))
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize(
    "capability, given, first",
    [
        ((8, 0), {}, "cuda"),
        ((9, 0), {}, "triton"),
        ((9, 0), {"rows": 128}, "triton"),
        ((9, 0), {"rows": 127}, "cuda"),
        ((12, 0), {}, "cuda"),
        *((capability, {"dtype": torch.float32}, "cuda") for capability in ((8, 0), (9, 0))),
        *((capability, {"dtype": torch.float32}, "triton") for capability in ((8, 6), (10, 0), (12, 0))),
        ((8, 0), {"dtype": torch.float32, "rows": 1}, "cuda"),
    ],
)
def test_feed_forward_goes_to_the_faster_kernel(machine, capability, given, first):
    machine.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    machine.setattr(triton, "why_not", lambda op, spec, tensors: None)
    spec, tensors = FeedForwardSpec("gelu"), feed_forward_tensors(**given)
    for op in ("feed_forward_fwd", "feed_forward_bwd"):
        assert dispatch.choose(op, spec, tensors, "auto") is dispatch.BACKENDS[first]
        assert dispatch.choose(op, spec, tensors, "cuda") is cuda


@pytest.mark.parametrize(
    "capability, first, float32_first",
    [((8, 0), "cuda", "cuda"), ((12, 0), "cuda", "triton"), ((9, 0), "triton", "cuda")],
)
def test_attention_goes_to_the_faster_kernel(machine, capability, first, float32_first):
    machine.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    machine.setattr(triton, "why_not", lambda op, spec, tensors: None)
    spec, tensors = AttentionSpec(0.1), attention_tensors()
    wide = attention_tensors(dtype=torch.float32)
    for op in ("attention_fwd", "attention_bwd"):
        assert dispatch.choose(op, spec, tensors, "auto") is dispatch.BACKENDS[first]
        assert dispatch.choose(op, spec, wide, "auto") is dispatch.BACKENDS[float32_first]
        assert dispatch.choose(op, spec, tensors, "cuda") is cuda
    few = attention_tensors(M=16)
    assert dispatch.choose("attention_fwd", spec, few, "auto") is cuda
    assert not cuda.gives_way("paged_attention_fwd", tensors)
    machine.setattr(triton, "why_not", lambda op, spec, tensors: "it is not installed")
    assert dispatch.choose("attention_fwd", spec, tensors, "auto") is cuda


def test_giving_way_is_explained(machine):
    machine.setattr(dispatch, "_CONFIGURATION", {})  # fake tensors have no data pointers
    machine.setattr(triton, "why_not", lambda op, spec, tensors: None)
    with FakeTensorMode():
        query = torch.empty(2, 4, 64, 32, device="cuda", dtype=torch.bfloat16)
        explanation = fastformer.explain(fastformer.attention, query, query, query)
    assert explanation.backend == "triton"
    said = "cuda serves {} too, and gives way to triton here"
    assert explanation.notes == tuple(said.format(op) for op in ("attention_fwd", "attention_bwd"))
