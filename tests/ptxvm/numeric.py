"""Number formats: PTX type -> NumPy dtype, and bfloat16 / half / tf32 / fp8 conversions."""

import numpy as np

DTYPE = {
    name: np.dtype(d)
    for name, d in {
        "pred": "?",
        "b8": "u1",
        "u8": "u1",
        "s8": "i1",
        "b16": "u2",
        "u16": "u2",
        "s16": "i2",
        "f16": "f2",
        "bf16": "u2",
        "b32": "u4",
        "u32": "u4",
        "s32": "i4",
        "f32": "f4",
        "f16x2": "u4",
        "bf16x2": "u4",
        "tf32": "u4",
        "b64": "u8",
        "u64": "u8",
        "s64": "i8",
        "f64": "f8",
        "f32x2": "u8",
    }.items()
}
HALF_TYPES = ("f16", "bf16", "f16x2", "bf16x2")
UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}


def is_float(t):
    return t[0] == "f" or t.startswith(("bf", "tf"))


def bf16_decode(raw):
    """uint16 bit patterns -> float32."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def bf16_encode(x, mode="rn"):
    """float -> uint16 bfloat16 bit patterns, rounding to nearest even (or rz)."""
    x = np.asarray(x)
    bits = x.astype(np.float32).view(np.uint32)
    if mode == "rz":
        return (bits >> 16).astype(np.uint16)
    out = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = np.isnan(x)
    return np.where(nan, np.uint16(0x7FFF), out) if nan.any() else out


def f16_encode(x, mode="rn"):
    """float -> uint16 half bit patterns."""
    x = np.asarray(x)
    h = x.astype(np.float16)
    if mode == "rz":  # step back where rounding went away from zero
        away = np.abs(h.astype(np.float64)) > np.abs(x.astype(np.float64))
        h = np.where(away, (h.view(np.uint16) - 1).astype(np.uint16).view(np.float16), h)
    return h.view(np.uint16)


def directed_f32(x64, mode):
    """float64 -> float32 rounding towards zero (rz), minus (rm) or plus (rp) infinity."""
    y = x64.astype(np.float32)
    y64 = y.astype(np.float64)
    if mode == "rz":
        return np.where(np.abs(y64) > np.abs(x64), np.nextafter(y, np.float32(0)), y)
    if mode == "rm":
        return np.where(y64 > x64, np.nextafter(y, np.float32(-np.inf)), y)
    return np.where(y64 < x64, np.nextafter(y, np.float32(np.inf)), y)


def tf32_decode(raw):
    """b32 patterns as the tensor core sees them: the low 13 mantissa bits are dropped."""
    return (raw & np.uint32(0xFFFFE000)).view(np.float32)


def tf32_round(x):
    """cvt.rna.tf32.f32: round to nearest, ties away, keep 10 mantissa bits."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def tensor_core_sum(terms):
    """float32 sums of float64 `terms` along the last axis, as an H100 adds them: each is cut off
    two bits past the last bit of the largest, and what they come to is cut off to float32."""

    def cut_off(numbers, largest, bits):
        unit = np.ldexp(1.0, np.frexp(largest)[1] - bits)
        return np.trunc(numbers / unit) * unit

    with np.errstate(invalid="ignore"):  # inf - inf
        total = cut_off(terms, np.abs(terms).max(-1, keepdims=True), 26).sum(-1)
        total = np.where(np.isfinite(total), cut_off(total, total, 24), terms.sum(-1))
    return total.astype(np.float32)


def _fp8_table(exp_bits, man_bits, has_inf):
    bias, out = (1 << (exp_bits - 1)) - 1, np.empty(256, np.float32)
    for b in range(256):
        s, e, m = b >> 7, (b >> man_bits) & ((1 << exp_bits) - 1), b & ((1 << man_bits) - 1)
        v = m * 2.0 ** (1 - bias - man_bits) if e == 0 else (1 + m / (1 << man_bits)) * 2.0 ** (e - bias)
        if has_inf and e == (1 << exp_bits) - 1:
            v = np.inf if m == 0 else np.nan
        if not has_inf and (b & 0x7F) == 0x7F:
            v = np.nan
        out[b] = -v if s else v
    return out


FP8 = {"e4m3": _fp8_table(4, 3, False), "e5m2": _fp8_table(5, 2, True)}


def fp8_encode(x, fmt):
    """float -> fp8 byte, round to nearest even, saturating to the largest finite value."""
    table = FP8[fmt][:128]
    finite = table[np.isfinite(table)]
    mag = np.minimum(np.abs(x.astype(np.float64)), finite[-1])
    hi = np.clip(np.searchsorted(finite, mag), 0, len(finite) - 1)
    lo = np.maximum(hi - 1, 0)
    dhi, dlo = finite[hi] - mag, mag - finite[lo]
    code = np.where((dlo < dhi) | ((dlo == dhi) & (lo % 2 == 0)), lo, hi)
    code = np.where(np.isnan(x), 0x7F, code)
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)
