"""Triton kernels compiled offline for sm_80 and sm_90 and run on the emulator."""

import pytest
import torch
import triton
import triton.language as tl

from tests.ptxvm.tests.build import triton_kernel

bf16 = torch.bfloat16
pytestmark = pytest.mark.slow


@triton.jit
def softmax_k(X, Y, stride, n, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + cols, mask=cols < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(Y + row * stride + cols, (e / tl.sum(e, 0)).to(Y.dtype.element_ty), mask=cols < n)


@triton.jit
def layernorm_k(X, G, B, Y, Mean, Rstd, n, eps, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    mask = cols < n
    x = tl.load(X + row * n + cols, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / n
    d = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(d * d, 0) / n + eps)
    tl.store(Mean + row, mean)
    tl.store(Rstd + row, rstd)
    y = d * rstd * tl.load(G + cols, mask=mask) + tl.load(B + cols, mask=mask)
    tl.store(Y + row * n + cols, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def matmul_k(
    A, B, C, M, N, K, sa, sb, sc, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TRANS_B: tl.constexpr
):
    pm, pn = tl.program_id(0), tl.program_id(1)
    om, on, ok = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        a = tl.load(
            A + om[:, None] * sa + (k + ok)[None, :],
            mask=(om[:, None] < M) & ((k + ok)[None, :] < K),
            other=0.0,
        )
        if TRANS_B:
            b = tl.trans(
                tl.load(
                    B + on[:, None] * sb + (k + ok)[None, :],
                    mask=(on[:, None] < N) & ((k + ok)[None, :] < K),
                    other=0.0,
                )
            )
        else:
            b = tl.load(
                B + (k + ok)[:, None] * sb + on[None, :],
                mask=((k + ok)[:, None] < K) & (on[None, :] < N),
                other=0.0,
            )
        acc = tl.dot(a, b, acc)
    tl.store(
        C + om[:, None] * sc + on[None, :],
        acc.to(C.dtype.element_ty),
        mask=(om[:, None] < M) & (on[None, :] < N),
    )


@triton.jit
def attention_k(
    Q, K, V, Out, sm_scale, N, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr
):
    pm, h = tl.program_id(0), tl.program_id(1)
    Q += h * N * D
    K += h * N * D
    V += h * N * D
    Out += h * N * D
    om, od = pm * BM + tl.arange(0, BM), tl.arange(0, D)
    q = tl.load(Q + om[:, None] * D + od[None, :])
    m = tl.full([BM], -float("inf"), tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    hi = (pm + 1) * BM if CAUSAL else N
    for s in range(0, hi, BN):
        on = s + tl.arange(0, BN)
        k = tl.load(K + on[:, None] * D + od[None, :])
        qk = tl.dot(q, tl.trans(k))
        if CAUSAL:
            qk = tl.where(om[:, None] >= on[None, :], qk, -float("inf"))
        mn = tl.maximum(m, tl.max(qk, 1) * sm_scale)
        p = tl.math.exp2(qk * sm_scale - mn[:, None])
        a = tl.math.exp2(m - mn)
        row_sum = row_sum * a + tl.sum(p, 1)
        acc = acc * a[:, None]
        v = tl.load(V + on[:, None] * D + od[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc)
        m = mn
    acc = acc / row_sum[:, None]
    tl.store(Out + om[:, None] * D + od[None, :], acc.to(Out.dtype.element_ty))


@triton.jit
def dropout_k(X, Y, n, p, seed, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.rand(seed, offs) > p
    x = tl.load(X + offs, mask=offs < n)
    tl.store(Y + offs, tl.where(keep, x / (1 - p), 0.0), mask=offs < n)


@triton.jit
def atomics_k(X, Idx, Sum, Count, Max, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x, i = tl.load(X + offs, mask=mask), tl.load(Idx + offs, mask=mask)
    tl.atomic_add(Sum + i, x, mask=mask)
    tl.atomic_add(Count + i, 1, mask=mask)
    tl.atomic_max(Max + i, x, mask=mask)


@triton.jit
def scan_sort_k(X, S, T, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(X + tl.program_id(0) * BLOCK + cols)
    tl.store(S + tl.program_id(0) * BLOCK + cols, tl.cumsum(x, 0))
    tl.store(T + tl.program_id(0) * BLOCK + cols, tl.sort(x))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(got, want, tol):
    assert torch.isfinite(got.double()).all()
    err = (got.double() - want.double()).abs().max().item()
    assert err <= tol, err


@pytest.mark.parametrize("target", [80, 90])
def test_softmax(record, target):
    k = triton_kernel(softmax_k, target, {"BLOCK": 512}, X="*bf16", Y="*bf16", stride="i32:16", n="i32")
    x = torch.randn(5, 400).to(bf16)
    y = torch.zeros_like(x)
    record(f"triton softmax sm_{target}", k.launch(5, X=x, Y=y, stride=400, n=399))
    close(y[:, :399], x[:, :399].double().softmax(1), 2e-3)


@pytest.mark.parametrize("target", [80, 90])
def test_layernorm(record, target):
    k = triton_kernel(
        layernorm_k,
        target,
        {"BLOCK": 512},
        X="*bf16",
        G="*fp32",
        B="*fp32",
        Y="*bf16",
        Mean="*fp32",
        Rstd="*fp32",
        n="i32",
        eps="fp32",
    )
    x, g, b = torch.randn(5, 390).to(bf16), torch.randn(390), torch.randn(390)
    y, mean, rstd = torch.zeros_like(x), torch.zeros(5), torch.zeros(5)
    record(
        f"triton layernorm sm_{target}",
        k.launch(5, X=x, G=g, B=b, Y=y, Mean=mean, Rstd=rstd, n=390, eps=1e-5),
    )
    close(y, torch.nn.functional.layer_norm(x.double(), (390,), g.double(), b.double(), 1e-5), 0.03)
    close(mean, x.double().mean(1), 1e-5)


@pytest.mark.parametrize(
    "target,warps,trans,dtype",
    [
        (80, 4, 0, bf16),
        (80, 4, 1, torch.float16),
        (80, 4, 0, torch.float32),
        (90, 4, 0, bf16),
        (90, 4, 1, torch.float16),
        (90, 8, 1, bf16),
        (90, 8, 0, bf16),
        (90, 4, 0, torch.float32),
        (90, 4, 1, torch.float32),
    ],
)
def test_matmul(record, target, warps, trans, dtype):
    ty = {bf16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    f32 = dtype is torch.float32
    BM, BN, BK = 128, 64, (32 if f32 else 64)
    k = triton_kernel(
        matmul_k,
        target,
        {"BM": BM, "BN": BN, "BK": BK, "TRANS_B": bool(trans)},
        num_warps=warps,
        A=ty,
        B=ty,
        C="*fp32",
        M="i32",
        N="i32",
        K="i32:16",
        sa="i32:16",
        sb="i32:16",
        sc="i32:16",
    )
    M, N, K = 150, 80, 208
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    c = torch.zeros(M, N)
    bb = b.t().contiguous() if trans else b
    r = record(
        f"triton matmul sm_{target} w{warps} {'NT' if trans else 'NN'} {str(dtype)[6:]}",
        k.launch((-(-M // BM), -(-N // BN)), A=a, B=bb, C=c, M=M, N=N, K=K, sa=K, sb=bb.shape[1], sc=N),
    )
    close(c, a.double() @ b.double(), 0.2 if f32 else 1e-4)
    assert any(o.startswith("wgmma" if target == 90 and not f32 else "") for o in r.opcodes)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("target,warps", [(80, 4), (90, 4), (90, 8)])
def test_attention(record, target, warps, causal):
    k = triton_kernel(
        attention_k,
        target,
        {"D": 64, "BM": 128 if warps == 8 or target == 80 else 64, "BN": 64, "CAUSAL": causal},
        num_warps=warps,
        Q="*bf16",
        K="*bf16",
        V="*bf16",
        O="*bf16",
        sm_scale="fp32",
        N="i32:16",
    )
    N, H, BM = 256, 2, (128 if warps == 8 or target == 80 else 64)
    q, kk, v = (torch.randn(H, N, 64).to(bf16) for _ in range(3))
    o = torch.zeros_like(q)
    r = record(
        f"triton attention sm_{target} w{warps} causal={causal}",
        k.launch((N // BM, H), Q=q, K=kk, V=v, O=o, sm_scale=64**-0.5 * 1.44269504, N=N),
    )
    s = q.double() @ kk.double().transpose(1, 2) / 8
    if causal:
        s = s.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))
    close(o, s.softmax(-1) @ v.double(), 0.02)
    assert any(x.startswith("wgmma" if target == 90 else "mma.sync") for x in r.opcodes)


def philox(seed, offset):
    """Philox 4x32-10 as in tl.rand, first output word."""
    import numpy as np

    c = [offset.astype(np.uint64)] + [np.zeros(len(offset), np.uint64) for _ in range(3)]
    k0, k1, m32 = seed & 0xFFFFFFFF, seed >> 32, np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            b & m32,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            a & m32,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    x = c[0].astype(np.uint32).view(np.int32)
    return np.where(x < 0, -x - 1, x) * np.float32(4.6566127342e-10)


@pytest.mark.parametrize("target", [80, 90])
def test_dropout(record, target):
    import numpy as np

    k = triton_kernel(dropout_k, target, {"BLOCK": 256}, X="*fp32", Y="*fp32", n="i32", p="fp32", seed="i32")
    x, y = torch.randn(1000), torch.zeros(1000)
    record(f"triton dropout sm_{target}", k.launch(4, X=x, Y=y, n=1000, p=0.3, seed=1234))
    keep = torch.from_numpy(philox(1234, np.arange(1000)) > np.float32(0.3))
    close(y, torch.where(keep, x.double() / 0.7, 0.0), 1e-5)


@pytest.mark.parametrize("target", [80, 90])
def test_atomics(record, target):
    k = triton_kernel(
        atomics_k,
        target,
        {"BLOCK": 256},
        X="*fp32",
        Idx="*i32",
        Sum="*fp32",
        Count="*i32",
        Max="*fp32",
        n="i32",
    )
    x, idx = torch.randn(900), torch.randint(0, 20, (900,), dtype=torch.int32)
    s, c, mx = torch.zeros(20), torch.zeros(20, dtype=torch.int32), torch.full((20,), -100.0)
    record(f"triton atomics sm_{target}", k.launch(4, X=x, Idx=idx, Sum=s, Count=c, Max=mx, n=900))
    close(s, torch.zeros(20).double().index_add(0, idx.long(), x.double()), 1e-4)
    assert torch.equal(c.long(), torch.bincount(idx.long(), minlength=20))
    close(mx, torch.stack([x[idx == i].max() for i in range(20)]), 0)


def test_scan_sort(record):
    k = triton_kernel(scan_sort_k, 80, {"BLOCK": 256}, X="*fp32", S="*fp32", T="*fp32")
    x = torch.randn(2, 256)
    s, t = torch.zeros_like(x), torch.zeros_like(x)
    record("triton cumsum + sort", k.launch(2, X=x, S=s, T=t))
    close(s, x.double().cumsum(1), 1e-4)
    assert torch.equal(t, x.sort(1).values)
