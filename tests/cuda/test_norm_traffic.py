"""What the norm kernels move and in which order: counters of the emulator, races, repeated bits."""

import math

import pytest
import torch

import fastformer
from fastformer.testing import norm_inputs
from tests.ops.judging import DTYPES
from tests.ptxvm import Checks

SECTOR = 32


def moved(counters):
    """Bytes of DRAM traffic of one launch: whole sectors, each request for itself."""
    return SECTOR * (counters.global_load_sectors + counters.global_store_sectors)


def run(inputs, **more):
    leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in inputs.items()}
    out, s = fastformer.add_norm(**leaves, **more, backend="cuda")
    gradients = torch.autograd.grad([out, s], [t for t in leaves.values() if t is not None], [out + 1, s])
    return [out.detach(), s.detach(), *gradients]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 256, 768, 1024])
def test_each_array_moves_once(emulator, width, dtype):
    """Aligned rows without parameters, which L1 would serve: 5 % over the arrays are for mean and rstd."""
    rows, size = 32, dtype.itemsize
    inputs = norm_inputs(rows, width, dtype=dtype) | {"weight": None, "bias": None}
    run(inputs)
    (_, forward), (_, backward) = emulator.launched
    for counters, reads, writes in ((forward, 2, 2), (backward, 3, 1)):
        array = rows * width * size
        assert counters.global_load_sectors * SECTOR >= reads * array
        assert (reads + writes) * array <= moved(counters) <= 1.05 * (reads + writes) * array
        assert counters.load_efficiency > 0.95
        assert counters.bank_conflicts == 0


@pytest.mark.parametrize("width", [256, 1536])
def test_shares_of_parameter_gradients_are_few(emulator, width):
    """Beyond its arrays a backward block reads the weight and writes one line of shares, both once."""
    rows = 32
    inputs = norm_inputs(rows, width, dtype=torch.bfloat16, param_dtype=torch.float32)
    run(inputs)
    _, (name, backward), (_, reduce) = emulator.launched
    assert "norm_bwd_kept" in name
    groups = backward.ctas
    assert groups <= 2 * emulator.multiprocessors
    shares = groups * 2 * width * 4
    arrays = 4 * rows * width * 2
    # Once for each row that a block has in hand.
    weights = groups * max(1, 256 // max(32, width // 16)) * width * 4
    # Shares and weights go in 16-byte halves of 32-byte units, which count as whole sectors here.
    assert moved(backward) <= 1.05 * arrays + 2 * shares + 2 * weights
    assert moved(reduce) <= 1.05 * (shares + 2 * width * 4)
    assert backward.bank_conflicts == reduce.bank_conflicts == 0


@pytest.mark.parametrize("dtype,limit", [(torch.bfloat16, 7), (torch.float32, 7)])
def test_bytes_for_each_instruction(emulator, dtype, limit):
    """The budget of norm_plan.h on PTX, where address arithmetic is not folded yet: SASS has fewer."""
    inputs = norm_inputs(32, 1024, dtype=dtype)
    run(inputs)
    for _, counters in emulator.launched[:2]:
        instructions = sum(counters.warp_instructions.values()) - counters.warp_instructions["move"]
        assert 4 * 32 * 1024 * dtype.itemsize / instructions > limit


@pytest.mark.parametrize(
    "width", [40, *(pytest.param(width, marks=pytest.mark.slow) for width in (1100, 8200))]
)
def test_no_schedule_changes_a_bit(emulator, width):
    """Blocks of several rows, and rows of several warps, whose sums meet in shared memory."""
    emulator.multiprocessors = 1
    inputs = norm_inputs(5 if width < 8192 else 2, width, dtype=torch.float16)
    more = {"dropout_p": 0.1, "seed": torch.tensor([3])}
    first = run(inputs, **more)
    assert all(math.isfinite(t.double().abs().max()) for t in first)
    for checks in (None, Checks(schedule_seed=1), Checks(schedule_seed=2)):
        emulator.checks = checks
        for before, after in zip(first, run(inputs, **more), strict=True):
            assert before.equal(after)
