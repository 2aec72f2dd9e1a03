"""paged_attention as a citizen of PyTorch and of this package: errors, explain, compile, transforms."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import fastformer
from fastformer.backends import paged

from . import plain
from .judging import BACKENDS, HAS_EXTENSION, skip_unless_built
from .operators import called_operators
from .paged_cases import floats, paged_inputs


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# What is wrong -> (its kind, the argument that the message must name, the call's other arguments).
WRONG = {
    "query is no tensor": (TypeError, "query", {"query": [[1.0]]}),
    "query of integers": (TypeError, "query", {"query": zeros(2, 4, 1, 16, dtype=torch.int64)}),
    "query of rank 3": (ValueError, "query", {"query": zeros(2, 4, 16)}),
    "query of another D": (ValueError, "query", {"query": zeros(2, 4, 1, 15)}),
    "query of another dtype": (TypeError, "key_pages", {"query": zeros(2, 4, 1, 16, dtype=torch.bfloat16)}),
    "head dim 0": (ValueError, "query", {"query": zeros(2, 4, 1, 0), "key_pages": zeros(7, 16, 2, 0)}),
    "heads that do not divide": (ValueError, "key_pages", {"query": zeros(2, 3, 1, 16)}),
    "key_pages of rank 3": (ValueError, "key_pages", {"key_pages": zeros(7, 16, 16)}),
    "key_pages of bytes": (TypeError, "key_pages", {"key_pages": zeros(7, 16, 2, 16, dtype=torch.uint8)}),
    "no pages": (
        ValueError,
        "key_pages",
        {"key_pages": zeros(0, 16, 2, 16), "value_pages": zeros(0, 16, 2, 16)},
    ),
    "pages of no tokens": (
        ValueError,
        "key_pages",
        {"key_pages": zeros(7, 0, 2, 16), "value_pages": zeros(7, 0, 2, 16)},
    ),
    "value_pages of another dtype": (
        TypeError,
        "value_pages",
        {"value_pages": zeros(7, 16, 2, 16, dtype=torch.float16)},
    ),
    "value_pages of other pages": (ValueError, "value_pages", {"value_pages": zeros(6, 16, 2, 16)}),
    "value_pages of another page size": (ValueError, "value_pages", {"value_pages": zeros(7, 8, 2, 16)}),
    "value_pages of other heads": (ValueError, "value_pages", {"value_pages": zeros(7, 16, 1, 16)}),
    "value_pages elsewhere": (ValueError, "value_pages", {"value_pages": zeros(7, 16, 2, 16).to("meta")}),
    "page_table of int64": (TypeError, "page_table", {"page_table": zeros(2, 4, dtype=torch.int64)}),
    "page_table of floats": (TypeError, "page_table", {"page_table": zeros(2, 4)}),
    "page_table is a list": (TypeError, "page_table", {"page_table": [[0, 1], [2, 3]]}),
    "page_table of rank 1": (ValueError, "page_table", {"page_table": zeros(2, dtype=torch.int32)}),
    "page_table for another batch": (
        ValueError,
        "page_table",
        {"page_table": zeros(3, 4, dtype=torch.int32)},
    ),
    "page_table elsewhere": (
        ValueError,
        "page_table",
        {"page_table": zeros(2, 4, dtype=torch.int32).to("meta")},
    ),
    "lengths is a list": (TypeError, "lengths", {"lengths": [40, 20]}),
    "lengths of floats": (TypeError, "lengths", {"lengths": zeros(2)}),
    "lengths for another batch": (ValueError, "lengths", {"lengths": zeros(3, dtype=torch.int64)}),
    "lengths of rank 2": (ValueError, "lengths", {"lengths": zeros(2, 1, dtype=torch.int64)}),
    "lengths elsewhere": (ValueError, "lengths", {"lengths": zeros(2, dtype=torch.int64).to("meta")}),
    "sink of other heads": (ValueError, "sink", {"sink": zeros(5)}),
    "sink of integers": (TypeError, "sink", {"sink": zeros(4, dtype=torch.int64)}),
    "causal of a corner": (ValueError, "causal", {"causal": "upper_left"}),
    "negative window": (ValueError, "window", {"window": (-1, None)}),
    "window of one": (ValueError, "window", {"window": (1,)}),
    "softcap 0": (ValueError, "softcap", {"softcap": 0.0}),
    "unknown backend": (ValueError, "backend", {"backend": "quantum"}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_named(what):
    kind, argument, wrong = WRONG[what]
    call = paged_inputs((40, 20), spare_pages=2) | wrong
    with pytest.raises(kind, match=rf"\b{argument}\b") as raised:
        fastformer.paged_attention(**call)
    # torch's own complaints ("expected scalar type ...") do not tell what came.
    assert len(str(raised.value)) > len(argument) + 10


def test_dtypes_that_are_wanted_are_told():
    inputs = paged_inputs((40, 20))
    with pytest.raises(TypeError, match=r"torch.int64; wanted int32$"):
        fastformer.paged_attention(**inputs | {"page_table": inputs["page_table"].long()})
    with pytest.raises(TypeError, match=r"torch.int16; wanted int32 or int64$"):
        fastformer.paged_attention(**inputs | {"lengths": inputs["lengths"].to(torch.int16)})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("query", "key_pages", "value_pages", "sink"))
def test_a_gradient_is_refused(name, backend):
    skip_unless_built(backend)
    inputs = paged_inputs((40, 20)) | {"sink": floats(4)}
    wanted = fastformer.paged_attention(**inputs, backend=backend)
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name} requires grad.*no_grad"):
        fastformer.paged_attention(**inputs, backend=backend)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(fastformer.paged_attention(**inputs, backend=backend), wanted)


# --- which backend


def test_explain_tells_of_one_direction():
    inputs = paged_inputs((40, 20))
    explanation = fastformer.explain(fastformer.paged_attention, **inputs)
    assert explanation.backends == {"paged_attention_fwd": "cpu" if HAS_EXTENSION else "reference"}
    assert explanation.refusals.keys() == {"paged_attention_fwd"}
    assert {"cuda", "triton"} <= explanation.refusals["paged_attention_fwd"].keys()
    assert "paged_attention_bwd" not in str(explanation)
    assert not explanation.notes
    strided = paged_inputs((40, 20), layout="last strided")
    notes = fastformer.explain(fastformer.paged_attention, **strided).notes
    assert [note.partition("'")[0] for note in notes] == ["key_pages", "value_pages"]


@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_a_named_backend_that_cannot_serve_says_why(backend):
    with pytest.raises(fastformer.BackendError, match=f"{backend}.*paged_attention_fwd"):
        fastformer.paged_attention(**paged_inputs((40, 20)), backend=backend)


def test_more_keys_than_packed_sequences_count():
    """Nothing is allocated: sizes alone tell."""
    sizes = {"query": (2**15, 1, 1, 8), "key_pages": (1, 2**10, 1, 8), "page_table": (2**15, 2**6)}
    query, key_pages, page_table = (torch.empty(1).expand(size) for size in sizes.values())
    for columns, refused in ((2**6, True), (2**6 - 1, False)):
        tensors = (query, key_pages, key_pages, page_table[:, :columns], None, None)
        assert (paged.refusal(tensors) is not None) == refused


# --- as a citizen of PyTorch


def test_autocast_leaves_the_pages_alone():
    inputs = paged_inputs((40, 20), dtype=torch.bfloat16)
    wanted = fastformer.paged_attention(**inputs)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(fastformer.paged_attention(**inputs | {"query": inputs["query"].float()}), wanted)


def step(query, key_pages, value_pages, page_table, lengths):
    return fastformer.paged_attention(
        query, key_pages, value_pages, page_table, lengths, window=(30, None), return_lse=True
    )


def dynamic_inputs(n, dtype=torch.float32):
    """Every size but the widths changes with n."""
    return tuple(paged_inputs((5 * n, 3, *range(n)), S=2 * n, M=n, spare_pages=n, dtype=dtype).values())


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_another_shape_compiles_nothing_new(fresh_dynamo):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for n in (3, 4, 7):
        inputs = dynamic_inputs(n)
        for found, wanted in zip(compiled(*inputs), step(*inputs), strict=True):
            torch.testing.assert_close(found, wanted)
    assert counter.frame_count == 1
    if HAS_EXTENSION:
        assert "fastformer.paged_attention_fwd_cpu.default" in called_operators(*counter.graphs)


@pytest.mark.slow
def test_the_reference_compiles_in_one_graph(fresh_dynamo):
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with fastformer.use_backend("reference"):
        for n in (3, 5):
            inputs = dynamic_inputs(n)
            for found, wanted in zip(compiled(*inputs), step(*inputs), strict=True):
                torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("kernels", "reference"))
def test_export_with_dynamic_shapes(dtype):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return step(*tensors)

    auto = torch.export.Dim.AUTO
    inputs = dynamic_inputs(3, dtype)
    shapes = tuple((auto,) * t.dim() if t.dim() < 4 else (auto, auto, auto, None) for t in inputs)
    program = torch.export.export(Module(), inputs, dynamic_shapes={"tensors": shapes})
    for n in (3, 5):
        inputs = dynamic_inputs(n, dtype)
        for found, wanted in zip(program.module()(*inputs), step(*inputs), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("M", (1, 5))
def test_fake_tensors_have_the_real_shapes(M):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        inputs = paged_inputs((40, 20), M=M, D_v=24, dtype=dtype)
        real = step(*inputs.values())
        with FakeTensorMode() as mode:
            fake = step(*(mode.from_tensor(t) for t in inputs.values()))
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def test_what_is_gathered_for_a_gpu_waits_for_nothing():
    """Reading a fake tensor's values raises; so would a number of rows that depends on them."""
    inputs = paged_inputs((40, 20, 0), M=3, D_v=24)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in inputs.values()]
        out, lse = paged.paged_attention_fwd("triton", *fakes, None, 0.25, None, 0, None)
    assert out.shape == (3, 4, 3, 24) and lse.shape == (3, 4, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_and_vmap_run_the_reference(backend):
    skip_unless_built(backend)
    dtype = torch.float64 if backend == "reference" else torch.float32
    inputs = paged_inputs((9, 4), S=4, M=2, D=4, dtype=dtype)
    query, *rest = inputs.values()
    ours = lambda q: fastformer.paged_attention(q, *rest, backend=backend)
    formula = lambda q: plain.paged_attention(q, *rest)
    tangent = torch.randn(query.shape, generator=torch.Generator().manual_seed(2)).to(query.dtype)
    found, wanted = (torch.func.jvp(fn, (query,), (tangent,)) for fn in (ours, formula))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    several = torch.stack([query, tangent, query - tangent])
    torch.testing.assert_close(torch.func.vmap(ours)(several), torch.stack([formula(q) for q in several]))
