"""Single instructions in hand-written PTX against scalar Python references (no nvcc needed)."""

import math

import numpy as np
import pytest

from tests import ptxvm
from tests.ptxvm.numeric import tensor_core_sum, tf32_round

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
TEMPLATE = """.version 8.5
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd) {{
 .reg .pred %p<4>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %rd<19>; .reg .f32 %f<9>; .reg .f64 %fd<9>;
 ld.param.u64 %rd11, [pa]; ld.param.u64 %rd12, [pb]; ld.param.u64 %rd13, [pc]; ld.param.u64 %rd14, [pd];
 mov.u32 %r8, %tid.x; mul.wide.u32 %rd15, %r8, 8;
 add.s64 %rd11, %rd11, %rd15; add.s64 %rd12, %rd12, %rd15;
 add.s64 %rd13, %rd13, %rd15; add.s64 %rd14, %rd14, %rd15;
 ld.global.u64 %rd1, [%rd11]; ld.global.u64 %rd2, [%rd12]; ld.global.u64 %rd3, [%rd13];
 cvt.u32.u64 %r1, %rd1; cvt.u32.u64 %r2, %rd2; cvt.u32.u64 %r3, %rd3;
 cvt.u16.u64 %h1, %rd1; cvt.u16.u64 %h2, %rd2;
 mov.b32 %f1, %r1; mov.b32 %f2, %r2; mov.b32 %f3, %r3; mov.b64 %fd1, %rd1;
 mov.b32 %r4, 0; mov.b64 %rd4, 0;
 {body}
 {store}
 ret;
}}"""
STORE = {
    "r": "cvt.u64.u32 %rd4, %r4;",
    "rd": "",
    "f": "mov.b32 %r4, %f4; cvt.u64.u32 %rd4, %r4;",
    "h": "cvt.u64.u16 %rd4, %h4;",
    "fd": "mov.b64 %rd4, %fd4;",
    "p": "selp.u64 %rd4, 1, 0, %p1;",
}


def execute(body, kind, a, b, c):
    ptx = TEMPLATE.format(body=body, store=STORE[kind] + " st.global.u64 [%rd14], %rd4;")
    d = np.zeros(len(a), np.uint64)
    ptxvm.load(ptx).kernel("k").launch(1, len(a), [a, b, c, d])
    return d


def values():
    rng = np.random.default_rng(1)
    v = [
        rng.integers(0, 2**63, 64).astype(np.uint64) * np.uint64(2) + rng.integers(0, 2, 64).astype(np.uint64)
        for _ in range(3)
    ]
    for x in v:
        x[:6] = [0, 1, M64, 0x80000000, 0x7FFFFFFF, 0x8000000000000000]
    v[1][6:40] %= 70
    v[2][6:50] %= 40
    return v


s32 = lambda x: (x & M32) - ((x & 0x80000000) << 1)
s64 = lambda x: (x & M64) - ((x & 1 << 63) << 1)
s8 = lambda x: (x & 255) - ((x & 128) << 1)


def bfe_s(a, b, c):
    a, pos, n = s32(a), b & 255, c & 255
    top = min(pos + n - 1, 31)
    sign = 0 if n == 0 else (a & M32) >> top & 1
    return sum(((a & M32) >> (pos + i) & 1 if i < n and pos + i <= 31 else sign) << i for i in range(32))


def prmt(a, b, c):
    bytes_, out = [(a | b << 32) >> 8 * i & 255 for i in range(8)], 0
    for i in range(4):
        sel = c >> 4 * i & 15
        v = bytes_[sel & 7]
        out |= ((255 if v & 128 else 0) if sel & 8 else v) << 8 * i
    return out


def bfi(a, b, c, n, bits=32):
    c, n = c & 255, n & 255
    mask = (((1 << n) - 1) << c) & ((1 << bits) - 1)
    return (a << c & mask) | (b & ~mask)


