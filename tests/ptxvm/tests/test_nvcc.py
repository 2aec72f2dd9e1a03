"""nvcc-compiled sm_80 kernels against float64 references."""

import numpy as np
import pytest
import torch

from tests import ptxvm
from tests.ptxvm.tests.build import nvcc

bf16 = torch.bfloat16


@pytest.fixture(scope="module")
def m():
    return nvcc("common.cu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(got, want, tol):
    assert torch.isfinite(got.double()).all()
    err = (got.double() - want.double()).abs().max().item()
    assert err <= tol, err


def test_vecadd_tail(m, record):
    a, b = torch.randn(1000), torch.randn(1000)
    c = torch.full((1000,), 7.0)
    r = record("vecadd n=1000", m.kernel("vecadd").launch(4, 256, [a, b, c, 999]))
    assert torch.equal(c[:999], a[:999] + b[:999]) and c[999] == 7
    assert r.global_load_bytes == 999 * 8 and r.load_efficiency > 0.99


def test_views_share_storage(m):
    base = torch.randn(300)
    c = torch.zeros(100)
    m.kernel("vecadd").launch(1, 128, [base[100:200], base[200:], c, 100])
    assert torch.equal(c, base[100:200] + base[200:])


def test_a_view_without_elements_is_null(m):
    empty, c = torch.randn(300)[100:100], torch.full((100,), 7.0)
    m.kernel("vecadd").launch(1, 128, [empty, empty, c, 0])
    assert c.eq(7).all()
    with pytest.raises(ptxvm.MemoryFault):
        m.kernel("vecadd").launch(1, 128, [empty, empty, c, 1])


def test_numpy_arguments(m):
    a, b, c = np.ones(10, np.float32), np.arange(10, dtype=np.float32), np.zeros(10, np.float32)
    m.kernel("vecadd").launch(1, 32, [a, b, c, 10])
    assert (c == a + b).all()


@pytest.mark.parametrize("block", [128, 96])
def test_block_reduce(m, record, block):
    x = torch.randn(1500)
    out = torch.zeros(1)
    record(f"block_reduce n=1500 block={block}", m.kernel("block_reduce").launch(3, block, [x, out, 1500]))
    xd = x.double()
    want = torch.where(xd > 0.5, xd * xd, torch.where(xd < -0.5, -xd, torch.ones_like(xd))).sum()
    tid = torch.arange(1500) % (3 * block) % block
    k = (tid % 5).double()
    want += (0.25 * k * (k - 1) / 2).sum()
    close(out, want, 1e-3)


def test_layernorm(m, record):
    x, g, b = torch.randn(6, 320).to(bf16), torch.randn(320), torch.randn(320)
    y, stats = torch.zeros_like(x), torch.zeros(6, 2)
    record("layernorm 6x320", m.kernel("layernorm").launch(6, 128, [x, g, b, y, stats, 320]))
    xd = x.double()
    want = torch.nn.functional.layer_norm(xd, (320,), g.double(), b.double(), 1e-5)
    close(y, want, 0.03)
    close(stats[:, 0], xd.mean(1), 1e-5)


@pytest.mark.parametrize("M,N,K", [(128, 128, 128), (80, 72, 104)])
def test_gemm(m, record, M, N, K):
    a, b, c = torch.randn(M, K).to(bf16), torch.randn(K, N).to(bf16), torch.zeros(M, N)
    grid = (-(-N // 64), -(-M // 64))
    r = record(f"gemm mma.sync {M}x{N}x{K}", m.kernel("gemm").launch(grid, 128, [a, b, c, M, N, K], 32768))
    close(c, a.double() @ b.double(), 1e-4)
    tiles = grid[0] * grid[1] * -(-K // 64)
    assert r.tensor_flops == tiles * 2 * 64**3
    assert r.bank_conflicts == 0  # the XOR swizzle works


def attention(q, k, v, causal):
    q, k, v = q.double(), k.double(), v.double()
    s = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), float("-inf"))
    return s.softmax(-1) @ v, s.logsumexp(-1)


@pytest.mark.parametrize("N,causal", [(256, 1), (256, 0), (100, 1), (100, 0)])
def test_flash_fwd(m, record, N, causal):
    q, k, v = (torch.randn(2, N, 64).to(bf16) for _ in range(3))
    o, lse = torch.zeros_like(q), torch.zeros(2, N)
    record(
        f"flash_fwd N={N} H=2 causal={causal}",
        m.kernel("flash_fwd").launch((-(-N // 64), 2), 128, [q, k, v, o, lse, N, 0.125, causal], 5 * 8192),
    )
    want, want_lse = attention(q, k, v, causal)
    close(o, want, 0.02)
    close(lse, want_lse, 1e-4)


def test_histogram(m, record):
    x = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    out = torch.zeros(256, dtype=torch.int32)
    record("histogram n=5000", m.kernel("histogram").launch(2, 128, [x, out, 5000]))
    assert torch.equal(out.long(), torch.bincount(x.long(), minlength=256))


def test_ring_mbarrier(m, record):
    x, out = torch.randn(7 * 96), torch.zeros(96)
    record("mbarrier ring, 7 tiles", m.kernel("ring").launch(1, 128, [x, out, 7]))
    t = torch.arange(96)
    want = sum(x.view(7, 96).double()[i][(t + i) % 96] * (i + 1) for i in range(7))
    close(out, want, 1e-4)


def test_calls_and_math(m, record):
    n = 400
    x, sel, out = torch.randn(n), torch.randint(0, 9, (n,), dtype=torch.int32), torch.zeros(n)
    x[:4] = torch.tensor([1e4, 3.0, -5e4, 100.0])  # large sinf arguments take the slow path
    sel[:4] = 1
    record("calls n=400", m.kernel("calls").launch(4, 128, [x, sel, out, n]))
    v = x.double()
    vf = (x * 1000).double()
    want = [
        ((1 * v + 0) * v + 1) * v + 2,
        torch.sin(vf),
        v.exp() + (v.abs() + 1).log(),
        v.abs() ** 1.7,
        v.tanh() + torch.erf(v),
        ((v + 0) * v + 1) / (v.abs() + 2),
        v.exp() * v.cos(),
        torch.trunc((x * 7).double()) + torch.round((x * 3).double()) + torch.fmod((x * 11).double(), 2),
    ]
    want = torch.stack([*want, want[-1]])[sel.long(), torch.arange(n)]
    close(out / want.abs().clamp(min=1), want / want.abs().clamp(min=1), 2e-5)


def test_integers(m, record):
    n = 256
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-(2**31), 2**31, n).astype(np.int32) for _ in range(2))
    b[:64] %= 1000
    c = rng.integers(-(2**63), 2**63 - 1, n).astype(np.int64)
    o32, o64 = np.zeros((n, 12), np.int32), np.zeros((n, 6), np.int64)
    record("integers n=256", m.kernel("integers").launch(2, 128, [a, b, c, o32, o64, n]))
    s32 = lambda v: (v & 0xFFFFFFFF) - (1 << 32) * (v >> 31 & 1)
    s64 = lambda v: (v & (2**64 - 1)) - (1 << 64) * (v >> 63 & 1)
    tdiv = lambda p, q: abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)
    for i in range(n):
        x, y, z = int(a[i]), int(b[i]), int(c[i])
        ux, uy = x & 0xFFFFFFFF, y & 0xFFFFFFFF
        byte = lambda j, ux=ux, uy=uy: (ux | uy << 32) >> 8 * j & 255
        ffs = (ux & -ux).bit_length()
        want = [
            tdiv(x, y | 1),
            x - tdiv(x, y | 1) * (y | 1),
            ux // (uy | 1),
            ux.bit_count() + (32 - ux.bit_length()) * 100 + ffs * 10000,
            int(f"{ux:032b}"[::-1], 2),
            byte(0) | byte(4) << 8 | byte(1) << 16 | byte(5) << 24,
            (uy << 32 | ux) << 13 >> 32,
            x * y >> 32,
            (x & y) ^ (~x | (y & 0x0F0F0F0F)),
            ((x >> 5) + 128) % 256 - 128 + (y + 32768) % 65536 - 32768,
            min(x, y) - max(x >> 3, y >> 7),
            ux * uy >> 32,
        ]
        assert [s32(w) for w in want] == o32[i].tolist(), i
        want = [
            tdiv(z, y | 1),
            z - tdiv(z, y | 3) * (y | 3),
            z * s64(z + x) >> 64,
            x * y + z,
            z >> (y & 63),
            (z & (2**64 - 1)) // (uy | 1),
        ]
        assert [s64(w) for w in want] == o64[i].tolist(), i


def test_votes_locks_barriers(m, record):
    x = torch.randint(-100, 100, (128,), dtype=torch.int32)
    out = torch.zeros(128, 6, dtype=torch.int32)
    record("votes + spin lock", m.kernel("votes").launch(1, 128, [x, out, 128]))
    for w in range(4):
        v = x[32 * w : 32 * w + 32]
        odd = v & 1 != 0
        ballot = sum(1 << i for i in range(32) if odd[i])
        first = int(v[odd][0])
        for i in range(32):
            o = [int(e) for e in out[32 * w + i]]
            assert o[0] == int((x > 0).sum())
            assert o[1] & 0xFFFFFFFF == ballot
            assert o[2] == 2 * bool((v > 90).any()) + 1
            rem = torch.fmod(v, 4)
            assert o[3] & 0xFFFFFFFF == sum(1 << j for j in range(32) if rem[j] == rem[i])
            assert o[4] == int(v.sum()) + (int(odd.sum()) + first if odd[i] else 0)
            assert o[5] == int(x.sum())


def test_packed_halves(m, record):
    n = 64
    a, b = torch.randn(n, 2).half(), torch.randn(n, 2).half()
    c, d = torch.randn(n, 2).to(bf16), torch.randn(n, 2).to(bf16)
    oh, ob = torch.zeros(3 * n + 1, 2).half(), torch.zeros(3 * n + 1, 2).to(bf16)
    record("packed halves", m.kernel("halves").launch(1, 64, [a, b, c, d, oh, ob, n]))
    A, B, C, D = (t.double() for t in (a, b, c, d))
    o = oh[:-1].view(n, 3, 2)
    assert torch.equal(o[:, 0], (A * B + A).half())
    assert torch.equal(o[:, 1], torch.maximum(a + b, a - b))
    close(o[:, 2] / A.exp2(), torch.ones(n, 2), 2e-3)
    p = ob[:-1].view(n, 3, 2)
    assert torch.equal(p[:, 0], (C * D + C).to(bf16))
    assert torch.equal(p[:, 1], torch.minimum(c * d, d))
    assert torch.equal(p[:, 2], -c.abs())
    close(oh[-1], A.sum(0), 0.1)
    assert ob[-1].tolist() == [64.0, 128.0]


def test_struct_local_const_globals(m, record):
    x, y = torch.randn(32), torch.zeros(32)
    kernel = nvcc("common.cu").kernel("structs")
    from tests.ptxvm.launch import StructArg

    p = StructArg("<QQif", x, y, 32, 2.0)
    for call in range(2):  # the module-scope variable persists
        record("struct param, local memory", kernel.launch(1, 32, [p, 3.0, 3]))
        want = torch.zeros(32).double()
        for i in range(32):
            local = [0.0] * 8
            for j in range(8):
                local[(j + 3) & 7] = (j + 1) * x[i].item()
            want[i] = sum(local[(j * i) & 7] for j in range(8)) * 2 * 3 + 5 + call
        close(y, want, 1e-3)
