"""cp.async, mbarrier and bulk (TMA) copies.

cp.async data lands in shared memory only at the wait that covers it; until then its bytes count as
uninitialised. Bulk copies complete at once, but only a wait on their mbarrier orders them.
"""

import numpy as np

from .. import tensormap
from ..errors import MemoryFault, PtxError, UnsupportedOpcode
from ..machine import control, op
from ..memory import WINDOW
from ..parse import Addr, Reg

U4 = np.dtype("u4")


class AsyncCopies:
    """Outstanding cp.async batches with the per-thread group numbering."""

    def __init__(self, k):
        self.k = k
        self.begin_cta()

    def begin_cta(self):
        self.group = np.zeros(self.k.T, np.int64)  # number of the group still open, per thread
        self.batches = []  # (lanes, shared addresses, rows, groups, ins)

    drain = begin_cta

    def complete(self, m, limit):
        """Land the copies of threads `m` whose group number is below `limit[thread]`."""
        k, keep = self.k, []
        for lanes, addr, rows, group, ins in self.batches:
            done = group < limit[lanes]
            if m is not True:
                done &= m[lanes]
            if done.any():
                k.write(addr[done], rows[done], lanes[done], ins)
            if not done.all():
                keep.append((lanes[~done], addr[~done], rows[~done], group[~done], ins))
        self.batches = keep


def _copies(k):
    if k.async_copies is None:
        k.async_copies = AsyncCopies(k)
    return k.async_copies


@op("cp")
def cp(k, ins):
    if ins.has("bulk"):
        return _bulk(k, ins)
    if ins.mods[0] != "async":
        raise UnsupportedOpcode(ins.opcode)
    q = _copies(k)
    if ins.has("commit_group"):

        def commit(m):
            q.group[slice(None) if m is True else m] += 1

        return commit
    if ins.has("wait_group"):
        n = ins.args[0].value
        return lambda m: q.complete(m, q.group - n)
    if ins.has("wait_all"):
        return lambda m: q.complete(m, q.group + 1)
    if ins.has("mbarrier"):
        addr = k.address(ins.args[0], "shared" if any("shared" in m for m in ins.mods) else "generic")

        def arrive(m):
            lanes = k.active(m)
            q.complete(m, q.group + 1)
            if ins.has("noinc"):
                _arrive(k, ins, addr()[lanes], lanes, np.ones(len(lanes), int))

        return arrive
    return _cp_async(k, ins, q)


