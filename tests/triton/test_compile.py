"""Every tile that can be chosen, compiled for every target: no spills to speak of, and shared memory fits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastformer.triton_kernels import configs, norm_bwd, norm_fwd

from .offline import SHARED_LIMIT, TARGETS, catch_launches, compile_launch, resources

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (dtype of x and grad_out, of residual, s and grad_sum, of the parameters; dropout_p; kind).
CASES = {
    "bfloat16": (BF16, BF16, BF16, 0.0, "layer"),
    "bfloat16 dropout": (BF16, BF16, F32, 0.1, "layer"),
    "float32 dropout": (F32, F32, F32, 0.1, "layer"),
    "mixed dropout": (BF16, F32, F32, 0.1, "layer"),
    "float16 rms": (F16, F16, F16, 0.0, "rms"),
}
ROWS = 100_000
# Bytes a thread. ptxas (of Triton 3.9) stops short of the registers it may take, 255, in a few tiles:
#   rows that are not aligned: forward 16 and 256 columns, float16 rms (sm_120: 32 bytes) and 32 columns,
#   float32 dropout (sm_86, 89: 8); backward 8 to 64 columns and 1024 (sm_86, 89, 120: 8)
#   aligned rows: forward 8 columns, float32 dropout (sm_100: 16)
# Every other tile spills nothing, and halving the forward tiles makes sm_90 spill.
MOST_SPILLED = 32


def run_launcher(op, C, align, case):
    """Call the launcher of `op` on tensors without memory."""
    x_dtype, s_dtype, param_dtype, p, kind = CASES[case]
    stride = C + align

    def matrix(dtype):
        return torch.empty(ROWS, stride, dtype=dtype, device="meta")[:, :C]

    weight, bias = (torch.empty(C, dtype=param_dtype, device="meta") for _ in range(2))
    seed, statistics = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty(ROWS, device="meta")
    rms = kind == "rms"
    if op == "norm_fwd":
        norm_fwd.norm_fwd(matrix(x_dtype), matrix(s_dtype), weight, bias, seed, rms, 1e-5, p)
    else:
        s, grad_sum = matrix(s_dtype), matrix(s_dtype)
        norm_bwd.norm_bwd(
            matrix(x_dtype), grad_sum, s, weight, statistics, statistics, seed, rms, p, True, True
        )


def compiled_resources(monkeypatch, target, op, C, align, case):
    """[(kernel's name, Resources)] of the launches that the call makes."""
    launches = []
    catch_launches(monkeypatch, target, launches.append)
    run_launcher(op, C, align, case)
    assert launches
    return [(launch.kernel.__name__, resources(compile_launch(launch, target)[0])) for launch in launches]


def assert_fits(monkeypatch, record_property, target, op, C, align, case):
    for name, taken in compiled_resources(monkeypatch, target, op, C, align, case):
        record_property(f"{target} {name} C={C} align={align} {case}", str(taken))
        assert taken.spilled <= MOST_SPILLED, f"{name}, C = {C}, align = {align}, {case}: {taken}"
        assert taken.shared <= SHARED_LIMIT[target], f"{name}, C = {C}, align = {align}, {case}: {taken}"


@pytest.mark.parametrize(
    "target, op, C, align, case",
    [
        ("sm_90", "norm_fwd", 1024, 8, "bfloat16"),
        ("sm_90", "norm_bwd", 8192, 8, "mixed dropout"),
        ("sm_80", "norm_bwd", 1024, 8, "float32 dropout"),
        ("sm_120", "norm_fwd", 16384, 1, "float32 dropout"),
        ("gfx942", "norm_fwd", 64, 8, "bfloat16 dropout"),
        ("gfx950", "norm_bwd", 65536, 8, "float16 rms"),
    ],
)
def test_some_tiles_fit(monkeypatch, record_property, target, op, C, align, case):
    assert_fits(monkeypatch, record_property, target, op, C, align, case)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", ("norm_fwd", "norm_bwd"))
def test_every_tile_fits(monkeypatch, record_property, target, op):
    for C, align, _ in configs.norm_configs(TARGETS[target].backend, op):
        for case in CASES:
            with monkeypatch.context() as patch:
                assert_fits(patch, record_property, target, op, C, align, case)
