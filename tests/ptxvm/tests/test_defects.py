"""Seeded defects must be reported, naming the place."""

import pytest
import torch

from tests import ptxvm
from tests.ptxvm import Checks
from tests.ptxvm.tests.build import nvcc


@pytest.fixture(scope="module")
def m():
    return nvcc("common.cu")


def test_out_of_bounds_read(m):
    x, y = torch.zeros(100), torch.zeros(100)
    with pytest.raises(
        ptxvm.MemoryFault,
        match=r"out-of-bounds 4-byte.*line \d+.*thread \(100, 0, 0\).*0 bytes past the end of argument 0",
    ):
        m.kernel("bug_oob").launch(1, 128, [x, y, 100])


def test_missing_syncthreads(m):
    x, y = torch.zeros(128), torch.zeros(128)
    with pytest.raises((ptxvm.UninitializedRead, ptxvm.RaceError)):
        m.kernel("bug_race").launch(1, 128, [x, y])
    with pytest.raises(ptxvm.RaceError, match="read races with a write by warp 3"):
        m.kernel("bug_race").launch(1, 128, [x, y], checks=Checks(uninitialized=False))
    m.kernel("bug_race").launch(1, 128, [x, y], checks=Checks(False, False, False))


def test_write_after_read_race(m):
    with pytest.raises(ptxvm.RaceError, match="write races with a read"):
        m.kernel("bug_war").launch(1, 128, [torch.zeros(128), torch.zeros(128)])


@pytest.mark.slow
def test_gemm_without_second_barrier():
    a = torch.zeros(64, 256, dtype=torch.bfloat16)
    b, c = torch.zeros(256, 64, dtype=torch.bfloat16), torch.zeros(64, 64)
    with pytest.raises(ptxvm.RaceError):
        nvcc("common.cu", "80", "GEMM_BUG=1").kernel("gemm").launch(1, 128, [a, b, c, 64, 64, 256], 32768)


def test_uninitialised_shared(m):
    with pytest.raises(ptxvm.UninitializedRead, match=r"thread \(\d+, 0, 0\).*shared offset"):
        m.kernel("bug_uninit").launch(1, 128, [torch.zeros(128)])


def test_cp_async_without_wait(m):
    with pytest.raises(ptxvm.UninitializedRead, match="in flight"):
        m.kernel("bug_cpasync").launch(1, 32, [torch.zeros(128), torch.zeros(32)])


def test_misaligned_vector(m):
    x, y = torch.zeros(256), torch.zeros(128)
    m.kernel("bug_align").launch(1, 32, [x, y, 4])
    with pytest.raises(ptxvm.MemoryFault, match="misaligned 16-byte"):
        m.kernel("bug_align").launch(1, 32, [x, y, 2])


def test_barrier_deadlock(m):
    with pytest.raises(ptxvm.DeadlockError, match=r"warp 0.*barrier 1(.|\n)*warp 3.*barrier 2"):
        m.kernel("bug_deadlock").launch(1, 128, [torch.zeros(128, dtype=torch.int32)])


@pytest.mark.slow
def test_ring_defects():
    x, out = torch.randn(7 * 96), torch.zeros(96)
    with pytest.raises((ptxvm.RaceError, ptxvm.DeadlockError)):  # producer does not wait for 'empty'
        nvcc("common.cu", "80", "RING_BUG=1").kernel("ring").launch(
            1, 128, [x, out, 7], checks=Checks(max_idle_steps=20000)
        )
    with pytest.raises(ptxvm.DeadlockError):  # consumers never release
        nvcc("common.cu", "80", "RING_BUG=2").kernel("ring").launch(
            1, 128, [x, out, 7], checks=Checks(max_idle_steps=20000)
        )


def test_shared_out_of_bounds(m):
    m.kernel("bug_shared_oob").launch(1, 64, [torch.zeros(64)], 512)
    with pytest.raises(ptxvm.MemoryFault, match="shared offset 256 of 256"):
        m.kernel("bug_shared_oob").launch(1, 64, [torch.zeros(64)], 256)


def test_unknown_opcode():
    ptx = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k() { .reg .b32 %r<3>; frobnicate.b32 %r1, %r2; ret; }"""
    with pytest.raises(ptxvm.UnsupportedOpcode, match="frobnicate"):
        ptxvm.load(ptx).kernel("k").launch(1, 32, [])


@pytest.mark.parametrize("seed", range(3))
def test_fuzzed_schedule_finds_the_ring_race(seed):
    x, out = torch.randn(7 * 96), torch.zeros(96)
    checks = Checks(schedule_seed=seed, max_idle_steps=20000)
    nvcc("common.cu").kernel("ring").launch(1, 128, [x, out, 7], checks=checks)
    with pytest.raises((ptxvm.RaceError, ptxvm.DeadlockError)):
        nvcc("common.cu", "80", "RING_BUG=1").kernel("ring").launch(1, 128, [x, out, 7], checks=checks)
