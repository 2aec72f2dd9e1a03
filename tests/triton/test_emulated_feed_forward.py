"""feed_forward on the Triton backend: the PTX that Triton compiles for sm_80 and sm_90, run by ptxvm."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import fastformer
from fastformer.testing import feed_forward_inputs, outputs_and_gradients
from tests.ops import philox, plain
from tests.ops.judging import assert_same_bits, judge

from .feed_forward_tiles import TILES, use_tile
from .offline import Emulation

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ACTIVATIONS = (*plain.ACTIVATIONS, *plain.GATED_ACTIVATIONS)
SEED, P = -0x123456789ABCDEF, 0.3


@pytest.fixture(params=["sm_80", "sm_90"])
def emulation(request, monkeypatch):
    return Emulation(monkeypatch, request.param)


def call(activation, *rows, **more):
    gated = activation in plain.GATED_ACTIVATIONS
    return feed_forward_inputs(*rows, gated=gated, requires_grad=True, **more) | {"activation": activation}


def judge_call(activation, *rows, p=0.0, recompute=False, **more):
    inputs = call(activation, *rows, **more)
    fn_only, plain_only = {"recompute": recompute}, {}
    if p:
        fn_only |= {"dropout_p": p, "seed": torch.tensor([SEED])}
        shape = (*inputs["x"].shape[:-1], inputs["w1"].shape[0])
        keep = philox.feed_forward_keep(inputs["x"].shape[:-1].numel(), shape[-1], SEED, p).view(shape)
        plain_only = {"keep": keep, "keep_scale": philox.keep_scale(p)}
    judge(
        fastformer.feed_forward,
        plain.feed_forward,
        inputs,
        backend="triton",
        fn_only=fn_only,
        plain_only=plain_only,
    )


@pytest.mark.parametrize(
    "activation, dtype, p",
    [("gelu", BF16, P), pytest.param("swiglu", F32, 0.0, marks=pytest.mark.slow)],
    ids=str,
)
def test_forward_and_backward(emulation, activation, dtype, p):
    judge_call(activation, 2, 19, E=40, F=72, E_out=24, dtype=dtype, p=p)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F16, F32), ids=str)
@pytest.mark.parametrize("activation", ("gelu", "swiglu"))
@pytest.mark.parametrize("tile", TILES)
def test_every_tile(emulation, monkeypatch, tile, activation, dtype):
    """More rows and columns than a tile, no multiple of it; then odd sizes, of which no row is aligned."""
    use_tile(monkeypatch, tile)
    judge_call(activation, 140, E=72, F=264, E_out=136, dtype=dtype, p=P)
    judge_call(activation, 21, E=67, F=35, E_out=33, dtype=dtype, p=P, recompute=True)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ("gelu", "swiglu"))
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("told", "emulated"), (("sm_100", "sm_90"), ("gfx942", "sm_80")))
def test_every_tile_of_other_targets(monkeypatch, told, emulated, tile, activation):
    """In the code of a target that is emulated: what the tiles divide is the same."""
    Emulation(monkeypatch, emulated)
    use_tile(monkeypatch, tile, told=told)
    judge_call(activation, 140, E=72, F=264, E_out=136, dtype=BF16, p=P)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", (BF16, F16, F32), ids=str)
def test_every_activation(emulation, dtype, activation):
    judge_call(activation, 21, E=40, F=72, E_out=24, dtype=dtype, p=P)
    judge_call(activation, 3, 5, E=24, F=40, bias=False, dtype=dtype, recompute=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ("transposed", "sliced", "unaligned", "broadcast", "last_strided"))
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
def test_layouts(emulation, dtype, layout):
    judge_call("geglu", 3, 9, E=24, F=40, dtype=dtype, layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
def test_transposed_weights_are_read_as_they_lie(emulation, dtype):
    inputs = call("swiglu", 21, E=72, F=40, E_out=24, dtype=dtype)
    for name in ("w1", "w_gate", "w2"):
        inputs[name] = inputs[name].detach().t().contiguous().t().requires_grad_()
    judge(fastformer.feed_forward, plain.feed_forward, inputs, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("parts", (2, 3))
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
def test_parts_of_k_are_added(emulation, monkeypatch, dtype, parts):
    """Of 150 and more columns of k in steps of 16 to 64, with a last part that is shorter."""
    use_tile(monkeypatch, 1, parts)
    judge_call("gelu", 150, E=168, F=200, E_out=184, dtype=dtype, p=P)


@pytest.mark.slow
def test_long_sums_of_float32(emulation):
    judge_call("relu", 270, E=16, F=3000, E_out=16, dtype=F32)


@pytest.mark.slow
def test_same_bits_twice_and_recomputed(emulation):
    inputs = call("swiglu", 70, E=40, F=72, dtype=BF16) | {"dropout_p": P, "seed": torch.tensor([SEED])}
    first, second, again = (
        outputs_and_gradients(fastformer.feed_forward, **inputs, recompute=recompute, backend="triton")
        for recompute in (False, False, True)
    )
    assert_same_bits(first, second)
    assert_same_bits(first, again)


def test_traffic(emulation):
    """Of one tile each: operands are read once a tile and results written once, in whole sectors."""
    rows, E, F = 64, 128, 64
    inputs = feed_forward_inputs(rows, E=E, F=F, E_out=E, dtype=BF16)
    fastformer.feed_forward(**inputs, backend="triton")
    counters = emulation.counters["_hidden_kernel"]
    assert counters.global_store_bytes == 2 * rows * F
    assert counters.store_efficiency == 1.0
    assert counters.bank_conflicts == 0
