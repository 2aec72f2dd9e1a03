"""Integer, floating-point, logic, compare and move instructions."""

import numpy as np

from ..errors import UnsupportedOpcode
from ..machine import op
from ..numeric import DTYPE, HALF_TYPES, directed_f32, is_float
from ..parse import TYPE_BYTES, Pair, Reg, Special, Vec


def _finish(ins, fn):
    """Wrap a float function with directed rounding, .sat and .relu."""
    mode = next((m for m in ins.mods if m in ("rz", "rm", "rp")), None)
    if mode and ins.type == "f32":
        exact = fn
        return lambda *a: directed_f32(exact(*[np.asarray(x, np.float64) for x in a]), mode)
    if ins.has("sat") and is_float(ins.type):
        return lambda *a: np.clip(np.nan_to_num(fn(*a), nan=0.0), 0, 1)
    if ins.has("relu"):
        return lambda *a: np.maximum(fn(*a), 0)
    return fn


def _simple(name, fn):
    @op(name)
    def build(k, ins):
        return k.elementwise(ins, _finish(ins, fn), ins.type)


def _carry(k, ins, negate):
    """add/sub with carry in or out, 32 or 64 bits."""
    d, x, y = ins.args
    bits = 8 * TYPE_BYTES[ins.type]
    t = f"u{bits}"
    a, b, put = k.src(x, t), k.src(y, t), k.writer(d, t)
    carry_in, carry_out = ins.op in ("addc", "subc"), ins.has("cc")
    flip = DTYPE[t].type(2**bits - 1 if negate else 0)  # a - b = a + ~b + 1

    def run(m):
        c = k.cc if carry_in else np.zeros(k.T, bool)
        c = ~c if negate else c  # CC holds the borrow for subtraction
        s = np.broadcast_to(a + (b ^ flip), (k.T,))
        r = s + c.astype(DTYPE[t])
        out = (s < a) | (r < s)
        put(r, m)
        if carry_out:
            np.copyto(k.cc, ~out if negate else out, where=m)

    return run


@op("add", "sub", "addc", "subc")
def add(k, ins):
    sub = ins.op.startswith("sub")
    if ins.op.endswith("c") or ins.has("cc"):
        return _carry(k, ins, sub)
    fn, t = np.subtract if sub else np.add, ins.type
    if ins.has("sat") and t == "s32":
        wide = lambda a, b: np.clip(fn(a.astype(np.int64), b), -(2**31), 2**31 - 1).astype(np.int32)
        return k.elementwise(ins, wide, t)
    return k.elementwise(ins, _finish(ins, fn), t)


def mul_hi(a, b):
    """High half of the product."""
    if a.dtype.itemsize < 8:
        bits = 8 * a.dtype.itemsize
        w = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((np.asarray(a).astype(w) * np.asarray(b).astype(w)) >> w(bits)).astype(a.dtype)
    ua, ub = np.asarray(a).view(np.uint64), np.asarray(b).view(np.uint64)
    lo32, s = np.uint64(0xFFFFFFFF), np.uint64(32)
    al, ah, bl, bh = ua & lo32, ua >> s, ub & lo32, ub >> s
    mid = ah * bl + (al * bl >> s)
    hi = ah * bh + (mid >> s) + ((al * bh + (mid & lo32)) >> s)
    if a.dtype.kind == "i":
        hi = hi - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return hi.view(a.dtype)


_WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


@op("mul24", "mad24")
def mul24(k, ins):
    """Product of the low 24 bits, low half."""
    if ins.has("hi"):
        raise UnsupportedOpcode(ins.opcode)
    low = (
        (lambda x: x << np.int32(8) >> np.int32(8))
        if ins.type == "s32"
        else (lambda x: x & np.uint32(0xFFFFFF))
    )
    if ins.op == "mul24":
        return k.elementwise(ins, lambda a, b: low(a) * low(b), ins.type)
    return k.elementwise(ins, lambda a, b, c: low(a) * low(b) + c, ins.type)


@op("mul")
def mul(k, ins):
    t = ins.type
    if ins.has("wide"):
        w = DTYPE[_WIDE[t]]
        d = k.dst(ins.args[0], _WIDE[t])
        a, b = (k.src(x, t) for x in ins.args[1:])
        b = b.astype(w) if np.ndim(b) == 0 else b
        return lambda m: np.multiply(a, b, out=d, where=m, dtype=w, casting="unsafe")
    if ins.has("hi"):
        return k.elementwise(ins, mul_hi, t)
    return k.elementwise(ins, _finish(ins, np.multiply), t)


