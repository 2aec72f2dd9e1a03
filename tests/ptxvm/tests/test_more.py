"""Counters with known answers, odd shapes, schedule independence, benign patterns, more of Triton."""

import pytest
import torch
import triton
import triton.language as tl

from tests import ptxvm
from tests.ptxvm import Checks
from tests.ptxvm.tests.build import nvcc, triton_kernel

bf16 = torch.bfloat16
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def m():
    return nvcc("common.cu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "global_stride,shared_stride,sectors,passes",
    [(1, 1, 4, 1), (2, 2, 8, 2), (8, 32, 32, 32), (1, 3, 4, 1), (1, 4, 4, 4)],
)
def test_conflict_and_sector_counts(m, global_stride, shared_stride, sectors, passes):
    x, y = torch.randn(32 * global_stride), torch.zeros(32)
    r = m.kernel("strided").launch(1, 32, [x, y, global_stride, shared_stride])
    assert torch.equal(y, x[::global_stride])
    assert r.global_load_sectors == sectors and r.global_load_bytes == 128
    assert r.shared_wavefronts == 2 * passes and r.shared_wavefronts_ideal == 2 and r.barriers == 1


def test_vector_wavefronts(m):
    x, y = torch.randn(256), torch.zeros(256)
    r = m.kernel("wide").launch(1, 64, [x, y])
    assert torch.equal(x, y)
    assert r.shared_wavefronts == 2 * 2 * 4 and r.bank_conflicts == 0  # 16-byte lanes: four passes
    assert r.global_load_sectors == 32 and r.load_efficiency == 1


def test_unswizzled_gemm_has_conflicts():
    a, b, c = torch.randn(64, 64).to(bf16), torch.randn(64, 64).to(bf16), torch.zeros(64, 64)
    r = nvcc("common.cu", "80", "NO_SWIZZLE").kernel("gemm").launch(1, 128, [a, b, c, 64, 64, 64], 32768)
    assert (c.double() - a.double() @ b.double()).abs().max() < 1e-4
    matrices = 4 * 4 * (2 + 2) * 4  # warps * k steps * ldmatrix.x4 * 8x8 matrices
    assert r.bank_conflicts == matrices * 7  # 8 rows of 128 bytes: 8-way


def test_launch_limits(m):
    x = torch.zeros(4)
    with pytest.raises(ptxvm.PtxError, match="at most 128"):
        m.kernel("gemm").launch(1, 256, [x, x, x, 1, 1, 1], 32768)
    with pytest.raises(ptxvm.PtxError, match="shared memory exceed"):
        m.kernel("gemm").launch(1, 128, [x, x, x, 1, 1, 1], 200000)


def test_counters_are_deterministic(m):
    x, out = torch.randn(1500), torch.zeros(1)
    a, b = (m.kernel("block_reduce").launch(3, 128, [x, out, 1500]) for _ in range(2))
    a.wall_seconds = b.wall_seconds = 0
    assert a == b


def test_3d_shapes_and_early_exit(m):
    out = torch.full((2 * 3 * 2, 5 * 3 * 3), -1, dtype=torch.int32)  # 45 threads: a partial warp
    m.kernel("where3").launch((2, 3, 2), (5, 3, 3), [out])
    t = torch.arange(45) % 3 == 2
    assert (out[:, t] == -1).all()
    assert torch.equal(out[:, ~t], (torch.arange(12)[:, None] * 1000 + 30).expand(12, 30).int())


def test_same_value_writes_are_benign(m):
    y = torch.zeros(128)
    m.kernel("benign").launch(1, 128, [y])
    assert (y == 3).all()


@pytest.mark.parametrize("schedule", [None, 0, 1])
def test_named_barriers_order_only_their_warps(m, schedule):
    x, y = torch.randn(128), torch.zeros(128)
    m.kernel("pairs").launch(1, 128, [x, y, 0], checks=Checks(schedule_seed=schedule))
    assert torch.equal(y, x.view(2, 64).flip(1).reshape(-1))
    with pytest.raises((ptxvm.RaceError, ptxvm.UninitializedRead)):
        m.kernel("pairs").launch(1, 128, [x, y, 1], checks=Checks(schedule_seed=schedule))