INTEGER = [
    ("bfe.u32 %r4, %r1, %r2, %r3;", lambda a, b, c: a >> (b & 255) & ((1 << (c & 255)) - 1)),
    ("bfe.s32 %r4, %r1, %r2, %r3;", bfe_s),
    ("bfi.b32 %r4, %r1, %r2, %r3, 7;", lambda a, b, c: bfi(a, b, c, 7)),
    ("prmt.b32 %r4, %r1, %r2, %r3;", prmt),
    ("lop3.b32 %r4, %r1, %r2, %r3, 0x96;", lambda a, b, c: a ^ b ^ c),
    ("lop3.b32 %r4, %r1, %r2, %r3, 0xe2;", lambda a, b, c: (a & b) | (~b & c) & M32),
    ("shf.l.clamp.b32 %r4, %r1, %r2, %r3;", lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32 & M32),
    ("shf.r.clamp.b32 %r4, %r1, %r2, %r3;", lambda a, b, c: (b << 32 | a) >> min(c, 32) & M32),
    ("shf.r.wrap.b32 %r4, %r1, %r2, %r3;", lambda a, b, c: (b << 32 | a) >> (c & 31) & M32),
    ("shl.b32 %r4, %r1, %r2;", lambda a, b, c: a << b & M32 if b < 32 else 0),
    ("shr.u32 %r4, %r1, %r2;", lambda a, b, c: a >> b if b < 32 else 0),
    ("shr.s32 %r4, %r1, %r2;", lambda a, b, c: s32(a) >> min(b, 31) & M32),
    ("brev.b32 %r4, %r1;", lambda a, b, c: int(f"{a:032b}"[::-1], 2)),
    ("clz.b32 %r4, %r1;", lambda a, b, c: 32 - a.bit_length()),
    ("popc.b32 %r4, %r1;", lambda a, b, c: a.bit_count()),
    ("bfind.u32 %r4, %r1;", lambda a, b, c: (a.bit_length() - 1) & M32),
    ("bfind.s32 %r4, %r1;", lambda a, b, c: ((~a if a >> 31 else a) & M32).bit_length() - 1 & M32),
    ("bmsk.clamp.b32 %r4, %r1, %r2;", lambda a, b, c: ((1 << min(b, 32)) - 1) << min(a, 32) & M32),
    (
        "dp4a.s32.u32 %r4, %r1, %r2, %r3;",
        lambda a, b, c: sum(s8(a >> 8 * i) * (b >> 8 * i & 255) for i in range(4)) + c & M32,
    ),
    ("mad.hi.s32 %r4, %r1, %r2, %r3;", lambda a, b, c: (s32(a) * s32(b) >> 32) + c & M32),
    ("mul.hi.u32 %r4, %r1, %r2;", lambda a, b, c: a * b >> 32),
    ("add.sat.s32 %r4, %r1, %r2;", lambda a, b, c: max(-(2**31), min(2**31 - 1, s32(a) + s32(b))) & M32),
    ("abs.s32 %r4, %r1;", lambda a, b, c: abs(s32(a)) & M32),
    ("slct.b32.s32 %r4, %r1, %r2, %r3;", lambda a, b, c: a if s32(c) >= 0 else b),
    ("cnot.b32 %r4, %r1;", lambda a, b, c: int(a == 0)),
    ("set.lt.u32.s32 %r4, %r1, %r2;", lambda a, b, c: M32 if s32(a) < s32(b) else 0),
    ("add.cc.u32 %r4, %r1, %r2; addc.u32 %r4, %r3, 0;", lambda a, b, c: c + (a + b >> 32) & M32),
    ("sub.cc.u32 %r4, %r1, %r2; subc.u32 %r4, %r3, 0;", lambda a, b, c: c - (a < b) & M32),
    ("cvt.s32.s8 %r4, %r1;", lambda a, b, c: s8(a) & M32),
    ("cvt.sat.u8.s32 %r4, %r1;", lambda a, b, c: max(0, min(255, s32(a)))),
    ("mul24.lo.u32 %r4, %r1, %r2;", lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) & M32),
    ("mov.b32 {%h3, %h4}, %r1; mov.b32 %r4, {%h4, %h3};", lambda a, b, c: (a >> 16 | a << 16) & M32),
]
WIDE = [
    ("mul.hi.s64 %rd4, %rd1, %rd2;", lambda a, b, c: s64(a) * s64(b) >> 64 & M64),
    ("mul.hi.u64 %rd4, %rd1, %rd2;", lambda a, b, c: a * b >> 64),
    ("mad.lo.s64 %rd4, %rd1, %rd2, %rd3;", lambda a, b, c: a * b + c & M64),
    ("mad.wide.s32 %rd4, %r1, %r2, %rd3;", lambda a, b, c: s32(a) * s32(b) + c & M64),
    ("mad.wide.u32 %rd4, %r1, %r2, %rd3;", lambda a, b, c: (a & M32) * (b & M32) + c & M64),
    ("bfe.u64 %rd4, %rd1, %r2, 9;", lambda a, b, c: a >> (b & 255) & 511),
    ("bfi.b64 %rd4, %rd1, %rd2, %r3, 20;", lambda a, b, c: bfi(a, b, c, 20, 64)),
    ("brev.b64 %rd4, %rd1;", lambda a, b, c: int(f"{a:064b}"[::-1], 2)),
    ("clz.b64 %r4, %rd1; cvt.u64.u32 %rd4, %r4;", lambda a, b, c: 64 - a.bit_length()),
    ("shr.s64 %rd4, %rd1, %r2;", lambda a, b, c: s64(a) >> min(b & M32, 63) & M64),
    ("min.s64 %rd4, %rd1, %rd2;", lambda a, b, c: min(s64(a), s64(b)) & M64),
    ("cvt.s64.s32 %rd4, %r1;", lambda a, b, c: s32(a) & M64),
    ("cvt.u64.s16 %rd4, %h1;", lambda a, b, c: (a & 0xFFFF) - ((a & 0x8000) << 1) & M64),
]


