"""Loads, stores and atomics."""

import numpy as np

from ..errors import UnsupportedOpcode
from ..machine import op
from ..memory import PARAM, SLOT_BITS
from ..numeric import DTYPE, bf16_decode, bf16_encode
from ..parse import Sym, Vec

_SPACES = ("global", "shared", "local", "param", "const")


def space_of(ins):
    """State space of a memory instruction, 'generic' if none is given."""
    return next((m.split("::")[0] for m in ins.mods if m.split("::")[0] in _SPACES), "generic")


def _is_strong(ins):
    """Volatile / relaxed / acquire / release accesses may race by design."""
    return ins.has("volatile", "relaxed", "acquire", "release", "mmio")


@op("ld", "ldu")
def ld(k, ins):
    t, space = ins.type, space_of(ins)
    dst, addr = ins.args[0], k.address(ins.args[1], space)
    items = dst.items if isinstance(dst, Vec) else (dst,)
    puts = [k.writer(d, t) if t not in ("f16", "bf16") else k.writer(d, "b16") for d in items]
    dtype = DTYPE[t] if t not in ("f16", "bf16") else DTYPE["b16"]
    vec = len(items)
    base = ins.args[1].base
    if isinstance(base, Sym) and k.symbol(base)[1] >> SLOT_BITS == PARAM:  # kernel parameter: a constant
        a = addr()[:1]
        buf, off = k.locate(a, vec * dtype.itemsize, np.zeros(1, int), ins)
        row = buf.rows(dtype, vec)[off[0] // (vec * dtype.itemsize)].copy()

        def constant(m):
            for put, v in zip(puts, row, strict=False):
                put(v, m)

        return constant
    strong = _is_strong(ins)
    outs = [k.dst(d, t) for d in items]
    direct = all(o is not None for o in outs)

    def run(m):
        lanes = k.active(m)
        a = addr()
        rows = k.read(a if m is True else a[lanes], dtype, vec, lanes, ins, strong)
        if direct:
            sel = slice(None) if m is True else lanes
            for j, o in enumerate(outs):
                o[sel] = rows[:, j].view(o.dtype)
        else:
            for j, put in enumerate(puts):
                full = np.zeros(k.T, dtype)
                full[lanes] = rows[:, j]
                put(full, m)

    return run


@op("st")
def st(k, ins):
    t, space = ins.type, space_of(ins)
    addr, src = k.address(ins.args[0], space), ins.args[1]
    items = src.items if isinstance(src, Vec) else (src,)
    t = {"f16": "b16", "bf16": "b16"}.get(t, t)
    vals, strong, dtype = [k.src(s, t) for s in items], _is_strong(ins), DTYPE[t]

    def run(m):
        lanes = k.active(m)
        a = addr()
        rows = np.empty((len(lanes), len(vals)), dtype)
        for j, v in enumerate(vals):
            rows[:, j] = v if m is True or np.ndim(v) == 0 else v[lanes]
        k.write(a if m is True else a[lanes], rows, lanes, ins, strong)

    return run


# ---- atomics ----------------------------------------------------------------------------------
def _float_op(name, decode, encode):
    fn = {"add": np.add, "min": np.fmin, "max": np.fmax}[name]
    return lambda old, b, c: encode(fn(decode(old), decode(b)))


def _atomic_function(ins, t):
    """new = f(old, b, c) on raw (n, vec) values of type t."""
    name = next(
        m for m in ins.mods if m in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    )
    if name == "exch":
        return lambda old, b, c: b
    if name == "cas":
        return lambda old, b, c: np.where(old == b, c, old)
    if t in ("bf16", "bf16x2"):
        view = lambda x: bf16_decode(np.ascontiguousarray(x).view(np.uint16))
        return _float_op(name, view, lambda y: bf16_encode(y).view(DTYPE[t]))
    if t in ("f16", "f16x2"):
        view = lambda x: np.ascontiguousarray(x).view(np.float16).astype(np.float32)
        return _float_op(
            name, view, lambda y: y.astype(np.float16).view(DTYPE["b16" if t == "f16" else "b32"])
        )
    if t[0] == "f":
        return _float_op(name, lambda x: x, lambda x: x)
    if name == "inc":
        return lambda old, b, c: np.where(old >= b, 0, old + 1).astype(old.dtype)
    if name == "dec":
        return lambda old, b, c: np.where((old == 0) | (old > b), b, old - 1).astype(old.dtype)
    fn = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]
    return lambda old, b, c: fn(old, b)


@op("atom", "red")
def atom(k, ins):
    """Atomics; lanes hitting the same address take turns in thread order."""
    if ins.has("async"):
        raise UnsupportedOpcode("red.async")
    t, space = ins.type, space_of(ins)
    args = list(ins.args)
    dst = args.pop(0) if ins.op == "atom" else None
    addr = k.address(args[0], space)
    items = lambda x: x.items if isinstance(x, Vec) else (x,)
    raw = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}.get(t, t)
    dtype = DTYPE[raw]
    b = [k.src(x, raw) for x in items(args[1])]
    c = [k.src(args[2], raw)] if ins.has("cas") else b
    puts = [k.writer(d, raw) for d in items(dst)] if dst is not None else []
    fn, vec = _atomic_function(ins, t), len(b)

    def column(values, lanes):
        out = np.empty((len(lanes), vec), dtype)
        for j, v in enumerate(values):
            out[:, j] = v if np.ndim(v) == 0 else v[lanes]
        return out

    def run(m):
        lanes = k.active(m)
        a = addr()[lanes]
        bb, cc, old = column(b, lanes), column(c, lanes), np.empty((len(lanes), vec), dtype)
        order = np.argsort(a, kind="stable")
        first = np.r_[True, np.diff(a[order]) != 0]
        start = np.maximum.accumulate(np.where(first, np.arange(len(a)), 0))
        turn = np.empty(len(a), int)
        turn[order] = np.arange(len(a)) - start  # how many earlier lanes share the address
        for r in range(int(turn.max()) + 1):
            i = np.flatnonzero(turn == r)
            old[i] = k.read(a[i], dtype, vec, lanes[i], ins, atomic=True, count=False)
            k.write(a[i], fn(old[i], bb[i], cc[i]), lanes[i], ins, atomic=True, count=False)
        for j, put in enumerate(puts):
            full = np.zeros(k.T, dtype)
            full[lanes] = old[:, j]
            put(full, m)

    return run
