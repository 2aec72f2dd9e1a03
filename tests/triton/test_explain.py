"""`explain` tells the tiles of a call before it runs: they are those that its launchers then launch."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

import fastformer
from fastformer.backends import triton as backend
from fastformer.testing import attention_inputs, feed_forward_inputs, outputs_and_gradients
from tests.ops.paged_cases import paged_inputs

from .offline import catch_launches


@pytest.fixture
def launches(monkeypatch):
    """What is launched, in place of running it, by calls on CPU tensors."""
    caught = []
    catch_launches(monkeypatch, "sm_80", caught.append)
    monkeypatch.setattr(backend, "_interpreting", lambda: True)
    return caught


def described(launch):
    rows, block_c, warps = (launch.options[name] for name in ("ROWS", "BLOCK_C", "num_warps"))
    wide = "wide" in launch.kernel.__name__
    return f"rows={rows}, block_c={block_c}, num_warps={warps}, wide={wide}"


def matrix(rows, C, stride, dtype=torch.bfloat16):
    return torch.zeros(rows, stride, dtype=dtype)[:, :C]


@pytest.mark.parametrize(
    "x, residual",
    [
        (matrix(4, 1000, 1000), matrix(4, 1000, 1000)),
        (matrix(4, 1000, 1001), matrix(4, 1000, 1000)),
        (matrix(4, 1000, 1000), matrix(4, 1000, 1004)),
        (matrix(9, 64, 65), None),
        (matrix(9, 64, 72), None),
        (matrix(2, 20000, 20000), None),
        (matrix(64, 9, 9).t()[:, ::2], None),
    ],
    ids=lambda t: "none" if t is None else f"{list(t.shape)} {list(t.stride())}",
)
def test_tiles_of_a_norm_are_those_launched(launches, x, residual):
    def call(x, residual=None, backend="triton"):
        if residual is None:
            return fastformer.rms_norm(x, x.shape[-1:], backend=backend)
        return fastformer.add_norm(x, residual, backend=backend)

    inputs = {"x": x} if residual is None else {"x": x, "residual": residual}
    explanation = fastformer.explain(call, **inputs)
    assert not launches
    outputs_and_gradients(call, **{name: t.detach().requires_grad_() for name, t in inputs.items()})
    forward, backward = launches
    assert forward.kernel.__name__.startswith("_norm_fwd")
    assert explanation.configurations == {"norm_fwd": described(forward), "norm_bwd": described(backward)}
    assert f"norm_fwd: triton ({described(forward)})\n" in str(explanation)


@pytest.mark.parametrize("more", ({}, {"causal": "upper_left"}, {"softcap": 5.0}), ids=str)
@pytest.mark.parametrize(("D", "M"), [(64, 300), (80, 3)])
def test_tiles_of_attention_are_those_launched(launches, D, M, more):
    inputs = attention_inputs(1, 2, M, 300, D, dtype=torch.bfloat16, requires_grad=True)
    call = partial(fastformer.attention, backend="triton", **more)
    explanation = fastformer.explain(call, **inputs)
    assert not launches
    outputs_and_gradients(call, **inputs)
    by_kernel = {launch.kernel.__name__: launch.options for launch in launches}

    def tile(kernel):
        names = {
            "block_m": "BLOCK_M",
            "block_n": "BLOCK_N",
            "num_warps": "num_warps",
            "num_stages": "num_stages",
        }
        return ", ".join(f"{name}={by_kernel[kernel][option]}" for name, option in names.items())

    assert explanation.configurations["attention_fwd"].startswith(tile("_attention_fwd_kernel"))
    keys, queries = tile("_key_gradients_kernel"), tile("_query_gradients_kernel")
    assert explanation.configurations["attention_bwd"] == f"keys: {keys}; queries: {queries}"


@pytest.mark.parametrize("M", (1, 20))
def test_tiles_of_paged_attention_are_those_launched(launches, M):
    inputs = paged_inputs((40, 0, 33), M=M, D=64, dtype=torch.bfloat16)
    call = partial(fastformer.paged_attention, backend="triton")
    explanation = fastformer.explain(call, **inputs)
    assert not launches
    call(**inputs)
    chosen = launches[0].options
    tile = ", ".join(f"{name}={chosen[name.upper()]}" for name in ("block_m", "block_n"))
    assert explanation.configurations["paged_attention_fwd"].startswith(tile)
    without_queries = inputs | {"query": inputs["query"][:, :, :0]}
    assert fastformer.explain(call, **without_queries).configurations == {}


@pytest.mark.parametrize(
    "E, F, E_out, gated", [(64, 256, 64, False), (64, 1024, 128, True), (33, 70, 19, True)]
)
@pytest.mark.parametrize("rows", (3, 300, 4000))
def test_tiles_of_feed_forward_are_those_launched(launches, rows, E, F, E_out, gated):
    inputs = feed_forward_inputs(
        rows, E=E, F=F, E_out=E_out, gated=gated, dtype=torch.bfloat16, requires_grad=True
    )
    call = partial(fastformer.feed_forward, activation="swiglu" if gated else "gelu", backend="triton")
    explanation = fastformer.explain(call, **inputs)
    assert not launches
    outputs_and_gradients(call, **inputs)
    fields = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    tiles = [
        ", ".join(f"{field.lower()}={launch.options[field]}" for field in fields)
        for launch in launches
        if "BLOCK_K" in launch.options
    ]
    named = {
        direction: dict(kernel.split(": ") for kernel in explanation.configurations[direction].split("; "))
        for direction in ("feed_forward_fwd", "feed_forward_bwd")
    }
    hidden, out, hidden_bwd, x, w1, *w_gate, w2 = tiles
    assert len(w_gate) == gated and all(tile == w1 for tile in w_gate)
    wanted = {
        "feed_forward_fwd": {"hidden": hidden, "out": out},
        "feed_forward_bwd": {"hidden": hidden_bwd, "x": x, "w1": w1, "w2": w2},
    }
    for direction, of_kernels in wanted.items():
        assert named[direction].keys() == of_kernels.keys()
        assert all(named[direction][kernel].startswith(tile) for kernel, tile in of_kernels.items())


def test_nothing_is_told_of_an_empty_call_or_of_another_backend(launches):
    call = fastformer.layer_norm
    assert fastformer.explain(call, torch.zeros(0, 8), (8,), backend="triton").configurations == {}
    explanation = fastformer.explain(call, torch.zeros(2, 8), (8,))
    assert explanation.configurations == {} and "(" not in str(explanation).splitlines()[0]
    assert not launches
