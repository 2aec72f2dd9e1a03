"""cvt, cvta and address-space queries."""

import numpy as np

from ..errors import UnsupportedOpcode
from ..machine import op
from ..memory import SLOT_BITS, WINDOW
from ..numeric import DTYPE, FP8, bf16_encode, directed_f32, f16_encode, fp8_encode, is_float, tf32_round
from ..parse import TYPE_BYTES

_ROUND_INT = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_int(x, dtype):
    """Float -> integer, saturating, NaN -> 0."""
    info = np.iinfo(dtype)
    v = np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    out = np.clip(v, info.min, float(info.max)).astype(np.float64)
    high = v >= float(info.max)
    return np.where(high, info.max, np.where(high, 0, out).astype(dtype)).astype(dtype)


@op("cvt")
def cvt(k, ins):
    fp8 = [m for m in ins.mods if m in ("e4m3x2", "e5m2x2")]
    types = [m for m in ins.mods if m in TYPE_BYTES]
    if fp8:
        return _cvt_fp8(k, ins, fp8[0][:4], types)
    dt, st = (types[0], types[-1])
    rnd = next((m for m in ins.mods if m in ("rn", "rz", "rm", "rp", "rna", *_ROUND_INT)), None)
    sat, relu = ins.has("sat"), ins.has("relu")
    if dt in ("f16x2", "bf16x2") and st == "f32":  # d = {a (high), b (low)}
        encode = f16_encode if dt == "f16x2" else bf16_encode
        a, b, put = k.src(ins.args[1], "f32"), k.src(ins.args[2], "f32"), k.writer(ins.args[0], "b32")
        mode = "rz" if rnd == "rz" else "rn"

        def pack(m):
            v = np.empty((k.T, 2), np.float32)
            v[:, 0], v[:, 1] = b, a
            if relu:
                v = np.maximum(v, 0)
            put(encode(v, mode).view(np.uint32).ravel(), m)

        return pack
    if dt == "tf32":
        a, put = k.src(ins.args[1], "f32"), k.writer(ins.args[0], "b32")
        if rnd == "rna":
            return lambda m: put(tf32_round(np.atleast_1d(a)).view(np.uint32), m)
        return lambda m: put(
            (
                (
                    np.atleast_1d(a).view(np.uint32)
                    + np.uint32(0xFFF)
                    + (np.atleast_1d(a).view(np.uint32) >> np.uint32(13) & np.uint32(1))
                )
                & np.uint32(0xFFFFE000)
            ),
            m,
        )
    get, put = k.reader(ins.args[1], st), k.writer(ins.args[0], dt)
    to_float, from_float = is_float(dt), is_float(st)
    if from_float and to_float:
        if rnd in _ROUND_INT:
            fn = _ROUND_INT[rnd]
        elif dt in ("f16", "bf16") and rnd in ("rz",):
            raw = k.writer(ins.args[0], "b16")
            encode = f16_encode if dt == "f16" else bf16_encode
            return lambda m: raw(encode(get(), "rz"), m)
        elif dt == "f32" and st == "f64":
            fn = (lambda x: x.astype(np.float32)) if rnd in ("rn", None) else (lambda x: directed_f32(x, rnd))
        else:
            fn = lambda x: x
        if sat:
            inner, fn = fn, lambda x: np.clip(np.nan_to_num(inner(x), nan=0.0), 0, 1)
        if relu:
            before, fn = fn, lambda x: np.maximum(before(x), 0)
        return lambda m: put(fn(np.asarray(get())), m)
    if from_float:
        rounding, dtype = _ROUND_INT[rnd], DTYPE[dt]
        return lambda m: put(_to_int(rounding(np.asarray(get())), dtype), m)
    if to_float:
        if dt == "f64":
            return lambda m: put(np.asarray(get()).astype(np.float64), m)
        if dt == "f32" and rnd in ("rz", "rm", "rp"):

            def directed(x):  # exact via longdouble for 64-bit sources
                wide, y = x.astype(np.longdouble), x.astype(np.float32)
                up, down = y.astype(np.longdouble) > wide, y.astype(np.longdouble) < wide
                lower = np.where(up, np.nextafter(y, np.float32(-np.inf)), y)
                upper = np.where(down, np.nextafter(y, np.float32(np.inf)), y)
                return {"rm": lower, "rp": upper, "rz": np.where(x < 0, upper, lower)}[rnd]

            return lambda m: put(directed(np.asarray(get())), m)
        return lambda m: put(np.asarray(get()).astype(np.float32 if dt == "f32" else np.float64), m)
    if sat:
        info = np.iinfo(DTYPE[dt])
        if st[0] == "u":
            return lambda m: put(np.minimum(get(), min(info.max, np.iinfo(DTYPE[st]).max)), m)
        low, high = max(info.min, np.iinfo(DTYPE[st]).min), min(info.max, np.iinfo(DTYPE[st]).max)
        return lambda m: put(np.clip(get(), low, high), m)
    dtype = DTYPE[dt]
    return lambda m: put(np.asarray(get()).astype(dtype), m)


def _cvt_fp8(k, ins, fmt, types):
    if types[0] == "f16x2":  # fp8x2 -> f16x2
        a, put = k.src(ins.args[1], "b16"), k.writer(ins.args[0], "f16x2")
        return lambda m: put(FP8[fmt][np.atleast_1d(a).view(np.uint8)].reshape(-1, 2), m)
    put = k.writer(ins.args[0], "b16")
    if types[-1] == "f32":
        a, b = k.src(ins.args[1], "f32"), k.src(ins.args[2], "f32")
        return lambda m: put(
            fp8_encode(np.stack(np.broadcast_arrays(b, a, np.zeros(k.T)), 1)[:, :2], fmt)
            .copy()
            .view(np.uint16)
            .ravel(),
            m,
        )
    get = k.reader(ins.args[1], "f16x2")
    return lambda m: put(fp8_encode(get(), fmt).view(np.uint16).ravel(), m)


@op("cvta")
def cvta(k, ins):
    """Add the window base of the space, or subtract it for cvta.to."""
    space = next(m.split("::")[0] for m in ins.mods if m.split("::")[0] in WINDOW)
    base = np.uint64(WINDOW[space])
    t = ins.type
    a, put = k.src(ins.args[1], "u64"), k.writer(ins.args[0], "u64")
    if t[1:] == "32":
        raise UnsupportedOpcode("32-bit generic addresses")
    return (lambda m: put(a - base, m)) if ins.has("to") else (lambda m: put(a + base, m))


@op("isspacep")
def isspacep(k, ins):
    space = ins.mods[0].split("::")[0]
    a, put = k.src(ins.args[1], "u64"), k.writer(ins.args[0], "pred")
    slot = WINDOW[space] >> SLOT_BITS
    if space == "global":
        return lambda m: put(a >> np.uint64(SLOT_BITS) >= 16, m)
    return lambda m: put(a >> np.uint64(SLOT_BITS) == slot, m)


@op("mapa", "getctarank")
def mapa(k, ins):
    """Clusters of one CTA: every shared address is its own."""
    t = ins.type
    put = k.writer(ins.args[0], t)
    if ins.op == "getctarank":
        return lambda m: put(0, m)
    a = k.src(ins.args[1], t)
    return lambda m: put(a, m)
