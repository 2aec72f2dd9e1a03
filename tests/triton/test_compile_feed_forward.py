"""Every tile of feed_forward's products, compiled for every target: no spills, and shared memory fits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastformer.triton_kernels import feed_forward, feed_forward_bwd

from .feed_forward_tiles import TILES, use_tile
from .offline import SHARED_LIMIT, TARGETS, catch_launches, compile_launch, resources

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# E, F, E_out: every row is aligned, and steps of k are whole; nothing is.
EVEN, ODD = (1024, 4096, 2048), (1001, 4099, 2047)
ROWS = 5000
# Bytes a thread.
MOST_SPILLED = 0
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async"}


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def run_launchers(dtype, sizes, activation, gated):
    """Forward and backward with everything that an epilogue can do, on tensors without memory."""
    E, F, E_out = sizes
    x, w1, w2 = empty(ROWS, E, dtype=dtype), empty(F, E, dtype=dtype), empty(E_out, F, dtype=dtype)
    w_gate, b_gate = (w1, empty(F, dtype=dtype)) if gated else (None, None)
    tensors = (x, w1, empty(F, dtype=dtype), w_gate, b_gate, w2, empty(E_out, dtype=dtype))
    seed = empty(1, dtype=torch.int64)
    _, pre, pre_gate = feed_forward.feed_forward_fwd(*tensors, seed, activation, 0.1, True)
    grad_out = empty(ROWS, E_out, dtype=dtype)
    feed_forward_bwd.feed_forward_bwd(
        grad_out, pre, pre_gate, *tensors, seed, activation, 0.1, *(True,) * len(tensors)
    )


def distinct(launches):
    """One of those launches that Triton compiles once."""
    kept = {}
    for launch in launches:
        pointers = tuple(arg.dtype if isinstance(arg, torch.Tensor) else arg is None for arg in launch.args)
        kept.setdefault((launch.kernel.__name__, pointers, *launch.options.items()), launch)
    return kept.values()


def launches_with_tile(monkeypatch, target, dtype, sizes, tile, activation="gelu", gated=(False, True)):
    """The launches of the calls where tile number `tile` of its kind is chosen for every product."""
    launches = []
    catch_launches(monkeypatch, target, launches.append)
    use_tile(monkeypatch, tile)
    for with_gate in gated:
        run_launchers(dtype, sizes, activation, with_gate)
    assert launches
    return distinct(launches)


def assert_fits(record_property, target, launch):
    compiled, _ = compile_launch(launch, target)
    taken = resources(compiled)
    options = {k: v for k, v in launch.options.items() if k not in ("GROUP", "enable_fp_fusion")}
    what = f"{target} {launch.kernel.__name__} {options}"
    record_property(what, str(taken))
    assert taken.spilled <= MOST_SPILLED, f"{what}: {taken}"
    assert taken.shared <= SHARED_LIMIT[target], f"{what}: {taken}"
    return compiled


@pytest.mark.parametrize("target", TENSOR_CORES)
def test_some_tiles_fit_and_multiply_on_tensor_cores(monkeypatch, record_property, target):
    for launch in launches_with_tile(monkeypatch, target, BF16, EVEN, 0, "silu", gated=(False,)):
        compiled = assert_fits(record_property, target, launch)
        if "BLOCK_K" in launch.options:
            assert TENSOR_CORES[target] in compiled.asm["ptx"]
            # Operands reach shared memory without passing through registers.
            assert "cp.async.cg.shared.global" in compiled.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("sizes, tile", [*((EVEN, tile) for tile in TILES), (ODD, 0)], ids=str)
@pytest.mark.parametrize("dtype", (BF16, F16, F32), ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_fits(monkeypatch, record_property, target, dtype, sizes, tile):
    for launch in launches_with_tile(monkeypatch, target, dtype, sizes, tile):
        assert_fits(record_property, target, launch)
