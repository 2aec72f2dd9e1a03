"""paged_attention against attention of each batch element on its own keys, fetched one by one."""

from __future__ import annotations

import functools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fastformer
from fastformer.testing import outputs_and_gradients

from . import plain
from .judging import (
    BACKENDS,
    DTYPES,
    assert_reference_means_plain,
    assert_same_bits,
    judge,
    skip_unless_built,
)
from .paged_cases import CASES, LAYOUTS, NO_PAGES, floats, paged_call, paged_inputs, real_places

judge_paged = functools.partial(judge, fastformer.paged_attention, plain.paged_attention)


def run(inputs, backend, **more):
    return outputs_and_gradients(fastformer.paged_attention, **inputs, **more, backend=backend)


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    inputs = paged_call(name, torch.float64)
    assert_reference_means_plain(fastformer.paged_attention, plain.paged_attention, inputs)


def in_turn(name):
    """Every case in one dtype; in the others slowly."""
    first = list(CASES).index(name) % len(DTYPES)
    return [
        pytest.param(name, dtype, marks=() if place == first else pytest.mark.slow, id=f"{name}-{dtype}")
        for place, dtype in enumerate(DTYPES)
    ]


@pytest.mark.parametrize("name, dtype", [case for name in CASES for case in in_turn(name)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_case(backend, name, dtype):
    judge_paged(paged_call(name, dtype), backend=backend)


def test_a_head_wider_than_kernels_take():
    inputs = paged_inputs((40, 3), D=300)
    assert fastformer.explain(fastformer.paged_attention, **inputs).backend == "reference"
    judge_paged(inputs, backend=None)


LENGTH = st.integers(0, 90) | st.sampled_from((15, 16, 17, 255, 256, 257))
DRAWN = st.fixed_dictionaries(
    {
        "lengths": st.lists(LENGTH, min_size=1, max_size=5),
        "S": st.sampled_from((1, 2, 16, 17, 64, 256)) | st.integers(1, 40),
        "M": st.sampled_from((1, 1, 2, 3, 4, 5, 20)) | st.integers(1, 70),
        "H_kv": st.integers(1, 3),
        "D": st.integers(1, 40) | st.sampled_from((64, 80, 128)),
        "D_v": st.integers(1, 40) | st.sampled_from((64, 80, 128)),
        "layout": st.sampled_from([layout for layout in LAYOUTS if layout != "keys beside values"]),
        "wide_lengths": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)
SIDE = st.none() | st.integers(0, 5) | st.integers(0, 100)
ARGUMENTS = st.fixed_dictionaries(
    {"causal": st.booleans()},
    optional={
        "window": st.tuples(SIDE, SIDE),
        "softcap": st.sampled_from((1.0, 5.0)),
        "scale": st.sampled_from((0.3, -0.3)),
    },
)


@hypothesis.given(DRAWN, st.integers(1, 3), ARGUMENTS, st.booleans(), st.sampled_from(DTYPES))
def test_any_call(shape, groups, arguments, sink, dtype):
    H = groups * shape["H_kv"]
    inputs = paged_inputs(**shape, H=H, dtype=dtype) | arguments | {"return_lse": True}
    if sink:
        inputs["sink"] = floats(H).to(dtype)
    judge_paged(inputs, backend=None)
    assert_reference_means_plain(fastformer.paged_attention, plain.paged_attention, inputs)


# --- what must change nothing


@pytest.mark.parametrize("value", (torch.nan, torch.inf), ids=str)
@pytest.mark.parametrize("M", (1, 3, 20))
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_in_unreal_places_changes_no_bit(backend, M, value):
    skip_unless_built(backend)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = paged_inputs((40, 16, 17, 0, 1), M=M, dtype=dtype) | {"return_lse": True}
        clean = run(inputs, backend)
        real = real_places(inputs["page_table"], inputs["lengths"], *inputs["key_pages"].shape[:2])
        for name in ("key_pages", "value_pages"):
            inputs[name] = inputs[name].masked_fill(~real[:, :, None, None], value)
        assert_same_bits(clean, run(inputs, backend))
        # Every entry that belongs to no page, each number once in every place.
        used = (3, 1, 2, 0, 1)
        for shift in range(len(NO_PAGES)):
            table = inputs["page_table"].clone()
            for b, count in enumerate(used):
                table[b, count:] = torch.tensor(NO_PAGES).roll(shift)[: table.shape[1] - count]
            assert_same_bits(clean, run(inputs | {"page_table": table}, backend))


@pytest.mark.parametrize("M", (1, 20))
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_order_of_pages_changes_no_bit(backend, M):
    skip_unless_built(backend)
    inputs = paged_inputs((40, 16, 17, 0, 1), M=M) | {"return_lse": True}
    P = inputs["key_pages"].shape[0]
    order = torch.randperm(P, generator=torch.Generator().manual_seed(1))
    number = order.argsort().to(torch.int32)  # of what was page p
    moved = {name: inputs[name][order] for name in ("key_pages", "value_pages")}
    moved["page_table"] = number[inputs["page_table"].long().clamp(0, P - 1)]
    assert not torch.equal(moved["key_pages"], inputs["key_pages"])
    assert_same_bits(run(inputs, backend), run(inputs | moved, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_the_table_and_of_lengths_change_no_bit(backend):
    skip_unless_built(backend)
    inputs = paged_inputs((40, 16, 17, 0, 1)) | {"return_lse": True}
    clean = run(inputs, backend)
    table, lengths = inputs["page_table"], inputs["lengths"]
    second = lambda t: torch.stack([t, t + 1], -1)[..., 0]
    every_second = {"page_table": second(table), "lengths": second(lengths)}
    assert_same_bits(clean, run(inputs | every_second, backend))
    wide = torch.cat([table, table + 1], 1)[:, : table.shape[1]]
    for strided in (wide, table.t().contiguous().t()):
        assert_same_bits(clean, run(inputs | {"page_table": strided}, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_may_share_pages(backend):
    """A common beginning of two whole pages, then each its own."""
    skip_unless_built(backend)
    inputs = paged_inputs((40, 47, 9), S=16, M=3) | {"return_lse": True}
    table = inputs["page_table"]
    table[1, :2] = table[0, :2]
    judge_paged(inputs, backend=backend)
    twice = lambda pages: torch.cat([pages, pages[table[0, :2].long()]])
    copied = {name: twice(inputs[name]) for name in ("key_pages", "value_pages")}
    own = table.clone()
    own[1, :2] = torch.arange(2) + inputs["key_pages"].shape[0]
    assert_same_bits(run(inputs, backend), run(inputs | copied | {"page_table": own}, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_do_not_see_each_other(backend):
    skip_unless_built(backend)
    inputs = paged_inputs((40, 16, 33), M=3) | {"return_lse": True}
    clean = run(inputs, backend)
    own = inputs["page_table"][1, :1].long()
    for name in ("key_pages", "value_pages"):
        inputs[name][own] = torch.nan
    dirty = run(inputs, backend)
    assert dirty["out0"][1].isnan().all()
    for name in clean:
        assert torch.equal(clean[name][::2], dirty[name][::2])


# --- rows without keys, and lengths and numbers that make no sense


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_no_key_gives_zero(backend):
    skip_unless_built(backend)
    inputs = paged_inputs((0, 2, 5), M=4)
    for sink in (None, floats(4)):
        out, lse = fastformer.paged_attention(**inputs, sink=sink, return_lse=True, backend=backend)
        dead = torch.zeros(3, 4, 4, dtype=torch.bool)
        dead[0], dead[1, :, :2] = True, True
        wanted = torch.full((4,), -torch.inf) if sink is None else sink
        assert (out[dead] == 0).all() and out[~dead].ne(0).any(-1).all()
        torch.testing.assert_close(lse[dead], wanted[None, :, None].expand(3, 4, 4)[dead])
        assert out.isfinite().all() and lse[~dead].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_beyond_the_table_mean_all_of_it(backend, dtype):
    """The values live on the device, where nobody looks at them: too long means all, negative means none."""
    skip_unless_built(backend)
    inputs = paged_inputs((32, 0, 32), M=3) | {"return_lse": True}
    inputs["page_table"] = inputs["page_table"][:, :2]
    call = lambda *lengths: run(inputs | {"lengths": torch.tensor(lengths, dtype=dtype)}, backend)
    assert_same_bits(call(32, 0, 32), call(2**31 - 1, -3, 33))


@pytest.mark.parametrize("backend", BACKENDS)
def test_page_numbers_beyond_the_cache_are_not_followed(backend):
    """They count as the last page."""
    skip_unless_built(backend)
    inputs = paged_inputs((40, 20)) | {"return_lse": True}
    P = inputs["key_pages"].shape[0]
    table = inputs["page_table"]
    table[0, :3] = torch.tensor([P, -1, 2**31 - 1])
    table[1, :2] = torch.tensor([-(2**31), 1])
    last = table.masked_fill((table < 0) | (table >= P), P - 1)
    assert_same_bits(run(inputs, backend), run(inputs | {"page_table": last}, backend))


@pytest.mark.parametrize("empty", ("batch", "heads", "queries", "pages"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_calls(backend, empty):
    skip_unless_built(backend)
    inputs = paged_inputs((40, 20), M=3, D_v=5)
    if empty == "batch":
        inputs |= {name: inputs[name][:0] for name in ("query", "page_table", "lengths")}
    elif empty == "heads":
        inputs["query"] = inputs["query"][:, :0]
        inputs |= {name: inputs[name][:, :, :0] for name in ("key_pages", "value_pages")}
    elif empty == "queries":
        inputs["query"] = inputs["query"][:, :, :0]
    else:
        inputs["page_table"] = inputs["page_table"][:, :0]
    out, lse = fastformer.paged_attention(**inputs, return_lse=True, backend=backend)
    assert out.shape == (*inputs["query"].shape[:-1], 5) and lse.shape == out.shape[:-1]
    assert (out == 0).all() and (lse == -torch.inf).all()