@op("mad", "madc")
def mad(k, ins):
    t = ins.type
    if is_float(t):
        return fma(k, ins)
    if ins.has("cc") or ins.op == "madc":
        a, b, c = (k.src(x, "u32" if t[1:] == "32" else "u64") for x in ins.args[1:])
        put, dt = k.writer(ins.args[0], t.replace("s", "u")), a.dtype if np.ndim(a) else b.dtype

        def run(m):
            sa, sb = (np.asarray(x).view(DTYPE[t]) for x in (a, b))
            prod = np.asarray(mul_hi(sa, sb) if ins.has("hi") else sa * sb).view(dt)
            s = np.broadcast_to(prod + c, (k.T,))
            r = s + k.cc.astype(dt) if ins.op == "madc" else s
            out = (s < prod) | (r < s)
            put(r, m)
            if ins.has("cc"):
                np.copyto(k.cc, out, where=m)

        return run
    if ins.has("wide"):
        w = DTYPE[_WIDE[t]]
        return k.elementwise(
            ins, lambda a, b, c: a.astype(w) * w.type(1) * b + c, _WIDE[t], src_types=[t, t, _WIDE[t]]
        )
    if ins.has("hi"):
        return k.elementwise(ins, lambda a, b, c: mul_hi(a, b) + c, t)
    return k.elementwise(ins, lambda a, b, c: a * b + c, t)


@op("fma")
def fma(k, ins):
    """Fused multiply-add in the next wider format (a second rounding can differ in the last bit)."""
    t = ins.type
    wide = np.longdouble if t == "f64" else np.float64
    out = np.float64 if t == "f64" else np.float32
    if t in HALF_TYPES:
        return k.elementwise(ins, _finish(ins, lambda a, b, c: a.astype(wide) * b + c), t)
    if ins.has("rz", "rm", "rp"):
        return k.elementwise(ins, _finish(ins, lambda a, b, c: a * b + c), t)
    return k.elementwise(
        ins, _finish(ins, lambda a, b, c: (np.multiply(a, b, dtype=wide) + c).astype(out)), t
    )


def _int_div(a, b):
    """C-style truncating division; division by zero gives all ones like the hardware."""
    a, b = np.broadcast_arrays(a, b)
    zero = b == 0
    if a.dtype.kind == "u":
        q = a // np.where(zero, 1, b)
        return np.where(zero, ~np.zeros_like(a), q)
    safe = np.where(zero, 1, b)
    q = a // safe
    q = q + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(zero, -1, q).astype(a.dtype)


@op("div")
def div(k, ins):
    return k.elementwise(ins, np.divide if is_float(ins.type) else _int_div, ins.type)


@op("rem")
def rem(k, ins):
    return k.elementwise(ins, lambda a, b: np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b))), ins.type)


def _min_max(name, fn_num, fn_nan):
    @op(name)
    def build(k, ins):
        t = ins.type
        fn = fn_nan if ins.has("NaN") or not is_float(t) else fn_num
        if ins.has("xorsign"):
            raise UnsupportedOpcode("xorsign")
        if len(ins.args) == 4:  # three-input form
            return k.elementwise(ins, lambda a, b, c: fn(fn(a, b), c), t)
        if ins.has("relu") and not is_float(t):
            return k.elementwise(ins, lambda a, b: np.maximum(fn(a, b), 0), t)
        return k.elementwise(ins, _finish(ins, fn), t)


_min_max("min", np.fmin, np.minimum)
_min_max("max", np.fmax, np.maximum)
_simple("abs", np.abs)
_simple("neg", np.negative)
_simple("copysign", lambda a, b: np.copysign(b, a))
_simple("sqrt", np.sqrt)
_simple("rcp", lambda a: (1 / a).astype(a.dtype))
_simple("rsqrt", lambda a: (1 / np.sqrt(a)).astype(a.dtype))
_simple("ex2", np.exp2)
_simple("lg2", np.log2)
_simple("sin", np.sin)
_simple("cos", np.cos)
_simple("tanh", np.tanh)


# ---- logic and bit fields -------------------------------------------------------------------
def _logic(name, bit_fn, bool_fn):
    @op(name)
    def build(k, ins):
        if ins.type == "pred":
            put, get = k.writer(ins.args[0], "pred"), [k.pred(x) for x in ins.args[1:]]
            return lambda m: put(bool_fn(*[g() for g in get]), m)
        return k.elementwise(ins, bit_fn, ins.type)


