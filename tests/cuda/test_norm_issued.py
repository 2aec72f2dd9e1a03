"""The norms' machine code, as the gates follow it, issues what the emulator runs of their PTX."""

import pytest
import torch

pytest.importorskip("triton")

import fastformer
from fastformer.testing import norm_inputs
from tests.gates import cuda_norm_cases
from tests.gates.issued import Launch, issued

from .emulated import instance_name


@pytest.mark.parametrize("op", ("norm_fwd_cuda", "norm_bwd_cuda"))
@pytest.mark.parametrize("C", (64, 768, 1024))
def test_as_much_as_the_emulator(emulator, monkeypatch, op, C):
    """Shuffles, barriers and stores of every warp."""
    rows, backward = 8, op == "norm_bwd_cuda"
    monkeypatch.setattr(cuda_norm_cases, "_ELEMENTS", rows * C)
    monkeypatch.setattr(cuda_norm_cases, "_MULTIPROCESSORS", 1)
    emulator.multiprocessors = 1
    inputs = norm_inputs(rows, C, dtype=torch.bfloat16, requires_grad=True)
    rows_and_parameters = inputs["x"], (C,), inputs["weight"], inputs["bias"]
    fastformer.layer_norm(*rows_and_parameters, backend="cuda").sum().backward()
    _, counters = emulator.launched[backward]
    prepare = cuda_norm_cases._backward if backward else cuda_norm_cases._forward
    params, plan, _ = prepare(cuda_norm_cases.CALLS["bfloat16"], C)
    cubin = cuda_norm_cases._cubin("sm_80")
    name = cuda_norm_cases._named(cubin, instance_name(plan, params))
    architecture, code = cuda_norm_cases._kernels(cubin)[name]
    found = []
    for block in range(plan.grid_x):
        for warp in range(plan.block_x * plan.block_y // 32):
            launch = Launch((plan.grid_x, 1), (plan.block_x, plan.block_y), bytes(params), (block, 0), warp)
            found += [instruction.opcode for instruction in issued(architecture, code, launch)]
    run = lambda name: sum(n for opcode, n in counters.opcodes.items() if opcode.startswith(name))
    assert found.count("SHFL") == run("shfl") > 0
    assert found.count("BAR") == run("bar")
    assert found.count("STG") == run("st.global") > 0
