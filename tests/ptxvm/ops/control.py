"""Branches, exits, CTA barriers and the no-op instructions."""

import numpy as np

from ..errors import DeviceTrap, UnsupportedOpcode
from ..machine import control, op


@control("bra")
def bra(k, ins, pc):
    target = k.labels[ins.uses_target[0]]
    return lambda p, m: target


@control("brx")
def brx(k, ins, pc):
    targets = np.array([k.labels[t] for t in ins.uses_target])
    index = k.src(ins.args[0], "u32")

    def ctl(p, m):
        sel = slice(None) if m is True else m
        k.pc[sel] = targets[np.broadcast_to(index, k.T)[sel]]

    return ctl


@control("ret", "exit")
def ret(k, ins, pc):
    return lambda p, m: k.exit_threads(m)


@op("trap")
def trap(k, ins):
    def run(m):
        raise DeviceTrap(f"trap: {k.where(ins, int(k.active(m)[0]))}")

    return run


@op("extern_call")
def extern_call(k, ins):
    """vprintf does nothing; __assertfail raises; anything else is unknown."""
    name = ins.args[0].name
    if name == "__assertfail":

        def run(m):
            raise DeviceTrap(f"device assert failed: {k.where(ins, int(k.active(m)[0]))}")

        return run
    if name == "vprintf":
        return lambda m: None
    raise UnsupportedOpcode(f"call of external function {name}")


@op("fence")
def fence(k, ins):
    """Only fence.proxy.async matters here: it lets wgmma and TMA see ordinary shared-memory writes."""
    if ins.has("proxy") and any(m.startswith("async") for m in ins.mods):
        return lambda m: k.shared.proxy_fence(np.unique(k.warp_of[k.active(m)]))
    return lambda m: None


@op(
    "membar",
    "nanosleep",
    "prefetch",
    "prefetchu",
    "griddepcontrol",
    "setmaxnreg",
    "pmevent",
    "discard",
    "applypriority",
    "bar",
    "barrier",
)
def nothing(k, ins):
    """Ordering hints and 1-CTA cluster barriers; bar.warp.sync waits in the scheduler."""
    return lambda m: None


@op("createpolicy")
def createpolicy(k, ins):
    put = k.writer(ins.args[0], "b64")
    return lambda m: put(np.uint64(0), m)


class Barrier:
    """One named barrier with the threads waiting at it."""

    def __init__(self, k, ident):
        self.k, self.ident, self.count, self.passed = k, ident, None, 0
        self.arrived = np.zeros(k.T, bool)  # threads blocked here
        self.passing = np.zeros(k.W, bool)  # warps that arrived without waiting
        self.on_release = None

    def try_release(self):
        k = self.k
        if not self.arrived.any():
            return False
        alive = k.alive.reshape(-1, 32)
        full = self.arrived.reshape(-1, 32).any(1) & ~(alive & ~self.arrived.reshape(-1, 32)).any(1)
        if self.count is None:
            done = not (k.alive & ~self.arrived).any()
        else:
            done = 32 * np.count_nonzero(full) + self.passed >= self.count
        if not done:
            return False
        k.shared.order(np.flatnonzero(full | self.passing))
        k.blocked[self.arrived] = False
        k.pc[self.arrived] += 1
        if self.on_release:
            self.on_release(self.arrived)
        del k.barriers[self.ident]
        k.counters.barriers += 1
        k.state_changed = True
        return True


@control(
    "bar.sync",
    "bar.arrive",
    "bar.red",
    "barrier.sync",
    "barrier.arrive",
    "barrier.red",
    "bar.cta",
    "barrier.cta",
)
def barrier(k, ins, pc):
    """bar.sync id{, threads}; bar.arrive id, threads; bar.red.op d, id{, threads}, p."""
    reduce = ins.has("red")
    args = ins.args[1:-1] if reduce else ins.args
    ids = k.src(args[0], "u32")
    counts = k.src(args[1], "u32") if len(args) > 1 else None
    arrive_only = ins.has("arrive")
    if reduce:
        value = k.pred(ins.args[-1])
        put = k.writer(ins.args[0], "pred" if ins.has("pred") else "u32")
        combine = np.count_nonzero if ins.has("popc") else np.all if ins.has("and") else np.any

        def finish(threads):
            put(combine(np.broadcast_to(value(), k.T)[threads]), threads)

    def arrive(ident, count, m, p):
        b = k.barriers.setdefault(ident, Barrier(k, ident))
        b.count = count
        if arrive_only:
            warps = np.unique(k.warp_of[m])
            b.passed += 32 * len(warps)
            b.passing[warps] = True
        else:
            k.pc[m] = p
            k.blocked[m] = True
            b.arrived |= m
            if reduce:
                b.on_release = finish
            for w in np.unique(k.warp_of[m]):
                k.reason[w] = f"waiting at barrier {ident}" + (f" for {count} threads" if count else "")
        b.try_release()

    def ctl(p, m):
        if counts is None and not reduce and not k.barriers and (m is True or (m == k.alive).all()):
            k.shared.order(slice(None))  # everybody is here
            k.counters.barriers += 1
            return p + 1
        mask = np.ones(k.T, bool) if m is True else m
        if np.ndim(ids) == 0 and np.ndim(counts if counts is not None else 0) == 0:
            arrive(int(ids), None if counts is None else int(counts), mask, p)
        else:
            i = np.broadcast_to(ids, k.T)
            for ident in np.unique(i[mask]):
                sub = mask & (i == ident)
                c = None if counts is None else int(np.broadcast_to(counts, k.T)[sub][0])
                arrive(int(ident), c, sub, p)
        return p + 1 if arrive_only else None

    return ctl
