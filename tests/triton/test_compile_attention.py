"""Every tile of attention that can be chosen, compiled for every target: no spills, and it fits the chip."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastformer.triton_kernels import attention_fwd

from .offline import SHARED_LIMIT, TARGETS, catch_launches, compile_launch, resources

B, H, N = 4, 16, 4096
ARGUMENTS = {
    "nothing": (),
    "causal": ("causal",),
    "window": ("window",),
    "lengths, sink": ("lengths", "sink"),
    "packed, causal": ("packed", "causal"),
    "mask, bias": ("mask", "bias"),
    "padding, softcap, dropout": ("padding", "softcap", "dropout"),
    "everything": (
        "mask",
        "padding",
        "lengths",
        "bias",
        "relative_bias",
        "sink",
        "softcap",
        "dropout",
        "window",
    ),
}
WIDTHS = (64, 80, 128, 256)
# Bytes a thread, outside the ordinary: configs.py says why.
SPILLED = {("sm_90", 128, "nothing"): 24, ("sm_90", 128, "lengths, sink"): 24, ("sm_90", 80, "nothing"): 24}
SPILLED[("sm_90", 80, "lengths, sink")] = 24


def run_launcher(D, dtype, M, names):
    """Call the launcher on tensors without memory."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    packed = "packed" in names
    starts = empty(5, dtype=torch.int32) if packed else None
    shapes = [(length, H, D) if packed else (B, H, length, D) for length in (M, N, N)]
    attention_fwd.attention_fwd(
        *(empty(*shape) for shape in shapes),
        empty(B, 1, M, N, dtype=torch.bool) if "mask" in names else None,
        empty(B, N, dtype=torch.bool) if "padding" in names else None,
        empty(B, dtype=torch.int64) if "lengths" in names else None,
        empty(1, H, M, N) if "bias" in names else None,
        empty(H, M + N - 1) if "relative_bias" in names else None,
        empty(H) if "sink" in names else None,
        empty(1, dtype=torch.int64) if "dropout" in names else None,
        starts,
        starts,
        0.125,
        128 if "window" in names else None,
        128 if "window" in names else 0 if "causal" in names else None,
        "causal" in names,
        5.0 if "softcap" in names else None,
        0.1 if "dropout" in names else 0.0,
        M if packed else None,
        N if packed else None,
    )


def assert_fits(monkeypatch, record_property, target, D, dtype, M, case):
    launches = []
    catch_launches(monkeypatch, target, launches.append)
    run_launcher(D, dtype, M, ARGUMENTS[case])
    assert launches
    for launch in launches:
        taken = resources(compile_launch(launch, target)[0])
        what = f"{target} {launch.kernel.__name__} D={D} {dtype} M={M} {case}"
        record_property(what, str(taken))
        assert taken.spilled <= SPILLED.get((target, D, case), 0), f"{what}: {taken}"
        assert taken.shared <= SHARED_LIMIT[target], f"{what}: {taken}"


@pytest.mark.parametrize(
    "target, D, M, case",
    [("sm_80", 64, N, "causal"), ("sm_90", 64, N, "nothing"), ("sm_90", 128, 1, "mask, bias")],
)
def test_some_tiles_fit(monkeypatch, record_property, target, D, M, case):
    assert_fits(monkeypatch, record_property, target, D, torch.bfloat16, M, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_fits(monkeypatch, record_property, target, case):
    for D in WIDTHS:
        for dtype in (torch.bfloat16, torch.float32):
            for M in (1, N):
                with monkeypatch.context() as patch:
                    assert_fits(patch, record_property, target, D, dtype, M, case)