_logic("and", np.bitwise_and, np.logical_and)
_logic("or", np.bitwise_or, np.logical_or)
_logic("xor", np.bitwise_xor, np.logical_xor)
_logic("not", np.invert, np.logical_not)
_simple("cnot", lambda a: (a == 0).astype(a.dtype))


@op("shl", "shr")
def shift(k, ins):
    t = ins.type
    bits, dt = 8 * TYPE_BYTES[t], DTYPE[t]
    fn = np.left_shift if ins.op == "shl" else np.right_shift
    n = k.src(ins.args[2], "u32")
    a = k.src(ins.args[1], t)
    d, put = k.dst(ins.args[0], t), k.writer(ins.args[0], t)
    if np.ndim(n) == 0 and int(n) < bits and d is not None:
        s = dt.type(int(n))
        return lambda m: fn(a, s, out=d, where=m)
    if ins.op == "shr" and dt.kind == "i":
        return lambda m: put(fn(a, np.minimum(n, bits - 1).astype(dt)), m)
    return lambda m: put(np.where(n < bits, fn(a, np.minimum(n, bits - 1).astype(dt)), dt.type(0)), m)


@op("shf")
def shf(k, ins):
    """Funnel shift of the 64-bit value {b, a}."""
    left, wrap = ins.has("l"), ins.has("wrap")

    def fn(a, b, c):
        n = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        v = b.astype(np.uint64) << np.uint64(32) | a
        return (v << n >> np.uint64(32) if left else v >> n).astype(np.uint32)

    return k.elementwise(ins, fn, "b32")


@op("bfe")
def bfe(k, ins):
    t = ins.type
    bits, dt = 8 * TYPE_BYTES[t], DTYPE[t]

    def fn(a, b, c):
        pos, n = (np.minimum(x & np.uint32(255), np.uint32(bits)).astype(np.int64) for x in (b, c))
        n = np.minimum(n, bits)
        if dt.kind == "u":
            v = np.where(pos < bits, a >> np.minimum(pos, bits - 1).astype(dt), dt.type(0))
            ones = np.where(
                n < bits, (dt.type(1) << np.minimum(n, bits - 1).astype(dt)) - dt.type(1), ~dt.type(0)
            )
            return np.where(n > 0, v & ones, dt.type(0))
        top = np.minimum(pos + n, bits)  # sign bit at top-1, fill above the register
        v = a << np.clip(bits - top, 0, bits - 1).astype(dt)
        v = v >> np.clip(bits - (top - np.minimum(pos, bits - 1)), 0, bits - 1).astype(dt)
        return np.where(n > 0, np.where(pos < bits, v, a >> dt.type(bits - 1)), dt.type(0))

    return k.elementwise(ins, fn, t, src_types=[t, "u32", "u32"])


@op("bfi")
def bfi(k, ins):
    t = f"u{ins.type[1:]}"
    bits, dt = 8 * TYPE_BYTES[t], DTYPE[t]

    def fn(a, b, c, n):
        pos, n = c & np.uint32(255), n & np.uint32(255)
        one = dt.type(1)
        ones = np.where(n < bits, (one << np.minimum(n, bits - 1).astype(dt)) - one, ~dt.type(0))
        sh = np.minimum(pos, bits - 1).astype(dt)
        mask = np.where(pos < bits, ones << sh, dt.type(0))
        return (a << sh & mask) | (b & ~mask)

    return k.elementwise(ins, fn, t, src_types=[t, t, "u32", "u32"])