def check(body, kind, ref, mask):
    a, b, c = values()
    got = execute(body, kind, a, b, c)
    for i in range(len(a)):
        x, y, z = (int(v[i]) & mask for v in (a, b, c))
        assert int(got[i]) == ref(x, y, z), (
            body,
            hex(x),
            hex(y),
            hex(z),
            hex(int(got[i])),
            hex(ref(x, y, z)),
        )


@pytest.mark.parametrize("body,ref", INTEGER, ids=lambda x: x.split(";")[0] if isinstance(x, str) else "")
def test_integer32(body, ref):
    check(body, "r", ref, M32)


@pytest.mark.parametrize("body,ref", WIDE, ids=lambda x: x.split(";")[0] if isinstance(x, str) else "")
def test_integer64(body, ref):
    check(body, "rd", ref, M64)


def floats():
    v = [
        0.0,
        -0.0,
        1.5,
        2.5,
        -2.5,
        0.3,
        -7.7,
        3e9,
        -3e9,
        1e20,
        -1e20,
        math.inf,
        -math.inf,
        math.nan,
        1e-40,
        65504.0,
        65520.0,
        1 + 2**-11,
        1 + 3 * 2**-11,
        1 + 2**-8,
        1 + 3 * 2**-8,
        447.9,
        2**-24,
        2**-25,
    ] + [x / 7 for x in range(-20, 20)]
    return np.array(v, np.float32)


def f32_bits(x):
    return x.view(np.uint32).astype(np.uint64)