@pytest.mark.parametrize("schedule", [0, 1])
def test_schedule_independence(m, schedule):
    """Race-free kernels give bit-identical results and counters under a random warp schedule."""
    a, b = torch.randn(64, 128).to(bf16), torch.randn(128, 64).to(bf16)
    c, d = torch.zeros(64, 64), torch.zeros(64, 64)
    r = m.kernel("gemm").launch(1, 128, [a, b, c, 64, 64, 128], 32768)
    s = m.kernel("gemm").launch(1, 128, [a, b, d, 64, 64, 128], 32768, Checks(schedule_seed=schedule))
    assert torch.equal(c, d) and r.opcodes == s.opcodes and r.shared_wavefronts == s.shared_wavefronts


def test_small_mma_shapes(m):
    a, b, c = torch.randn(16, 8).half(), torch.randn(8, 8).half(), torch.zeros(16, 8).half()
    t, u, v = torch.randn(16, 4), torch.randn(4, 8), torch.zeros(16, 8)
    m.kernel("mma_f16").launch(1, 32, [a, b, c, a, t, u, v])
    assert (c.double() - a.double() @ b.double()).abs().max() < 5e-3
    assert (v.double() - t.double() @ u.double()).abs().max() < 5e-3


# ---- further Triton features --------------------------------------------------------------------
@triton.jit
def attention_bwd_k(
    Q, K, V, DO, L, DELTA, DQ, DK, DV, scale, N, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    pn, h = tl.program_id(0), tl.program_id(1)
    off = h * N * D
    on, od = pn * BN + tl.arange(0, BN), tl.arange(0, D)
    k = tl.load(K + off + on[:, None] * D + od[None, :])
    v = tl.load(V + off + on[:, None] * D + od[None, :])
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for s in range(pn * BN // BM * BM, N, BM):
        om = s + tl.arange(0, BM)
        q = tl.load(Q + off + om[:, None] * D + od[None, :])
        do = tl.load(DO + off + om[:, None] * D + od[None, :])
        p = tl.exp(tl.dot(k, tl.trans(q)) * scale - tl.load(L + h * N + om)[None, :])
        p = tl.where(om[None, :] >= on[:, None], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv)
        ds = (p * (tl.dot(v, tl.trans(do)) - tl.load(DELTA + h * N + om)[None, :]) * scale).to(q.dtype)
        dk = tl.dot(ds, q, dk)
        tl.atomic_add(DQ + off + om[:, None] * D + od[None, :], tl.dot(tl.trans(ds), k))
    tl.store(DK + off + on[:, None] * D + od[None, :], dk)
    tl.store(DV + off + on[:, None] * D + od[None, :], dv)


@pytest.mark.parametrize("target,warps", [(80, 4), (90, 4), (90, 8)])
def test_attention_backward(record, target, warps):
    f = "*fp32"
    k = triton_kernel(
        attention_bwd_k,
        target,
        {"D": 64, "BM": 64, "BN": 64},
        num_warps=warps,
        num_stages=2,
        Q="*bf16",
        K="*bf16",
        V="*bf16",
        DO="*bf16",
        L=f,
        DELTA=f,
        DQ=f,
        DK=f,
        DV=f,
        scale="fp32",
        N="i32:16",
    )
    N, H = 128, 2
    q, kk, v, do = (torch.randn(H, N, 64).to(bf16) for _ in range(4))
    qd, kd, vd = (x.double().requires_grad_() for x in (q, kk, v))
    s = (qd @ kd.transpose(1, 2) / 8).masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))
    o = s.softmax(-1) @ vd
    o.backward(do.double())
    lse, delta = s.logsumexp(-1).float().detach(), (o * do.double()).sum(-1).float().detach()
    grads = [torch.zeros(H, N, 64) for _ in range(3)]
    record(
        f"triton attention backward sm_{target} w{warps}",
        k.launch(
            (N // 64, H),
            Q=q,
            K=kk,
            V=v,
            DO=do,
            L=lse,
            DELTA=delta,
            DQ=grads[0],
            DK=grads[1],
            DV=grads[2],
            scale=0.125,
            N=N,
        ),
    )
    for got, x in zip(grads, (qd, kd, vd), strict=False):
        assert (got.double() - x.grad).abs().max() < 0.02


@triton.jit
def dot_k(A, B, C, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(A + i[:, None] * K + k[None, :]), tl.load(B + j[:, None] * K + k[None, :])
    tl.store(C + i[:, None] * N + j[None, :], tl.dot(a, tl.trans(b), out_dtype=ACC))


@pytest.mark.parametrize(
    "target,ty,acc",
    [
        (80, "i8", "int32"),
        (90, "i8", "int32"),
        (90, "fp8e4nv", "float32"),
        (90, "fp8e5", "float32"),
        (80, "fp8e5", "float32"),
        (80, "fp16", "float16"),
        (90, "fp16", "float16"),
    ],
)
def test_dot_types(target, ty, acc):
    out = {"int32": "*i32", "float32": "*fp32", "float16": "*fp16"}[acc]
    k = triton_kernel(
        dot_k, target, {"M": 64, "N": 64, "K": 64, "ACC": getattr(tl, acc)}, A="*" + ty, B="*" + ty, C=out
    )
    if ty == "i8":
        a, b = (torch.randint(-100, 100, (64, 64), dtype=torch.int8) for _ in range(2))
    else:
        dt = {"fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}[ty]
        a, b = (torch.randn(64, 64).to(dt) for _ in range(2))
    c = torch.zeros(64, 64, dtype=getattr(torch, acc))
    k.launch(1, A=a, B=b, C=c)
    assert (c.double() - a.double() @ b.double().t()).abs().max() < (0.05 if acc == "float16" else 1e-4)


@pytest.mark.parametrize(
    "bk,trans,warps", [(16, 0, 4), (16, 1, 4), (32, 0, 8), (32, 1, 8), (128, 0, 4), (128, 1, 4)]
)
def test_wgmma_swizzle_modes(bk, trans, warps):
    from tests.ptxvm.tests.test_triton import matmul_k

    k = triton_kernel(
        matmul_k,
        90,
        {"BM": 128, "BN": 32, "BK": bk, "TRANS_B": bool(trans)},
        num_warps=warps,
        A="*bf16",
        B="*bf16",
        C="*bf16",
        M="i32",
        N="i32",
        K="i32:16",
        sa="i32:16",
        sb="i32:16",
        sc="i32:16",
    )
    M, N, K = 150, 96, 208
    a, b, c = torch.randn(M, K).to(bf16), torch.randn(K, N).to(bf16), torch.zeros(M, N).to(bf16)
    bb = b.t().contiguous() if trans else b
    k.launch((2, 3), A=a, B=bb, C=c, M=M, N=N, K=K, sa=K, sb=bb.shape[1], sc=N)
    want = a.double() @ b.double()
    assert ((c.double() - want).abs() <= want.abs() * 2**-8 + 1e-4).all()  # half a bf16 ulp


@triton.jit
def descriptor_k(A, B, C, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    pm, pn = tl.program_id(0), tl.program_id(1)
    da = tl.make_tensor_descriptor(A, [M, K], [K, 1], [BM, BK])
    db = tl.make_tensor_descriptor(B, [N, K], [K, 1], [BN, BK])
    dc = tl.make_tensor_descriptor(C, [M, N], [N, 1], [BM, BN])
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(da.load([pm * BM, k]), db.load([pn * BN, k]).T, acc)
    dc.store([pm * BM, pn * BN], acc.to(C.dtype.element_ty))


def test_device_tensor_descriptors(record):
    k = triton_kernel(
        descriptor_k,
        90,
        {"BM": 64, "BN": 64, "BK": 64},
        A="*bf16",
        B="*bf16",
        C="*bf16",
        M="i32:16",
        N="i32:16",
        K="i32:16",
    )
    M, N, K = 112, 80, 192
    a, b, c = torch.randn(M, K).to(bf16), torch.randn(N, K).to(bf16), torch.zeros(M, N).to(bf16)
    r = record("triton TMA descriptor matmul sm_90", k.launch((2, 2), A=a, B=b, C=c, M=M, N=N, K=K))
    want = a.double() @ b.double().t()
    assert ((c.double() - want).abs() <= want.abs() * 2**-8 + 1e-4).all()
    assert any("bulk.tensor" in o for o in r.opcodes)


@triton.jit
def misc_k(X, Y, I, BLOCK: tl.constexpr):  # noqa: E741
    o = tl.arange(0, BLOCK)
    x = tl.load(X + o)
    y = tl.sin(x) + tl.cos(x) + tl.log(tl.abs(x) + 1) + tl.rsqrt(tl.abs(x) + 1) + tl.erf(x) + tl.sigmoid(x)
    tl.store(Y + o, y + tl.floor(x) + tl.ceil(x) + tl.flip(x, 0))
    tl.store(I, tl.argmax(x, 0))
    tl.store(I + 1 + tl.arange(0, 64), tl.histogram((x > 0).to(tl.int32) * 3, 64))


@pytest.mark.parametrize("target", [80, 90])
def test_misc_triton_ops(target):
    k = triton_kernel(misc_k, target, {"BLOCK": 256}, X="*fp32", Y="*fp32", I="*i32")
    x, y, i = torch.randn(256), torch.zeros(256), torch.zeros(65, dtype=torch.int32)
    k.launch(1, X=x, Y=y, I=i)
    d = x.double()
    want = (
        d.sin()
        + d.cos()
        + (d.abs() + 1).log()
        + (d.abs() + 1).rsqrt()
        + torch.erf(d)
        + d.sigmoid()
        + d.floor()
        + d.ceil()
        + d.flip(0)
    )
    assert (
        (y - want).abs().max() < 1e-5
        and i[0] == x.argmax()
        and i[1] == (x <= 0).sum()
        and i[4] == (x > 0).sum()
    )


@triton.jit
def persistent_k(
    A,
    B,
    C,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WS: tl.constexpr,
):
    nn = tl.cdiv(N, BN)
    da = tl.make_tensor_descriptor(A, [M, K], [K, 1], [BM, BK])
    db = tl.make_tensor_descriptor(B, [N, K], [K, 1], [BN, BK])
    dc = tl.make_tensor_descriptor(C, [M, N], [N, 1], [BM, BN])
    for t in tl.range(tl.program_id(0), tl.cdiv(M, BM) * nn, PROGRAMS, warp_specialize=WS):
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(da.load([t // nn * BM, k]), db.load([t % nn * BN, k]).T, acc)
        dc.store([t // nn * BM, t % nn * BN], acc.to(tl.bfloat16))


@pytest.mark.parametrize("specialise", [False, True])
def test_persistent_warp_specialised_matmul(record, specialise):
    k = triton_kernel(
        persistent_k,
        90,
        {"BM": 64, "BN": 64, "BK": 64, "PROGRAMS": 2, "WS": specialise},
        A="*bf16",
        B="*bf16",
        C="*bf16",
        M="i32:16",
        N="i32:16",
        K="i32:16",
    )
    M, N, K = 192, 128, 256
    a, b, c = torch.randn(M, K).to(bf16), torch.randn(N, K).to(bf16), torch.zeros(M, N).to(bf16)
    r = record(f"triton persistent TMA matmul ws={specialise}", k.launch(2, A=a, B=b, C=c, M=M, N=N, K=K))
    want = a.double() @ b.double().t()
    assert ((c.double() - want).abs() <= want.abs() * 2**-8 + 1e-4).all()
    assert not specialise or any("try_wait" in o for o in r.opcodes)
