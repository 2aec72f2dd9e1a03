"""Address space and memories.

A 64-bit generic address is `slot << 36 | offset`. Slots 1-4 are the shared, local, param and const
windows; every global allocation has its own slot, starting in the middle of it, so that running
off either end of a tensor never lands in another one.
"""

import numpy as np

from .errors import RaceError, UninitializedRead

SLOT_BITS = 36
SHARED, LOCAL, PARAM, CONST, FIRST_GLOBAL = 1, 2, 3, 4, 16
WINDOW = {
    "shared": SHARED << SLOT_BITS,
    "local": LOCAL << SLOT_BITS,
    "param": PARAM << SLOT_BITS,
    "const": CONST << SLOT_BITS,
    "global": 0,
}
SHARED_START = 1024  # offset of the first usable shared byte (the hardware reserves 1 KB too)


class Buffer:
    """A named span of bytes at a base address."""

    def __init__(self, name, data, base, writable=True):
        self.name, self.data, self.base, self.nbytes, self.writable = name, data, base, data.size, writable
        self._rows = {}

    def rows(self, dtype, vec):
        """The bytes as an array of `vec`-element rows."""
        key = (dtype, vec)
        if key not in self._rows:
            size = dtype.itemsize * vec
            self._rows[key] = self.data[: self.nbytes // size * size].view(dtype).reshape(-1, vec)
        return self._rows[key]


class GlobalMemory:
    """All global allocations of a launch."""

    def __init__(self):
        self.buffers = {}

    def add(self, name, data, writable=True):
        """Register a uint8 array; returns its buffer."""
        slot = FIRST_GLOBAL + len(self.buffers)
        buf = Buffer(name, data, (slot << SLOT_BITS) + (1 << SLOT_BITS - 1) + 512, writable)
        self.buffers[slot] = buf
        return buf

    def describe(self, addr):
        """'<n> bytes past the end of x' for an error message."""
        buf = self.buffers.get(addr >> SLOT_BITS)
        if buf is None:
            return f"no allocation near it (allocations: {[b.name for b in self.buffers.values()]})"
        off = addr - buf.base
        where = (
            f"{-off} bytes before"
            if off < 0
            else f"{off - buf.nbytes} bytes past the end of"
            if off >= buf.nbytes
            else f"at byte {off} of"
        )
        return f"{where} {buf.name} ({buf.nbytes} bytes at {buf.base:#x})"


class SharedMemory(Buffer):
    """Shared memory of one CTA with shadow state for the uninitialised-read and race checks.

    Accesses are made by agents: the warps, then one agent per warpgroup (wgmma reads) and one for TMA.
    Every byte remembers a stamp of its last write, clock*128 + atomic*64 + agent, and, per agent, the
    clock of that agent's last read. `seen[a, b]` is the clock of agent b up to which agent a is ordered
    after b (a vector clock, advanced by barriers, mbarriers and the wgmma / bulk-copy waits). An access
    races when it meets a stamp of another agent that is newer than that.
    """

    PENDING = np.int32(2**31 - 1)

    def __init__(self, nbytes, warps, checks):
        pad = -nbytes % 16
        super().__init__("shared", np.zeros(SHARED_START + nbytes + pad, np.uint8), 0)
        self.limit, self.warps, self.checks = SHARED_START + nbytes, warps, checks
        self.tma_agent = warps + -(-warps // 4)
        agents = self.tma_agent + 1
        self.clock = 1
        self.track = checks.uninitialized or checks.races or checks.proxy_fences
        if self.track:
            self.stamp = np.zeros(self.nbytes, np.int32)
            self.reads = np.zeros((agents, self.nbytes), np.int32) if checks.races else None
        self.seen = np.zeros((agents, agents), np.int32)
        self.used = np.zeros(agents, bool)
        self.fenced, self.issuers = np.zeros_like(self.seen), {}
        self.begin_cta()

    def begin_cta(self):
        """Forget contents: everything before now is 'uninitialised'."""
        self.clock += 1
        self.cta_stamp = self.clock << 7
        self.seen[:] = self.clock - 1
        self.fenced[:] = self.clock - 1
        self.used[:] = np.arange(len(self.used)) < self.warps
        self.floor = self.cta_stamp - 1
        self.names = {}
        if self.checks.uninitialized:
            self.data[:] = 0xCD

    # ---- ordering events
    def order(self, warps):
        """A barrier among `warps` (indices or slice(None)): all of them see each other's past."""
        if isinstance(warps, slice):
            warps = slice(self.warps)
        joined = self.seen[warps].max(axis=0)
        joined[warps] = self.clock
        self.seen[warps] = joined
        self._tick()

    def release(self, warp, clock_vector):
        """Publish everything `warp` has done or seen into `clock_vector`."""
        np.maximum(clock_vector, self.seen[warp], out=clock_vector)
        clock_vector[warp] = self.clock
        self._tick()

    def acquire(self, warp, clock_vector):
        np.maximum(self.seen[warp], clock_vector, out=self.seen[warp])
        self._tick()

    def join(self, agent, warps):
        """`agent` starts work issued by `warps`: it is ordered after everything they have done or seen."""
        self.used[agent] = True
        self.issuers[agent] = np.atleast_1d(warps)
        for w in np.atleast_1d(warps):
            np.maximum(self.seen[agent], self.seen[w], out=self.seen[agent])
            self.seen[agent, w] = self.clock
        self._tick()

    def finish(self, agent, warps):
        """`warps` have waited for the work of `agent`."""
        self.seen[warps, agent] = self.clock
        self._tick()

    def proxy_fence(self, warps):
        """fence.proxy.async: what these warps have written or seen becomes visible to the async proxy."""
        for w in warps:
            np.maximum(self.fenced[w], self.seen[w], out=self.fenced[w])
            self.fenced[w, w] = self.clock
        self._tick()

    def _tick(self):
        """Advance time; `floor` bounds the stamps that cannot race with anybody."""
        self.clock += 1
        low = self.seen[np.ix_(self.used, self.used)]
        np.fill_diagonal(low, 2**24 - 2)
        self.floor = (int(low.min()) + 1 << 7) - 1

    def agent(self, a):
        return (
            f"warp {a}"
            if a < self.warps
            else "TMA"
            if a == self.tma_agent
            else f"wgmma of warpgroup {a - self.warps}"
        )

    # ---- checks; off: byte offsets, size: bytes each, warp: warp index of each access
    def _shadow(self, array, size):
        return array.reshape(*array.shape[:-1], -1, size)

    def _unordered(self, stamps, warp, atomic):
        other, clock = stamps & 63, stamps >> 7
        bad = (other != warp[:, None]) & (clock > self.seen[warp[:, None], other])
        return bad & ((stamps & 64) == 0) if atomic else bad

    def check_read(self, off, size, warp, fail, atomic=False):
        if not self.track:
            return
        rows, at = self._shadow(self.stamp, size), off // size
        stamps = rows[at]
        if self.checks.uninitialized and stamps.min() < self.cta_stamp:
            fail(
                UninitializedRead,
                (stamps < self.cta_stamp).any(1),
                off,
                "read of shared memory never written",
            )
        if stamps.max() > self.floor:
            if (stamps == self.PENDING).any():
                fail(
                    UninitializedRead,
                    (stamps == self.PENDING).any(1),
                    off,
                    "read of shared memory with a cp.async still in flight",
                )
            if self.checks.races:
                bad = self._unordered(stamps, warp, atomic)
                if bad.any():
                    i = np.argwhere(bad)[0]
                    fail(
                        RaceError,
                        bad.any(1),
                        off,
                        f"read races with a write by {self.agent(stamps[tuple(i)] & 63)}",
                    )
        if self.checks.races and not atomic:
            self._shadow(self.reads, size)[warp, at] = self.clock
        agent = int(warp[0])
        if self.checks.proxy_fences and agent >= self.warps:
            writer, clock = stamps & 63, stamps >> 7
            fenced = np.maximum(self.fenced[self.issuers[agent]].max(axis=0), self.fenced.diagonal())
            bad = (writer < self.warps) & (stamps >= self.cta_stamp) & (clock > fenced[writer])
            if bad.any():
                fail(
                    RaceError,
                    bad.any(1),
                    off,
                    f"{self.agent(agent)} reads ordinary writes without fence.proxy.async",
                )

    def check_write(self, off, size, warp, fail, atomic=False, same=None):
        """Before a write; `same` marks accesses that do not change the bytes (benign among writers)."""
        if not self.checks.races:
            return
        at = off // size
        stamps = self._shadow(self.stamp, size)[at]
        if stamps.max() > self.floor and (stamps != self.PENDING).all():
            bad = self._unordered(stamps, warp, atomic).any(1)
            if same is not None:
                bad &= ~same
            if bad.any():
                i = np.flatnonzero(bad)[0]
                fail(RaceError, bad, off, f"write races with a write by {self.agent(stamps[i].max() & 63)}")
        reads = self._shadow(self.reads, size)[:, at].max(axis=2)  # (warps, n)
        if (int(reads.max()) << 7) > self.floor:
            bad = reads > self.seen[warp].T
            bad[warp, np.arange(len(off))] = False
            if bad.any():
                v, _ = np.argwhere(bad)[0]
                fail(RaceError, bad.any(0), off, f"write races with a read by {self.agent(v)}")

    def mark_written(self, off, size, warp, atomic=False):
        if self.track:
            stamp = (self.clock << 7 | (64 if atomic else 0)) | warp
            self._shadow(self.stamp, size)[off // size] = stamp[:, None]

    def mark_pending(self, off, size):
        if self.track:
            self._shadow(self.stamp, size)[off // size] = self.PENDING