@op("prmt")
def prmt(k, ins):
    mode = ins.mods[1] if len(ins.mods) > 1 else None
    if mode:
        raise UnsupportedOpcode(f"prmt mode {mode}")

    def fn(a, b, c):
        v, out = b.astype(np.uint64) << np.uint64(32) | a, np.uint64(0)
        for i in range(4):
            sel = (c >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
            byte = v >> (sel & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            byte = np.where(
                sel & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte
            )
            out = out | byte << np.uint64(8 * i)
        return out.astype(np.uint32)

    return k.elementwise(ins, fn, "b32")


@op("lop3")
def lop3(k, ins):
    lut = ins.args[4].value

    def fn(a, b, c):
        out = np.zeros_like(a)
        for i in range(8):
            if lut >> i & 1:
                out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return out

    return k.elementwise(ins, fn, "b32", srcs=ins.args[1:4])


def _bitreverse(a):
    bits = 8 * a.dtype.itemsize
    b = np.unpackbits(
        np.ascontiguousarray(a).view(np.uint8).reshape(-1, bits // 8), axis=1, bitorder="little"
    )
    return np.packbits(b[:, ::-1], axis=1, bitorder="little").view(a.dtype).ravel()


def _msb(a):
    """Index of the highest set bit, -1 for zero."""
    a = np.atleast_1d(a).astype(np.uint64)
    out = np.full(a.shape, -1, np.int64)
    for s in (32, 16, 8, 4, 2, 1):
        big = a >> np.uint64(s) != 0
        a, out = np.where(big, a >> np.uint64(s), a), out + s * big
    return np.where(a != 0, out + 1, -1)


def _unsigned_unary(name, fn, result=None):
    @op(name)
    def build(k, ins):
        t = f"u{ins.type[1:]}"
        out = result or t
        put, a = k.writer(ins.args[0], out), k.src(ins.args[1], t)
        return lambda m: put(fn(np.atleast_1d(a)), m)


_unsigned_unary("popc", np.bitwise_count, "u32")
_unsigned_unary("brev", _bitreverse)
_unsigned_unary("clz", lambda a: 8 * a.dtype.itemsize - 1 - _msb(a), "u32")


@op("bfind")
def bfind(k, ins):
    t, put = ins.type, k.writer(ins.args[0], "u32")
    bits, a = 8 * TYPE_BYTES[t], k.src(ins.args[1], ins.type)

    def run(m):
        v = np.where(a < 0, ~a, a) if t[0] == "s" else a
        r = _msb(v)
        put(
            (np.where(r >= 0, bits - 1 - r, -1) if ins.has("shiftamt") else r)
            .astype(np.int32)
            .view(np.uint32),
            m,
        )

    return run


@op("bmsk")
def bmsk(k, ins):
    def fn(a, b):
        a, b = (np.minimum(x, np.uint32(63)).astype(np.uint64) for x in (a, b))
        return (((np.uint64(1) << b) - np.uint64(1)) << a).astype(np.uint32)

    return k.elementwise(ins, fn, "u32")


@op("dp4a")
def dp4a(k, ins):
    ta, tb = (("i1" if m[0] == "s" else "u1") for m in ins.mods[-2:])

    def fn(a, b, c):
        x, y = (np.atleast_1d(v).view(t).reshape(-1, 4).astype(np.int32) for v, t in ((a, ta), (b, tb)))
        return (x * y).sum(1).astype(np.uint32) + c

    return k.elementwise(ins, fn, "u32")


# ---- compare and select -----------------------------------------------------------------------
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_BOOL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name, t):
    if not is_float(t):
        return _COMPARE[name]
    nan = lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "num":
        return lambda a, b: ~nan(a, b)
    if name == "nan":
        return nan
    if name == "ne":
        return lambda a, b: (a != b) & ~nan(a, b)
    if name == "neu":
        return np.not_equal
    if name.endswith("u") and name[:-1] in _COMPARE:
        fn = _COMPARE[name[:-1]]
        return lambda a, b: fn(a, b) | nan(a, b)
    return _COMPARE[name]


@op("setp")
def setp(k, ins):
    """setp.cmp{.bool}.type p{|q}, a, b{, {!}c}."""
    cmp_name, t = ins.mods[0], ins.type
    fn = _comparison(cmp_name, t)
    if t[0] == "b" and not t.startswith("bf"):
        t = "u" + t[1:]
    d = ins.args[0]
    p, q = (d.a, d.b) if isinstance(d, Pair) else (d, None)
    a, b = (k.reader(x, t) for x in ins.args[1:3])
    if (
        q is None
        and len(ins.args) == 3
        and t not in HALF_TYPES
        and isinstance(fn, np.ufunc)
        and isinstance(p, Reg)
    ):
        x, y, out = k.src(ins.args[1], t), k.src(ins.args[2], t), k.raw(p)
        return lambda m: fn(x, y, out=out, where=m)
    combine = _BOOL[ins.mods[1]] if len(ins.args) == 4 else None
    c = k.pred(ins.args[3]) if combine else None
    put_p = k.writer(p, "pred")
    put_q = k.writer(q, "pred") if q is not None else None
    packed = t in ("f16x2", "bf16x2")

    def run(m):
        r = fn(a(), b())
        if packed:  # p from the low half, q from the high half
            put_p(r[:, 0], m)
            put_q(r[:, 1], m)
            return
        cc = c() if combine else None
        not_r = ~r if put_q else None
        put_p(combine(r, cc) if combine else r, m)
        if put_q:
            put_q(combine(not_r, cc) if combine else not_r, m)

    return run


@op("set")
def set_(k, ins):
    """set.cmp.dtype.stype d, a, b: 1.0 / all ones, or zero."""
    types = [m for m in ins.mods if m in TYPE_BYTES]
    dt, st = types[0], types[-1]
    fn = _comparison(ins.mods[0], st)
    put, a, b = k.writer(ins.args[0], dt), k.reader(ins.args[1], st), k.reader(ins.args[2], st)
    if is_float(dt):
        return lambda m: put(fn(a(), b()).astype(np.float32), m)
    one = DTYPE[dt].type(-1 if dt[0] == "s" else 2 ** (8 * TYPE_BYTES[dt]) - 1)
    if st in ("f16x2", "bf16x2"):
        return lambda m: put((fn(a(), b()).astype(np.uint16) * np.uint16(0xFFFF)).view(np.uint32).ravel(), m)
    return lambda m: put(np.where(fn(a(), b()), one, DTYPE[dt].type(0)), m)


@op("selp")
def selp(k, ins):
    t = {2: "b16", 4: "b32", 8: "b64"}[TYPE_BYTES[ins.type]] if not is_float(ins.type) else ins.type
    t = {"f16": "b16", "bf16": "b16"}.get(t, t)
    a, b = k.src(ins.args[1], t), k.src(ins.args[2], t)
    p, put = k.pred(ins.args[3]), k.writer(ins.args[0], t)
    return lambda m: put(np.where(p(), a, b), m)


@op("slct")
def slct(k, ins):
    types = [m for m in ins.mods if m in TYPE_BYTES]
    return k.elementwise(
        ins, lambda a, b, c: np.where(c >= 0, a, b), types[0], src_types=[types[0], types[0], types[1]]
    )


@op("testp")
def testp(k, ins):
    kind, t = ins.mods[0], ins.type
    tiny = np.finfo(DTYPE[t]).tiny
    fn = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }[kind]
    put, a = k.writer(ins.args[0], "pred"), k.src(ins.args[1], t)
    return lambda m: put(fn(a), m)


# ---- moves ------------------------------------------------------------------------------------
@op("mov")
def mov(k, ins):
    t, (d, s) = ins.type, ins.args
    if isinstance(d, Vec):  # unpack
        wide = k.src(s, f"b{8 * TYPE_BYTES[t]}") if not isinstance(s, Vec) else None
        n = TYPE_BYTES[t] // len(d.items)
        part = f"b{8 * n}"
        puts = [k.writer(x, part) for x in d.items]

        def unpack(m):
            parts = np.broadcast_to(wide, k.T).copy().view(DTYPE[part]).reshape(k.T, -1)
            for i, put in enumerate(puts):
                put(parts[:, i], m)

        return unpack
    if isinstance(s, Vec):  # pack
        part = f"b{8 * TYPE_BYTES[t] // len(s.items)}"
        parts = [k.src(x, part) for x in s.items]
        put, dt = k.writer(d, f"b{8 * TYPE_BYTES[t]}"), DTYPE[f"b{8 * TYPE_BYTES[t]}"]

        def pack(m):
            v = np.empty((k.T, len(parts)), DTYPE[part])
            for i, p in enumerate(parts):
                v[:, i] = p
            put(v.view(dt).ravel(), m)

        return pack
    if t == "pred":
        put, p = k.writer(d, "pred"), k.pred(s)
        return lambda m: put(p(), m)
    if isinstance(s, Special) and s.name in ("clock", "clock64", "clock_hi", "globaltimer"):
        put = k.writer(d, t)
        return lambda m: put(int(k.issued.sum()) if s.name != "clock_hi" else 0, m)
    if t in ("f16", "bf16", "f16x2", "bf16x2") or not is_float(t):
        t = f"b{8 * TYPE_BYTES[t]}"
    a, out = k.src(s, t), k.dst(d, t)
    if out is not None:
        return lambda m: np.copyto(out, a, where=m)
    put = k.writer(d, t)
    return lambda m: put(a, m)
