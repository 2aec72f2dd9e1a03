"""sm_90a: TMA, mbarrier pipelines and wgmma, compiled by nvcc."""

import pytest
import torch

from tests import ptxvm
from tests.ptxvm import TensorMap
from tests.ptxvm.tests.build import nvcc

bf16 = torch.bfloat16


def gemm(M, N, K, *defines, checks=None):
    torch.manual_seed(0)
    a, b, c = torch.randn(M, K).to(bf16), torch.randn(K, N).to(bf16), torch.zeros(M, N)
    r = (
        nvcc("hopper.cu", "90a", *defines)
        .kernel("wgmma_gemm")
        .launch(
            (-(-N // 64), -(-M // 64)),
            160,
            [TensorMap(a, (64, 64), "128B"), TensorMap(b, (64, 64), "128B"), c, M, N, K],
            3 * 16384 + 1024,
            checks,
        )
    )
    return a, b, c, r


@pytest.mark.parametrize("M,N,K", [(128, 128, 320), (72, 88, 136)])
def test_wgmma_tma_gemm(record, M, N, K):
    a, b, c, r = gemm(M, N, K)
    record(f"wgmma+TMA gemm {M}x{N}x{K}", r)
    assert (c.double() - a.double() @ b.double()).abs().max() < 1e-4


def test_tma_round_trip(record):
    x, y = torch.randn(48, 80), torch.zeros(48, 80)
    b, bo = torch.randn(64), torch.zeros(64)
    r = (
        nvcc("hopper.cu", "90a")
        .kernel("tma_copy")
        .launch((3, 2), 128, [TensorMap(x, (32, 32), "128B"), TensorMap(y, (32, 32), "128B"), b, bo])
    )
    record("TMA copy 48x80", r)
    assert torch.equal(y, 2 * x) and torch.equal(bo, b + 1)


@pytest.mark.slow
def test_missing_proxy_fence():
    x, y, b, bo = torch.randn(32, 32), torch.zeros(32, 32), torch.randn(64), torch.zeros(64)
    k = nvcc("hopper.cu", "90a", "HOPPER_BUG=4").kernel("tma_copy")
    args = [TensorMap(x, (32, 32), "128B"), TensorMap(y, (32, 32), "128B"), b, bo]
    with pytest.raises(ptxvm.RaceError, match=r"without fence\.proxy\.async"):
        k.launch(1, 128, args)
    k.launch(1, 128, args, checks=ptxvm.Checks(proxy_fences=False))
    assert torch.equal(y, 2 * x)


def test_missing_empty_wait_is_caught():
    with pytest.raises((ptxvm.RaceError, ptxvm.DeadlockError)):  # the producer laps the consumer
        gemm(64, 64, 512, "HOPPER_BUG=1")


@pytest.mark.slow
def test_missing_full_wait_is_caught():
    with pytest.raises((ptxvm.RaceError, ptxvm.UninitializedRead)):
        gemm(64, 64, 512, "HOPPER_BUG=2")


def fa3(N, H, causal, *defines, checks=None):
    torch.manual_seed(0)
    q, k, v = (torch.randn(H, N, 64).to(bf16) for _ in range(3))
    o = torch.zeros_like(q)
    maps = [TensorMap(x.view(H * N, 64), (64, 64), "128B") for x in (q, k, v)]
    r = (
        nvcc("hopper.cu", "90a", *defines)
        .kernel("fa3")
        .launch((-(-N // 128), H), 384, [*maps, o, N, 0.125, causal], 3 * 16384 + 1024, checks)
    )
    s = q.double() @ k.double().transpose(1, 2) / 8
    if causal:
        s = s.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))
    return (o.double() - s.softmax(-1) @ v.double()).abs().max(), r


@pytest.mark.parametrize("N,causal", [(256, 0), (256, 1), (192, 1), (160, 0)])
def test_warp_specialised_attention(record, N, causal):
    err, r = fa3(N, 2, causal)
    record(f"FA3-style attention N={N} H=2 causal={causal}", r)
    assert err < 0.02
    assert r.opcodes["wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"]


@pytest.mark.slow
def test_warp_specialised_attention_fuzzed():
    assert fa3(256, 1, 1, checks=ptxvm.Checks(schedule_seed=5))[0] < 0.02


@pytest.mark.slow
def test_early_release_of_a_wgmma_operand():
    """The consumer frees V before wgmma.wait_group; some schedule lets the producer overwrite it."""
    caught = 0
    for seed in range(4):
        try:
            fa3(512, 1, 0, "HOPPER_BUG=3", checks=ptxvm.Checks(schedule_seed=seed))
        except ptxvm.RaceError:
            caught += 1
    assert caught