def test_float_conversions():
    torch = pytest.importorskip("torch")
    x = floats()
    t, a, z = torch.from_numpy(x), f32_bits(x), np.zeros(len(x), np.uint64)
    same = lambda got, want: np.array_equal(got, want)
    clamp = lambda lo, hi, v: np.array(
        [
            0 if math.isnan(e) else max(lo, min(hi, int(e) if math.isfinite(e) else math.copysign(hi + 1, e)))
            for e in v.tolist()
        ]
    )
    for mode, fn in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        got = execute(f"cvt.{mode}.s32.f32 %r4, %f1;", "r", a, z, z).astype(np.uint32).view(np.int32)
        assert same(got, clamp(-(2**31), 2**31 - 1, fn(x.astype(np.float64)))), mode
    got = execute("cvt.rzi.u32.f32 %r4, %f1;", "r", a, z, z)
    assert same(got, clamp(0, 2**32 - 1, np.trunc(x.astype(np.float64))).astype(np.uint64))
    ok = ~np.isnan(x)
    got = execute("cvt.rn.f16.f32 %h4, %f1;", "h", a, z, z).astype(np.uint16)
    assert same(got[ok], t.half().numpy().view(np.uint16)[ok])
    got = execute("cvt.rn.bf16.f32 %h4, %f1;", "h", a, z, z).astype(np.uint16)
    assert same(got[ok], t.bfloat16().view(torch.int16).numpy().view(np.uint16)[ok])
    got = execute("cvt.rz.bf16.f32 %h4, %f1;", "h", a, z, z)
    assert same(got, a >> np.uint64(16))
    got = execute("cvt.rn.bf16x2.f32 %r4, %f1, %f2;", "r", a, f32_bits(np.full(len(x), 2.0, np.float32)), z)
    assert (got & np.uint64(0xFFFF) == 0x4000).all()
    got = execute("cvt.rn.satfinite.e4m3x2.f32 %h4, %f2, %f1;", "h", a, z, z).astype(np.uint8)
    fin = ok & (np.abs(x) <= 448)
    assert same(got[fin], t.to(torch.float8_e4m3fn).view(torch.uint8).numpy()[fin])
    got = execute("cvt.rn.satfinite.e5m2x2.f32 %h4, %f2, %f1;", "h", a, z, z).astype(np.uint8)
    fin = ok & (np.abs(x) <= 57344)
    assert same(got[fin], t.to(torch.float8_e5m2).view(torch.uint8).numpy()[fin])
    got = (
        execute("cvt.rz.f16.f32 %h4, %f1;", "h", a, z, z)
        .astype(np.uint16)
        .view(np.float16)
        .astype(np.float64)
    )
    fin = np.isfinite(x) & (np.abs(x) < 6e4)
    assert (np.abs(got[fin]) <= np.abs(x[fin].astype(np.float64))).all()
    assert (np.abs(got[fin] - x[fin]) <= np.maximum(np.abs(x[fin]) * 2.0**-10, 2.0**-24)).all()
    got = execute("cvt.rni.sat.f32.f32 %f4, %f1;", "f", a, z, z).astype(np.uint32).view(np.float32)
    assert same(got, np.nan_to_num(np.clip(np.rint(x), 0, 1), nan=0.0))


