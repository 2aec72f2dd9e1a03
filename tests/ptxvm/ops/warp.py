"""Warp-level communication: shfl, vote, match, redux, elect, activemask."""

import numpy as np

from ..machine import op
from ..numeric import DTYPE
from ..parse import Pair, Reg


def _mask(k, m):
    return np.ones(k.T, bool) if m is True else m


def _ballot(bits):
    """(W, 32) bools -> per-thread uint32 lane masks."""
    words = bits.astype(np.uint32) @ (np.uint32(1) << np.arange(32, dtype=np.uint32))
    return np.repeat(words.astype(np.uint32), 32)


@op("shfl")
def shfl(k, ins):
    """shfl.sync.mode.b32 d|p, a, b, c, membermask."""
    mode = next(m for m in ins.mods if m in ("up", "down", "bfly", "idx"))
    d, p = (ins.args[0].a, ins.args[0].b) if isinstance(ins.args[0], Pair) else (ins.args[0], None)
    a, b, c = (k.src(x, "u32") for x in ins.args[1:4])
    put = k.writer(d, "b32")
    put_p = k.writer(p, "pred") if p is not None else None
    lane, base = k.lane.astype(np.int64), k.warp_of * 32

    def source():
        bb, cc = np.asarray(b).astype(np.int64) & 31, np.asarray(c).astype(np.int64)
        clamp, seg = cc & 31, (cc >> 8) & 31
        low, high = lane & seg, (lane & seg) | (clamp & ~seg)
        j = {
            "up": lambda: lane - bb,
            "down": lambda: lane + bb,
            "bfly": lambda: lane ^ bb,
            "idx": lambda: low | (bb & ~seg),
        }[mode]()
        ok = j >= high if mode == "up" else j <= high
        return base + np.where(ok, j, lane), ok

    fixed = source() if np.ndim(b) == 0 and np.ndim(c) == 0 else None

    def run(m):
        at, ok = fixed or source()
        put(np.broadcast_to(a, k.T)[at], m)
        if put_p:
            put_p(ok, m)

    return run


@op("vote")
def vote(k, ins):
    mode = next(m for m in ins.mods if m in ("all", "any", "uni", "ballot"))
    p = k.pred(ins.args[1])
    put = k.writer(ins.args[0], "u32" if mode == "ballot" else "pred")

    def run(m):
        on = _mask(k, m).reshape(-1, 32)
        v = np.broadcast_to(p(), k.T).reshape(-1, 32)
        if mode == "ballot":
            return put(_ballot(v & on), m)
        r = {
            "all": lambda: (v | ~on).all(1),
            "any": lambda: (v & on).any(1),
            "uni": lambda: (v | ~on).all(1) | ~(v & on).any(1),
        }[mode]()
        put(np.repeat(r, 32), m)

    return run


@op("activemask")
def activemask(k, ins):
    put = k.writer(ins.args[0], "u32")
    return lambda m: put(_ballot(_mask(k, m).reshape(-1, 32)), m)


@op("match")
def match(k, ins):
    t = ins.type
    d, p = (ins.args[0].a, ins.args[0].b) if isinstance(ins.args[0], Pair) else (ins.args[0], None)
    a, put = k.src(ins.args[1], t), k.writer(d, "u32")
    put_p = k.writer(p, "pred") if p is not None else None

    def run(m):
        on = _mask(k, m).reshape(-1, 32)
        v = np.broadcast_to(a, k.T).reshape(-1, 32)
        same = (v[:, :, None] == v[:, None, :]) & on[:, None, :]
        words = (same.astype(np.uint64) @ (np.uint64(1) << np.arange(32, dtype=np.uint64))).astype(np.uint32)
        if ins.has("any"):
            return put(words.ravel(), m)
        everyone = _ballot(on)
        equal = words.ravel() == everyone
        put(np.where(equal, everyone, np.uint32(0)), m)
        if put_p:
            put_p(equal, m)

    return run


@op("redux")
def redux(k, ins):
    t = ins.type
    name = next(m for m in ins.mods if m in ("add", "min", "max", "and", "or", "xor"))
    fn = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]
    if t == "f32":
        fn = {"min": np.fmin, "max": np.fmax}[name]
    a, put = k.src(ins.args[1], t), k.writer(ins.args[0], t)
    neutral = {"add": 0, "or": 0, "xor": 0, "and": -1}.get(name)
    if neutral is None:
        info = np.finfo(np.float32) if t == "f32" else np.iinfo(DTYPE[t])
        neutral = info.max if name == "min" else info.min
    neutral = np.array(neutral).astype(DTYPE[t])

    def run(m):
        v = np.where(_mask(k, m), a, neutral).reshape(-1, 32)
        put(np.repeat(fn.reduce(v, axis=1, dtype=v.dtype), 32), m)

    return run


@op("elect")
def elect(k, ins):
    """elect.sync d|p, membermask: the lowest active lane wins."""
    d, p = ins.args[0].a, ins.args[0].b
    put = k.writer(d, "u32") if isinstance(d, Reg) else None
    put_p = k.writer(p, "pred")

    def run(m):
        leader = np.repeat(_mask(k, m).reshape(-1, 32).argmax(1), 32)
        if put:
            put(leader.astype(np.uint32), m)
        put_p(k.lane == leader, m)

    return run
