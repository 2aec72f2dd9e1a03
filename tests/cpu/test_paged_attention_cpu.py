"""paged_attention on the CPU at every ISA level."""

from __future__ import annotations

import pytest
import torch

import fastformer
from fastformer.backends import cpu

from ..ops import plain
from ..ops.judging import DTYPES, judge
from ..ops.paged_cases import LAYOUTS, floats, paged_call, paged_inputs

if cpu.ready() is not None:
    pytest.skip(cpu.ready(), allow_module_level=True)

# Rows as they are fetched, packed into panels or not, narrow and wide, in several blocks of keys.
SOME = ("page size 17", "many keys", "many keys, three queries", "fewer keys than queries", "everything")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", (*SOME, "head dim 1", "head dim 256"))
def test_cases(name, dtype):
    judge(fastformer.paged_attention, plain.paged_attention, paged_call(name, dtype), backend="cpu")


def together(inputs, b):
    """Attention's arguments for one batch element: its keys as they would lie without pages."""
    S, length = inputs["key_pages"].shape[1], int(inputs["lengths"][b])
    n = torch.arange(length)
    pages = inputs["page_table"][b].long()[n // S]
    key, value = (inputs[name][pages, n % S].transpose(0, 1)[None] for name in ("key_pages", "value_pages"))
    return {"query": inputs["query"][b : b + 1], "key": key, "value": value}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M", (1, 4, 5, 30))
def test_bits_are_those_of_attention_on_keys_that_lie_together(M, layout):
    for dtype in DTYPES[:2]:
        inputs = paged_inputs((700, 30, 513, 1), S=17, M=M, D=40, dtype=dtype, layout=layout)
        more = {"window": (600, None), "sink": floats(4), "return_lse": True, "backend": "cpu"}
        found = fastformer.paged_attention(**inputs, **more)
        for b in range(4):
            wanted = fastformer.attention(**together(inputs, b), **more, causal="lower_right")
            for whole, element in zip(found, wanted, strict=True):
                assert torch.equal(whole[b : b + 1], element)


def test_bits_do_not_depend_on_threads():
    inputs = paged_inputs((1500, 3, 700), M=150, H=1, H_kv=1) | {"backend": "cpu"}
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(fastformer.paged_attention(**inputs))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# Last-line invariants: the public function never lets these through.
BROKEN = {
    "query": lambda t: t["query"][0],
    "key_pages": lambda t: t["key_pages"][..., 1:],
    "value_pages": lambda t: t["value_pages"][1:],
    "page_table": lambda t: t["page_table"].long(),
    "lengths": lambda t: t["lengths"][1:],
}


@pytest.mark.parametrize("name", BROKEN)
def test_invariants(name):
    tensors = paged_inputs((40, 20))
    raw = torch.ops.fastformer.paged_attention_fwd_cpu
    raw(*tensors.values(), None, 0.25, None, 0, None)
    with pytest.raises(RuntimeError):
        raw(*(tensors | {name: BROKEN[name](tensors)}).values(), None, 0.25, None, 0, None)