@pytest.mark.parametrize(
    "cmp", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_float_compares(cmp):
    x = floats()
    y = np.roll(x, 5)
    y[::3] = x[::3]
    nan = np.isnan(x) | np.isnan(y)
    base = {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}
    want = (
        ~nan
        if cmp == "num"
        else nan
        if cmp == "nan"
        else base[cmp] & ~nan
        if cmp in base
        else base[cmp[:2]] | nan
    )
    got = execute(f"setp.{cmp}.f32 %p1, %f1, %f2;", "p", f32_bits(x), f32_bits(y), f32_bits(x))
    assert np.array_equal(got, want)
    got = execute(f"setp.{cmp}.or.f32 %p2|%p1, %f1, %f2, !%p3;", "p", f32_bits(x), f32_bits(y), f32_bits(x))
    assert got.all()


def test_min_max_nan_and_testp():
    x = floats()
    y = np.roll(x, 1)
    a, b = f32_bits(x), f32_bits(y)
    out = lambda body: execute(body, "f", a, b, a).astype(np.uint32).view(np.float32)
    assert np.array_equal(out("max.f32 %f4, %f1, %f2;"), np.fmax(x, y), equal_nan=True)
    assert np.array_equal(out("min.NaN.f32 %f4, %f1, %f2;"), np.minimum(x, y), equal_nan=True)
    for kind, want in (
        ("finite", np.isfinite(x)),
        ("infinite", np.isinf(x)),
        ("notanumber", np.isnan(x)),
        ("subnormal", (x != 0) & (np.abs(x) < 2.0**-126)),
        ("normal", np.isfinite(x) & (np.abs(x) >= 2.0**-126)),
    ):
        assert np.array_equal(execute(f"testp.{kind}.f32 %p1, %f1;", "p", a, b, a), want), kind


def test_fma_is_fused_and_directed():
    x = np.array([1 + 2.0**-12, 1 + 2.0**-23, 3.0, 1e30], np.float32)
    y = np.array([1 - 2.0**-12, 1 + 2.0**-23, 1 / 3, 1e-30], np.float32)
    c = np.array([-1, -1, -1, -1], np.float32)
    a, b, z = f32_bits(x), f32_bits(y), f32_bits(c)
    exact = x.astype(np.longdouble) * y + c
    out = {
        m: execute(f"fma.{m}.f32 %f4, %f1, %f2, %f3;", "f", a, b, z).astype(np.uint32).view(np.float32)
        for m in ("rn", "rz", "rm", "rp")
    }
    assert np.array_equal(out["rn"], exact.astype(np.float32))
    assert (
        (out["rm"] <= exact).all()
        and (out["rp"] >= exact).all()
        and (np.abs(out["rz"]) <= np.abs(exact)).all()
    )


def test_movmatrix():
    z = np.arange(32, dtype=np.uint64)
    a = (2 * z) | (2 * z + np.uint64(1)) << np.uint64(16)  # 8x8 matrix 0..63
    got = (
        execute("movmatrix.sync.aligned.m8n8.trans.b16 %r4, %r1;", "r", a, z, z)
        .astype(np.uint32)
        .view(np.uint16)
    )
    assert np.array_equal(got.reshape(8, 8), np.arange(64).reshape(8, 8).T)


def test_branch_table_and_divergence():
    a = np.arange(64, dtype=np.uint64) % np.uint64(3)
    body = """ts: .branchtargets L0, L1, L2;
 brx.idx %r1, ts;
L0: mov.b32 %r4, 10; bra.uni DONE;
L1: mov.b32 %r4, 11; bra.uni DONE;
L2: mov.b32 %r4, 12;
DONE:
 activemask.b32 %r5; popc.b32 %r5, %r5; mad.lo.u32 %r4, %r5, 100, %r4;"""
    assert np.array_equal(execute(body, "r", a, a, a), a + np.uint64(3210))  # reconverged at DONE


def test_scoped_names():
    """The same register and label names in nested scopes, as inline assembly produces."""
    body = """{ .reg .pred p; .reg .b32 t; setp.gt.u32 p, %r1, 5; @p bra L; mov.b32 %r4, 1;
 L: mov.b32 t, 7; add.u32 %r4, %r4, t; }
 { .reg .pred p; .reg .b32 t; setp.gt.u32 p, %r1, 9; @p bra L; mov.b32 t, 100; add.u32 %r4, %r4, t; L: }"""
    a = np.arange(32, dtype=np.uint64)
    want = [(1 if x <= 5 else 0) + 7 + (100 if x <= 9 else 0) for x in range(32)]
    assert execute(body, "r", a, a, a).tolist() == want


def test_tensor_cores_cut_off_what_they_add():
    last = 2.0**-23  # the last bit of 1
    assert tensor_core_sum(np.array([1, last / 2, last / 2])) == 1 + last
    assert tensor_core_sum(np.array([1, last / 4, last / 4])) == 1  # the sum lies between two floats
    assert tensor_core_sum(np.array([1, *[last / 8] * 8])) == 1
    assert tensor_core_sum(np.array([-1, -last / 2])) == -1
    assert tensor_core_sum(np.array([0.0, 0.0])) == 0
    assert np.isnan(tensor_core_sum(np.array([np.inf, -np.inf])))
    assert tensor_core_sum(np.array([np.inf, 1.0])) == np.inf


def test_long_sums_err_as_on_an_h100():
    """Relative error and bias of 64 products of normal numbers, each of three tf32 products in one chain of
    mma.m16n8k8; an H100 gave 4.62e-7 and -2.97e-7."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((8192, 64)).astype(np.float32) for _ in range(2))
    large_a, large_b = tf32_round(a), tf32_round(b)
    small_a, small_b = tf32_round(a - large_a), tf32_round(b - large_b)
    total = np.zeros(len(a), np.float32)
    for k in range(0, 64, 8):
        for left, right in ((small_a, large_b), (large_a, small_b), (large_a, large_b)):
            products = left[:, k : k + 8].astype(np.float64) * right[:, k : k + 8]
            total = tensor_core_sum(np.concatenate((products, total[:, None]), -1))
    exact = (a.astype(np.float64) * b).sum(-1)
    size = np.sqrt((exact**2).mean())
    assert abs(np.sqrt(((total - exact) ** 2).mean()) / size / 4.62e-7 - 1) < 0.03
    assert abs(((total - exact) * np.sign(exact)).mean() / size / -2.97e-7 - 1) < 0.06