def _cp_async(k, ins, q):
    size = ins.args[2].value
    extra = ins.args[3:-1] if any("cache_hint" in m for m in ins.mods) else ins.args[3:]
    dst, src = k.address(ins.args[0], "shared"), k.address(ins.args[1], "global")
    src_size = ignore = None
    if extra and isinstance(extra[0], Reg) and extra[0].type == "pred":
        ignore = k.src(extra[0], "pred")
    elif extra:
        src_size = k.src(extra[0], "u32")

    def run(m):
        lanes = k.active(m)
        da, sa = dst()[lanes], src()[lanes]
        n = np.full(len(lanes), size)
        if src_size is not None:
            n[:] = src_size if np.ndim(src_size) == 0 else src_size[lanes]
        if ignore is not None:
            n[ignore[lanes]] = 0
        rows = np.zeros((len(lanes), size // 4), U4)
        full = n == size
        if full.any():
            rows[full] = k.read(sa[full], U4, size // 4, lanes[full], ins)
        for i in np.flatnonzero((n > 0) & ~full):  # zero-filled tails
            part = k.read(sa[i] + np.arange(n[i]), np.dtype("u1"), 1, np.repeat(lanes[i], n[i]), ins)
            rows[i].view(np.uint8)[: n[i]] = part[:, 0]
        buf, off = k.locate(da, size, lanes, ins, store=True)
        fail = lambda err, bad, o, msg: k.fail(ins, lanes, err, da, "shared", bad, msg)
        buf.check_write(off, size, k.warp_of[lanes], fail)
        buf.mark_pending(off, size)
        q.batches.append((lanes, da, rows, q.group[lanes], ins))

    return run


# ---- mbarrier -----------------------------------------------------------------------------------
class Mbarrier:
    """State of one mbarrier object; kept beside shared memory, keyed by address."""

    def __init__(self, k, count):
        self.expected = self.pending = count
        self.tx = self.phase = 0
        self.clock = np.zeros_like(k.shared.seen[0])  # what waiters of this phase learn
        self.ready_clock = self.clock.copy()
        self.waiting = np.zeros(k.T, bool)

    def advance(self, k):
        """Complete the phase when nothing is outstanding, waking the waiters."""
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.expected
            self.ready_clock = self.clock.copy()
            k.blocked &= ~self.waiting
            self.waiting[:] = False
            k.state_changed = True


def _mbarrier(k, ins, addr, thread):
    mb = k.mbarriers.get(int(addr))
    if mb is None:
        k.fail(
            ins,
            np.array([thread]),
            MemoryFault,
            np.array([addr]),
            "shared",
            np.ones(1, bool),
            "not an initialised mbarrier",
        )
    return mb


def _arrive(k, ins, addr, lanes, counts, tx=None):
    """Arrivals of `lanes`; returns the phase each of them arrived in."""
    state = np.zeros(len(lanes), np.uint64)
    for a in np.unique(addr):
        sel = addr == a
        mb = _mbarrier(k, ins, a, lanes[sel][0])
        for w in np.unique(k.warp_of[lanes[sel]]):
            k.shared.release(w, mb.clock)
        state[sel] = mb.phase
        if tx is not None:
            mb.tx += int(tx[sel].sum())
        n = int(counts[sel].sum())
        while n > 0:
            take = min(n, mb.pending)
            if take == 0:
                raise PtxError(
                    f"{k.where(ins, int(lanes[sel][0]))}: more mbarrier arrivals than its count "
                    f"{mb.expected} while bytes are outstanding"
                )
            mb.pending -= take
            n -= take
            mb.advance(k)
    return state


def _complete_tx(k, ins, addr, thread, nbytes):
    mb = _mbarrier(k, ins, addr, thread)
    k.shared.release(k.shared.tma_agent, mb.clock)
    mb.tx -= nbytes
    mb.advance(k)


@op("mbarrier")
def mbarrier(k, ins):
    kind = ins.mods[0]
    is_shared = any(m.startswith("shared") for m in ins.mods)
    if kind == "pending_count":
        raise UnsupportedOpcode(ins.opcode)
    returns = kind in ("arrive", "arrive_drop") and not isinstance(ins.args[0], Addr)
    dst = ins.args[0] if returns else None
    args = ins.args[1:] if returns else ins.args
    addr = k.address(args[0], "shared" if is_shared else "generic")
    put = k.writer(dst, "b64") if dst is not None else None
    value = k.src(args[1], "u32") if len(args) > 1 else np.uint32(1)
    per_lane = lambda lanes: np.broadcast_to(value, k.T)[lanes].astype(np.int64)

    def run(m):
        lanes = k.active(m)
        a = addr()[lanes]
        if kind in ("init", "inval"):
            for x, n in zip(a, per_lane(lanes), strict=False):
                k.locate(np.array([x]), 8, lanes[:1], ins)
                if kind == "init":
                    k.mbarriers[int(x)] = Mbarrier(k, int(n))
                else:
                    k.mbarriers.pop(int(x), None)
        elif kind in ("expect_tx", "complete_tx"):
            for x, n, t in zip(a, per_lane(lanes), lanes, strict=False):
                mb = _mbarrier(k, ins, x, t)
                mb.tx += int(n) if kind == "expect_tx" else -int(n)
                mb.advance(k)
        else:
            if kind == "arrive_drop":
                for x, t in zip(a, lanes, strict=False):
                    _mbarrier(k, ins, x, t).expected -= 1
            one = np.ones(len(lanes), np.int64)
            tx = per_lane(lanes) if ins.has("expect_tx") else None
            state = _arrive(k, ins, a, lanes, one if tx is not None else per_lane(lanes), tx)
            if put:
                full = np.zeros(k.T, np.uint64)
                full[lanes] = state
                put(full, m)

    return run


@control("mbarrier.try_wait", "mbarrier.test_wait")
def mbarrier_wait(k, ins, pc):
    """p = phase completed? try_wait blocks the thread until it is; test_wait never blocks."""
    p_out, addr_arg, token = ins.args[:3]
    addr = k.address(addr_arg, "shared" if any(m.startswith("shared") for m in ins.mods) else "generic")
    parity, blocking = ins.has("parity"), ins.has("try_wait")
    tok = k.src(token, "u32" if parity else "u64")
    put = k.writer(p_out, "pred")

    def ctl(p, m):
        lanes = k.active(m)
        a, t = addr()[lanes], np.broadcast_to(tok, k.T)[lanes].astype(np.int64)
        done = np.zeros(k.T, bool)
        for x in np.unique(a):
            sel = a == x
            mb = _mbarrier(k, ins, x, lanes[sel][0])
            ok = ((mb.phase & 1) != (t[sel] & 1)) if parity else (mb.phase > t[sel])
            who = lanes[sel]
            done[who[ok]] = True
            for w in np.unique(k.warp_of[who[ok]]):
                k.shared.acquire(w, mb.ready_clock)
            stuck = who[~ok]
            if blocking and len(stuck):
                k.blocked[stuck] = True
                k.pc[stuck] = p
                mb.waiting[stuck] = True
                for w in np.unique(k.warp_of[stuck]):
                    k.reason[w] = (
                        f"waiting for mbarrier at shared {int(x) - WINDOW['shared']:#x} (phase {mb.phase}, "
                        f"pending {mb.pending}, tx {mb.tx})"
                    )
        if not blocking:
            put(done, m)
            return p + 1
        if done.any():
            put(np.True_, done)
        if np.count_nonzero(done) == len(lanes):
            return p + 1
        k.pc[done] = p + 1
        return None

    return ctl


# ---- bulk copies (TMA) --------------------------------------------------------------------------
def _swizzle(addr, mode):
    return addr ^ ((addr >> 7 & {"none": 0, "32B": 1, "64B": 3, "128B": 7}[mode]) << 4)


def _tensor_map(k, ins, addr, thread):
    buf, off = k.locate(np.array([addr]), 64, np.array([thread]), ins)
    tm = tensormap.decode(buf.data[off[0] : off[0] + 128])
    if tm is None:
        raise PtxError(f"{k.where(ins, thread)}: the operand is not a tensor map")
    return tm


@op("tensormap")
def tensormap_op(k, ins):
    """tensormap.replace.tile.field [map], {index,} value, and cp_fenceproxy [global], [shared], 128."""
    who = lambda t: np.full(16, t)
    if ins.mods[0] == "cp_fenceproxy":
        dst, src = k.address(ins.args[0], "global"), k.address(ins.args[1], "shared")

        def copy(m):
            for w in k.warps(m, ins):
                t = 32 * w
                rows = k.read(src()[t] + 8 * np.arange(16), np.dtype("u8"), 1, who(t), ins, count=False)
                k.write(dst()[t] + 8 * np.arange(16), rows, who(t), ins, count=False)

        return copy
    field = next((m for m in ins.mods if m in tensormap.FIELDS), None)
    if ins.mods[0] != "replace" or field is None:
        raise UnsupportedOpcode(ins.opcode)
    addr = k.address(ins.args[0], "shared" if any(m.startswith("shared") for m in ins.mods) else "generic")
    index = ins.args[1].value if len(ins.args) == 3 else 0
    value = k.src(ins.args[-1], "u64" if ins.has("b64") else "u32")

    def run(m):
        for t in k.active(m):
            at = addr()[t] + 8 * np.arange(16)
            block = k.read(at, np.dtype("u8"), 1, who(t), ins, count=False)
            tensormap.put(
                block.reshape(-1).view(np.uint8), field, value if np.ndim(value) == 0 else value[t], index
            )
            tensormap.put(block.reshape(-1).view(np.uint8), "magic", tensormap.MAGIC)
            k.write(at, block, who(t), ins, count=False)

    return run


def _bulk(k, ins):
    agent = k.shared.tma_agent
    lane0 = lambda a, t: a if np.ndim(a) == 0 else a[t]
    if ins.has("commit_group", "wait_group"):
        if ins.has("wait_group"):
            return lambda m: k.shared.finish(agent, np.unique(k.warp_of[k.active(m)]))
        return lambda m: None
    if ins.op != "cp" or ins.mods[0] != "async" or ins.has("reduce", "im2col"):
        raise UnsupportedOpcode(ins.opcode)
    to_shared = (
        ins.mods[next(i for i, m in enumerate(ins.mods) if m.startswith(("shared", "global")))] != "global"
    )

    def smem_bytes(addr, nbytes, thread, mode, data=None):
        """Move 16-byte pieces through the (swizzled) shared addresses as the TMA agent."""
        a = _swizzle(int(addr) + 16 * np.arange(nbytes // 16), mode)
        who = np.full(len(a), thread)
        k.shared.join(agent, k.warp_of[thread])
        if data is None:
            return k.read(a, U4, 4, who, ins, count=False, agent=agent)
        k.write(
            a,
            np.ascontiguousarray(data).view(np.uint8).reshape(-1).view(U4).reshape(-1, 4),
            who,
            ins,
            count=False,
            agent=agent,
        )

    def global_rows(addr, nbytes, thread):
        return addr + 16 * np.arange(nbytes // 16), np.full(nbytes // 16, thread)

    if ins.has("tensor"):
        map_arg, other = (ins.args[1], ins.args[0]) if to_shared else (ins.args[0], ins.args[1])
        tmap_addr = k.address(map_arg, "generic")
        coords = [k.src(c, "s32") for c in map_arg.extra[0].items]
        smem = k.address(other, "shared")
        mbar = k.address(ins.args[2], "shared") if to_shared else None

        def run(m):
            for t in k.active(m):
                tm = _tensor_map(k, ins, tmap_addr()[t], t)
                at = [int(lane0(c, t)) for c in coords]
                nbytes = tm.box_bytes
                if int(smem()[t]) % 128:
                    raise MemoryFault(f"{k.where(ins, t)}: TMA shared address is not 128-byte aligned")
                addr, inside = tm.addresses(at)
                who, dtype = np.full(len(addr), t), np.dtype(f"u{tm.elem}")
                if to_shared:
                    data = np.zeros(len(addr), dtype)
                    if inside.any():
                        data[inside] = k.read(addr[inside], dtype, 1, who[inside], ins, count=False)[:, 0]
                    smem_bytes(smem()[t], nbytes, t, tm.swizzle, data)
                    _complete_tx(k, ins, mbar()[t], t, nbytes)
                    k.counters.global_load_bytes += nbytes
                    k.counters.global_load_sectors += -(-nbytes // 32)
                else:
                    data = smem_bytes(smem()[t], nbytes, t, tm.swizzle).reshape(-1).view(dtype)
                    if inside.any():
                        k.write(addr[inside], data[inside, None], who[inside], ins, count=False)
                    k.counters.global_store_bytes += nbytes
                    k.counters.global_store_sectors += -(-nbytes // 32)

        return run
    dst, src = (k.address(ins.args[i], "shared" if (i == 0) == to_shared else "global") for i in (0, 1))
    size = k.src(ins.args[2], "u32")
    mbar = k.address(ins.args[3], "shared") if to_shared else None

    def run(m):
        for t in k.active(m):
            n = int(lane0(size, t))
            if n % 16:
                raise MemoryFault(f"{k.where(ins, t)}: bulk copy of {n} bytes (must be a multiple of 16)")
            a, who = global_rows((src if to_shared else dst)()[t], n, t)
            if to_shared:
                smem_bytes(dst()[t], n, t, "none", k.read(a, U4, 4, who, ins))
                _complete_tx(k, ins, mbar()[t], t, n)
            else:
                k.write(a, smem_bytes(src()[t], n, t, "none"), who, ins)

    return run
