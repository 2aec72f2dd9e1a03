"""The machine: registers as NumPy arrays over the threads of a CTA, decoding, and scheduling.

A kernel is decoded once per launch: every instruction becomes a closure `run(m)` bound to the
register arrays it reads and writes; `m` is the execution mask, either True (all threads) or a
boolean array. Control instructions become closures `ctl(p, m)` that return the next pc when all
threads of `m` go there, or None after updating the per-thread `pc` / `blocked` arrays.

Scheduling is min-PC: among the threads that are not blocked, the group with the smallest pc runs
to the end of its basic block, all its warps together. Warp-synchronous instructions wait until all
the lanes they name have arrived. To keep spinning threads from starving the others, the group that
waited longest is run instead once it has waited `STARVED` steps.
"""

import numpy as np

from .errors import DeadlockError, MemoryFault, PtxError, RaceError, UnsupportedOpcode
from .memory import CONST, LOCAL, PARAM, SHARED, SHARED_START, SLOT_BITS, WINDOW, Buffer, SharedMemory
from .numeric import DTYPE, UNSIGNED, bf16_decode, bf16_encode, f16_encode
from .parse import TYPE_BYTES, Addr, Imm, Instr, Label, Not, Reg, Special, Sym

OPS = {}  # opcode -> builder(machine, ins) -> run(m)
CONTROL = {}  # opcode or opcode.mod -> builder(machine, ins, pc) -> ctl(p, m)
WARP_SYNC = {
    "shfl": -1,
    "vote": -1,
    "match": -1,
    "redux": -1,
    "elect": -1,  # last operand: member mask
    "mma": None,
    "ldmatrix": None,
    "stmatrix": None,
    "movmatrix": None,
    "wgmma": None,
}
EXITED = np.int64(1 << 40)
FAIR_PERIOD, STARVED = 64, 1024  # check every .. steps for groups that have not run for .. steps


def op(*names):
    """Register the builder of an opcode."""

    def add(f):
        OPS.update(dict.fromkeys(names, f))
        return f

    return add


def control(*names):
    """Register the builder of a control opcode."""

    def add(f):
        CONTROL.update(dict.fromkeys(names, f))
        return f

    return add


class Flow:
    """A kernel's instructions, what builds each one's closure, and where its basic blocks end."""

    def __init__(self, body):
        self.code = [i for i in body if isinstance(i, Instr)]
        self.labels, n, targets = {}, 0, set()
        for item in body:
            if isinstance(item, Label):
                self.labels[item.name] = n
            else:
                targets.update(item.uses_target)
                n += 1
        self.builders, self.is_control = [], []
        for ins in self.code:
            control = (
                CONTROL.get(ins.opcode)
                or CONTROL.get(f"{ins.op}.{ins.mods[0]}" if ins.mods else ins.op)
                or CONTROL.get(ins.op)
            )
            build = control or OPS.get(ins.op)
            if build is None:
                raise UnsupportedOpcode(f"PTX line {ins.line}: `{ins.text}`: unknown opcode '{ins.opcode}'")
            self.builders.append(build)
            self.is_control.append(control is not None)
        heads = {self.labels[t] for t in targets}
        self.block_end, self.next_sync, self.next_group = [n] * (n + 1), [n] * (n + 1), [n] * (n + 1)
        end = sync = group = n
        for pc in range(n - 1, -1, -1):
            if self.is_control[pc] or pc + 1 in heads:
                end = pc + 1
            if self.code[pc].op in WARP_SYNC or self.code[pc].opcode.startswith("bar.warp"):
                sync = pc
            if self.code[pc].opcode.startswith("wgmma.mma_async"):
                group = pc
            self.block_end[pc], self.next_sync[pc], self.next_group[pc] = end, sync, group


class Machine:
    """One launch: decoded code plus the state of the CTA being run."""

    def __init__(
        self, kernel, grid, block, params, global_memory, symbols, const, shared_bytes, checks, counters
    ):
        self.kernel, self.grid, self.block = kernel, grid, block
        self.checks, self.counters = checks, counters
        self.threads = block[0] * block[1] * block[2]
        self.W = -(-self.threads // 32)
        self.T = self.W * 32
        self.lane = np.arange(self.T) % 32
        self.warp_of = np.arange(self.T) // 32
        self.global_memory = global_memory
        self.symbols = dict(symbols)  # name -> (space, generic address)
        self.params = Buffer("kernel parameters", params, WINDOW["param"])
        self.const = const
        self.layout_variables(shared_bytes)
        self.regs, self.specials = {}, {}
        self.make_specials()
        self.cc = np.zeros(self.T, bool)  # carry flag
        self.async_copies = None  # set by ops.async_copy
        with np.errstate(all="ignore"):
            self.decode(kernel)

    # ---- layout ---------------------------------------------------------------------------
    def layout_variables(self, shared_bytes):
        """Place shared / local / param variables of the kernel; dynamic shared memory comes last."""
        shared, local, self.param_vars = SHARED_START, 0, {}
        offset = 0
        for p in self.kernel.params:
            offset += -offset % p.align
            self.symbols[p.name] = ("param", WINDOW["param"] + offset)
            offset += max(p.size, TYPE_BYTES[p.type])
        dynamic = []
        for v in [*self.kernel.module_shared, *self.kernel.vars.values()]:
            size = v.size
            if v.name in self.symbols and v.space == "param":
                continue
            if v.space == "shared":
                if v.extern or size == 0:
                    dynamic.append(v)
                    continue
                shared += -shared % v.align
                self.symbols[v.name] = ("shared", WINDOW["shared"] + shared)
                shared += size
            elif v.space in ("local", "param"):  # call parameters live in per-thread memory
                local += -local % v.align
                self.symbols[v.name] = ("local", WINDOW["local"] + local)
                local += size
        for v in dynamic:
            shared += -shared % max(16, v.align)
            self.symbols[v.name] = ("shared", WINDOW["shared"] + shared)
        self.dynamic_shared, self.static_shared = shared_bytes, shared - SHARED_START
        self.local_size = local + (-local % 16)
        self.local = Buffer("local", np.zeros(max(16, self.local_size * self.T), np.uint8), WINDOW["local"])
        self.shared = SharedMemory(shared - SHARED_START + shared_bytes, self.W, self.checks)

    def make_specials(self):
        tid = np.arange(self.T)
        bx, by, _ = self.block
        full = lambda v: np.full(self.T, v, np.uint32)
        s = self.specials
        s["tid.x"], s["tid.y"], s["tid.z"] = (
            (tid % bx).astype("u4"),
            (tid // bx % by).astype("u4"),
            (tid // (bx * by)).astype("u4"),
        )
        for i, c in enumerate("xyz"):
            s[f"ntid.{c}"], s[f"nctaid.{c}"], s[f"ctaid.{c}"] = (
                full(self.block[i]),
                full(self.grid[i]),
                full(0),
            )
            for name, v in (
                ("clusterid", None),
                ("nclusterid", None),
                ("cluster_ctaid", 0),
                ("cluster_nctaid", 1),
            ):
                if v is not None:
                    s[f"{name}.{c}"] = full(v)
            s[f"clusterid.{c}"], s[f"nclusterid.{c}"] = s[f"ctaid.{c}"], s[f"nctaid.{c}"]
        s["cluster_ctarank"], s["cluster_nctarank"] = full(0), full(1)
        s["laneid"], s["warpid"], s["nwarpid"] = (
            self.lane.astype("u4"),
            self.warp_of.astype("u4"),
            full(self.W),
        )
        s["smid"], s["nsmid"], s["gridid"] = full(0), full(1), full(1)
        one = np.uint32(1)
        s["lanemask_eq"] = one << s["laneid"]
        s["lanemask_lt"] = s["lanemask_eq"] - one
        s["lanemask_le"] = s["lanemask_lt"] | s["lanemask_eq"]
        s["lanemask_gt"], s["lanemask_ge"] = ~s["lanemask_le"], ~s["lanemask_lt"]
        s["dynamic_smem_size"], s["total_smem_size"] = full(self.dynamic_shared), full(self.shared.nbytes)
        for name in ("clock", "clock_hi"):
            s[name] = full(0)
        for name in ("clock64", "globaltimer"):
            s[name] = np.zeros(self.T, np.uint64)

    # ---- operand binding --------------------------------------------------------------------
    def raw(self, reg):
        """The unsigned array behind a register."""
        a = self.regs.get(reg.name)
        if a is None:
            n = TYPE_BYTES[reg.type]
            a = np.zeros(self.T, np.bool_ if reg.type == "pred" else UNSIGNED[n])
            self.regs[reg.name] = a
        return a

    def src(self, x, t):
        """A view of operand `x` as PTX type `t` (an array over threads, or a scalar)."""
        dtype = DTYPE[t]
        if isinstance(x, (Reg, Special)):
            if isinstance(x, Special) and x.name not in self.specials:
                raise UnsupportedOpcode(f"special register %{x.name}")
            a = self.raw(x) if isinstance(x, Reg) else self.specials[x.name]
            if a.dtype == bool or dtype.itemsize == a.itemsize:
                return a if dtype is bool else a.view(dtype)
            if dtype.itemsize < a.itemsize:
                return a.view(dtype)[:: a.itemsize // dtype.itemsize]
            if isinstance(x, Special):
                return a.astype(dtype)
            raise UnsupportedOpcode(f"register {x.name} ({x.type}) read as {t}")
        if isinstance(x, Imm):
            v = x.value
            if dtype is bool:
                return np.bool_(v != 0)
            if x.bits:
                f = np.array(v, UNSIGNED[x.bits // 8])
                if dtype.kind == "f":
                    return f.view(f"f{x.bits // 8}").astype(dtype)[()]
                return f.astype(UNSIGNED[dtype.itemsize]).view(dtype)[()]
            if dtype.kind == "f":
                if t == "f16" and isinstance(v, int):
                    return np.uint16(v & 0xFFFF).view(np.float16)
                return dtype.type(v)
            mask = (1 << 8 * dtype.itemsize) - 1
            return np.array(int(v) & mask, UNSIGNED[dtype.itemsize]).view(dtype)[()]
        if isinstance(x, Sym):
            space, addr = self.symbol(x)
            return np.array(
                (addr - WINDOW[space]) & ((1 << 8 * dtype.itemsize) - 1), UNSIGNED[dtype.itemsize]
            ).view(dtype)[()]
        if isinstance(x, Not):
            raise UnsupportedOpcode("negated operand in this position")
        raise UnsupportedOpcode(f"operand {x}")

    def pred(self, x):
        """Thunk for a predicate source, possibly negated."""
        if isinstance(x, Not):
            a = self.src(x.arg, "pred")
            return lambda: ~a
        a = self.src(x, "pred")
        return lambda: a

    def symbol(self, x):
        if x.name not in self.symbols:
            raise UnsupportedOpcode(f"unknown symbol {x.name}")
        space, addr = self.symbols[x.name]
        return space, addr + x.offset

    def reader(self, x, t):
        """Thunk giving `x` in its computing form: half types as float32, packed ones as (T, 2)."""
        if t in ("f16x2", "bf16x2"):
            a = self.src(x, "b32")
            a = np.atleast_1d(a).view(np.uint16).reshape(-1, 2)
            return (
                (lambda: bf16_decode(a)) if t == "bf16x2" else (lambda: a.view(np.float16).astype(np.float32))
            )
        if t == "f32x2":
            a = np.atleast_1d(self.src(x, "b64")).view(np.float32).reshape(-1, 2)
            return lambda: a
        if t == "bf16":
            a = self.src(x, "b16")
            return lambda: bf16_decode(a)
        a = self.src(x, t)
        return (lambda: a.astype(np.float32)) if t == "f16" else (lambda: a)

    def writer(self, x, t):
        """put(values, m): store computed values of type `t` into destination `x`."""
        if isinstance(x, Reg) and x.type == "pred":
            a = self.raw(x)
            return lambda v, m: np.copyto(a, v, where=m)
        if not isinstance(x, Reg):
            if (isinstance(x, Special) and x.name == "_") or (isinstance(x, Sym) and x.name == "_"):
                return lambda v, m: None
            raise UnsupportedOpcode(f"destination {x}")
        a = self.raw(x)
        if t in ("f16", "bf16"):
            encode = f16_encode if t == "f16" else bf16_encode
            return lambda v, m: np.copyto(a, encode(v), where=m, casting="unsafe")
        if t in ("f16x2", "bf16x2"):
            encode, view = (f16_encode if t == "f16x2" else bf16_encode), a.view(np.uint16).reshape(-1, 2)
            return lambda v, m: np.copyto(view, encode(v), where=m if m is True else m[:, None])
        if t == "f32x2":
            view = a.view(np.float32).reshape(-1, 2)
            return lambda v, m: np.copyto(view, v, where=m if m is True else m[:, None])
        dtype = DTYPE[t]
        if dtype.itemsize < a.itemsize:  # narrower than the register: extend by sign
            dtype = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{a.itemsize}")
        elif dtype.itemsize > a.itemsize:
            raise UnsupportedOpcode(f"register {x.name} ({x.type}) written as {t}")
        view = a.view(dtype)
        return lambda v, m: np.copyto(view, v, where=m, casting="unsafe")

    def dst(self, x, t):
        """A same-width view to use as a ufunc `out`, or None when a writer is needed."""
        if isinstance(x, Reg) and x.type != "pred" and TYPE_BYTES[x.type] == DTYPE[t].itemsize:
            return self.raw(x).view(DTYPE[t])
        return None

    def elementwise(self, ins, fn, t, srcs=None, src_types=None):
        """Closure for d = fn(srcs...); uses `out=` when fn is a ufunc on a native type."""
        srcs = ins.args[1:] if srcs is None else srcs
        types = src_types or [t] * len(srcs)
        d = self.dst(ins.args[0], t)
        native = t not in ("f16", "bf16", "f16x2", "bf16x2", "f32x2") and d is not None
        if isinstance(fn, np.ufunc) and native and all(x == t for x in types):
            a = [self.src(x, t) for x in srcs]
            if len(a) == 2:
                a, b = a
                return lambda m: fn(a, b, out=d, where=m)
            (a,) = a
            return lambda m: fn(a, out=d, where=m)
        get, put = [self.reader(x, y) for x, y in zip(srcs, types, strict=False)], self.writer(ins.args[0], t)
        if len(get) == 2:
            g0, g1 = get
            return lambda m: put(fn(g0(), g1()), m)
        return lambda m: put(fn(*[g() for g in get]), m)

    def address(self, x, space):
        """Thunk: per-thread generic int64 addresses of an Addr operand in `space` ('generic' allowed)."""
        window = WINDOW.get(space, 0)
        if isinstance(x, Sym):
            x = Addr(x)
        if isinstance(x.base, Sym):
            _sym_space, addr = self.symbol(x.base)
            const = np.full(self.T, addr + x.offset, np.int64)
            return lambda: const
        if x.base is None:
            const = np.full(self.T, x.offset + window, np.int64)
            return lambda: const
        a = self.raw(x.base) if isinstance(x.base, Reg) else self.src(x.base, "u64")
        offset = np.int64(x.offset + window)
        if a.itemsize == 8:
            a = a.view(np.int64)
            return (lambda: a + offset) if offset else (lambda: a)
        low = np.uint32(x.offset & 0xFFFFFFFF)  # 32-bit addresses wrap
        return lambda: (a + low).astype(np.int64) + window

    # ---- memory access ------------------------------------------------------------------------
    def fail(self, ins, lanes, error, addr, space, bad, message, size=0):
        """Raise `error` for the first bad access, naming line, thread and address."""
        i = int(np.flatnonzero(bad)[0])
        t = int(lanes[i])
        a = int(addr[i])
        near = self.global_memory.describe(a) if a >> SLOT_BITS not in (SHARED, LOCAL, PARAM, CONST) else ""
        if a >> SLOT_BITS == SHARED:
            near = (
                f"shared offset {a - WINDOW['shared'] - SHARED_START} of "
                f"{self.shared.limit - SHARED_START} bytes"
            )
        raise error(f"{message}: {self.where(ins, t)}, address {a:#x}" + (f" ({near})" if near else ""))

    def where(self, ins, t):
        cta = tuple(int(self.specials[f"ctaid.{c}"][0]) for c in "xyz")
        tid = tuple(int(self.specials[f"tid.{c}"][t]) for c in "xyz")
        return (
            f"{self.kernel.name}, PTX line {ins.line}: `{ins.text}`, block {cta}, thread {tid} "
            f"(warp {t // 32} lane {t % 32})"
        )

    def locate(self, addr, size, lanes, ins, store=False):
        """Check accesses that all fall in one slot -> (buffer, byte offsets)."""
        slot = int(addr[0]) >> SLOT_BITS
        if slot == SHARED:
            buf, off, low, high = self.shared, addr - WINDOW["shared"], SHARED_START, self.shared.limit
        elif slot == LOCAL:
            rel = addr - WINDOW["local"]
            bad = (rel < 0) | (rel > self.local_size - size)
            if bad.any():
                self.fail(
                    ins, lanes, MemoryFault, addr, "local", bad, f"out-of-bounds {size}-byte local access"
                )
            buf, off, low, high = self.local, lanes * self.local_size + rel, 0, self.local.nbytes
        else:
            buf = {PARAM: self.params, CONST: self.const}.get(slot) or self.global_memory.buffers.get(slot)
            if buf is None:
                self.fail(
                    ins,
                    lanes,
                    MemoryFault,
                    addr,
                    "global",
                    np.ones(len(addr), bool),
                    f"wild {size}-byte access",
                )
            off, low, high = addr - buf.base, 0, buf.nbytes
        if off.min() < low or off.max() > high - size:
            self.fail(
                ins,
                lanes,
                MemoryFault,
                addr,
                "",
                (off < low) | (off > high - size),
                f"out-of-bounds {size}-byte access",
            )
        if size > 1 and (addr & (size - 1)).any():
            self.fail(
                ins, lanes, MemoryFault, addr, "", (addr & (size - 1)) != 0, f"misaligned {size}-byte access"
            )
        if store and not buf.writable:
            self.fail(
                ins, lanes, MemoryFault, addr, "", np.ones(len(addr), bool), "store to read-only memory"
            )
        return buf, off

    def by_slot(self, addr):
        """None when all addresses share a slot, else the index arrays of each slot."""
        slots = addr >> SLOT_BITS
        if (slots == slots[0]).all():
            return None
        return [np.flatnonzero(slots == s) for s in np.unique(slots)]

    def read(self, addr, dtype, vec, lanes, ins, atomic=False, count=True, agent=None):
        """Gather rows of `vec` elements at generic addresses, for the threads `lanes` (or an async agent)."""
        parts = self.by_slot(addr)
        if parts:
            out = np.empty((len(addr), vec), dtype)
            for i in parts:
                out[i] = self.read(addr[i], dtype, vec, lanes[i], ins, atomic, count)
            return out
        size = dtype.itemsize * vec
        buf, off = self.locate(addr, size, lanes, ins)
        if buf is self.shared:
            who = self.warp_of[lanes] if agent is None else np.full(len(off), agent)
            buf.check_read(
                off,
                size,
                who,
                lambda err, bad, o, msg: self.fail(ins, lanes, err, addr, "shared", bad, msg),
                atomic,
            )
            if count:
                self.counters.shared_access(off, size, self.lane[lanes], self.warp_of[lanes])
        elif count and buf is not self.params and buf is not self.local and buf is not self.const:
            self.counters.global_access(False, addr, size, self.warp_of[lanes])
        return buf.rows(dtype, vec)[off // size]

    def write(self, addr, rows, lanes, ins, atomic=False, count=True, agent=None):
        """Scatter `rows` (n, vec) to generic addresses."""
        parts = self.by_slot(addr)
        if parts:
            for i in parts:
                self.write(addr[i], rows[i], lanes[i], ins, atomic, count)
            return
        size, self.effects = rows.dtype.itemsize * rows.shape[1], True
        buf, off = self.locate(addr, size, lanes, ins, store=True)
        view, at = buf.rows(rows.dtype, rows.shape[1]), off // size
        if buf is self.shared:
            self.write_shared(view, at, off, size, rows, addr, lanes, ins, atomic, agent)
            if count:
                self.counters.shared_access(off, size, self.lane[lanes], self.warp_of[lanes])
        else:
            view[at] = rows
            if count and buf is not self.local:
                self.counters.global_access(True, addr, size, self.warp_of[lanes])

    def write_shared(self, view, at, off, size, rows, addr, lanes, ins, atomic, agent):
        warp = self.warp_of[lanes] if agent is None else np.full(len(off), agent)
        fail = lambda err, bad, o, msg: self.fail(ins, lanes, err, addr, "shared", bad, msg)
        if self.checks.races:
            self.shared.check_write(off, size, warp, fail, atomic, (view[at] == rows).all(1))
        view[at] = rows
        self.shared.mark_written(off, size, warp, atomic)
        if self.checks.races and not atomic and self.W > 1:  # two warps of this very instruction
            bad = (self.shared._shadow(self.shared.stamp, size)[at, 0] & 63) != warp
            if bad.any():
                bad &= (view[at] != rows).any(1)
                if bad.any():
                    fail(RaceError, bad, off, "two warps write different values here in one instruction")

    def active(self, m):
        """Indices of the threads in mask `m`."""
        return self._all_lanes if m is True else np.flatnonzero(m)

    def warps(self, m, ins):
        """Warp indices of a mask that must consist of whole warps."""
        if m is True:
            return self._all_warps
        mm = m.reshape(-1, 32)
        any_, all_ = mm.any(1), mm.all(1)
        if (any_ != all_).any():
            raise PtxError(f"{self.where(ins, int(np.flatnonzero(m)[0]))}: needs all 32 lanes of the warp")
        return np.flatnonzero(all_)

    # ---- decoding -----------------------------------------------------------------------------
    def decode(self, kernel):
        """Take over what the kernel's body fixes; closures are built when their block first runs."""
        self._all_lanes, self._all_warps = np.arange(self.T), np.arange(self.W)
        if kernel.flow is None:
            kernel.flow = Flow(kernel.body)
        flow = kernel.flow
        self.code, self.labels, self.is_control = flow.code, flow.labels, flow.is_control
        self.block_end, self.next_sync, self.next_group = flow.block_end, flow.next_sync, flow.next_group
        self.builders, self.fns, self._slices = flow.builders, [None] * len(flow.code), {}

    def fn(self, pc):
        """The closure of one instruction."""
        if self.fns[pc] is None:
            ins, build = self.code[pc], self.builders[pc]
            try:
                if self.is_control[pc]:
                    self.fns[pc] = self.guard_control(ins, build(self, ins, pc))
                else:
                    self.fns[pc] = self.guard(ins, build(self, ins))
            except UnsupportedOpcode as e:
                raise UnsupportedOpcode(f"PTX line {ins.line}: `{ins.text}`: {e}") from None
            except (KeyError, ValueError, AttributeError, IndexError, TypeError) as e:
                raise UnsupportedOpcode(f"PTX line {ins.line}: `{ins.text}`: {type(e).__name__}: {e}") from e
        return self.fns[pc]

    def guard(self, ins, run):
        """Apply the instruction's predicate."""
        if ins.pred is None:
            return run
        p, neg = self.raw(ins.pred), ins.pred_neg

        def guarded(m):
            g = ~p if neg else p
            if m is not True:
                g = g & m
            n = np.count_nonzero(g)
            if n == self.T:
                run(True)
            elif n:
                run(g if neg or m is not True else g.copy())

        return guarded

    def guard_control(self, ins, ctl):
        if ins.pred is None:
            return ctl
        p, neg = self.raw(ins.pred), ins.pred_neg

        def guarded(pc, m):
            taken = (~p if neg else p) & m
            n, total = np.count_nonzero(taken), self.T if m is True else np.count_nonzero(m)
            if n == total:
                return ctl(pc, m)
            if n == 0:
                return pc + 1
            self.pc[m if m is not True else slice(None)] = pc + 1
            nxt = ctl(pc, taken)
            if nxt is not None:
                self.pc[taken] = nxt
            return None

        return guarded

    # ---- running ------------------------------------------------------------------------------
    def run_grid(self, progress=None):
        gx, gy, gz = self.grid
        self.issued = np.zeros(len(self.code) + 1, np.int64)
        with np.errstate(all="ignore"):
            for z in range(gz):
                for y in range(gy):
                    for x in range(gx):
                        for c, v in zip("xyz", (x, y, z), strict=False):
                            self.specials[f"ctaid.{c}"][:] = v
                        self.run_cta()
        self.counters.ctas = gx * gy * gz
        self.counters.add_code(self.code, np.cumsum(self.issued))

    def run_cta(self):
        """Run one CTA to completion."""
        T = self.T
        self.pc = np.zeros(T, np.int64)
        self.pc[self.threads :] = EXITED
        self.alive = self.pc != EXITED
        self.blocked = np.zeros(T, bool)
        self.reason = [None] * self.W  # why a warp last blocked, for reports
        self.barriers, self.mbarriers, self.wgmma_groups = {}, {}, {}
        self.shared.begin_cta()
        if self.async_copies is not None:
            self.async_copies.begin_cta()
        last, steps, idle_since, self.effects = np.zeros(T, np.int64), 0, 0, False
        self.state_changed = False
        p, m, others = 0, (True if self.threads == T else self.alive.copy()), EXITED
        rng = None
        if self.checks.schedule_seed is not None:
            rng, others = np.random.default_rng(self.checks.schedule_seed), -1
        while True:
            # Run this group until it diverges, blocks, or is no longer the furthest behind.
            self.effects |= self.state_changed
            self.state_changed = False
            nxt = self.step(p, m)
            steps += 1
            if nxt is not None and not self.state_changed and nxt < others and steps % FAIR_PERIOD:
                p = nxt
                continue
            if nxt is not None:
                self.pc[slice(None) if m is True else m] = nxt
            if self.effects:
                self.effects, idle_since = False, steps
            if steps - idle_since > self.checks.max_idle_steps:
                raise DeadlockError(
                    f"spinning: no store, arrival or barrier in {steps - idle_since} steps\n" + self.report()
                )
            waiting = np.where(self.blocked, EXITED, self.pc)
            p = waiting.min()
            if p == EXITED:
                if self.alive.any():
                    raise DeadlockError("all threads are blocked\n" + self.report())
                break
            oldest = np.where(waiting != EXITED, last, 1 << 60).argmin()
            starved = steps - last[oldest] > STARVED
            if starved:
                p = waiting[oldest]
            m = waiting == p
            if rng is not None:  # fuzzing: one random warp at a time
                m = self.warp_of == rng.choice(np.unique(self.warp_of[waiting != EXITED]))
                p = waiting[m].min()
                m &= waiting == p
            last[m] = steps
            rest = waiting[~m]
            p, others = (
                int(p),
                -1 if starved or rng is not None else int(rest.min()) if rest.size else int(EXITED),
            )
            if m.all():
                m = True
        if self.async_copies is not None:
            self.async_copies.drain()

    def step(self, p, m):
        """Run one basic block for the threads of `m`; next pc, or None if pcs were updated."""
        end = self.block_end[p]
        for stop, width, gather in (
            (self.next_sync[p], 32, self.gather_lanes),
            (self.next_group[p], 128, self.gather_warpgroup),
        ):
            if m is not True and stop < end and not self.whole(m, width):
                if stop > p:
                    end = stop
                    continue
                m = gather(p, m)
                if m is None:
                    return None
                end = p + 1
                self.state_changed = True
        n_warps = self.W if m is True else np.count_nonzero(m.reshape(-1, 32).any(1))
        self.issued[p] += n_warps
        self.issued[end] -= n_warps
        ctl = self.is_control[end - 1]
        fns = self._slices.get((p, end))
        if fns is None:
            fns = self._slices[p, end] = [self.fn(pc) for pc in range(p, end - 1 if ctl else end)]
        f = None
        try:
            for f in fns:
                f(m)
        except PtxError:
            raise
        except Exception as e:
            ins = self.code[p + fns.index(f)]
            raise PtxError(
                f"internal error at {self.where(ins, int(self.active(m)[0]))}: {type(e).__name__}: {e}"
            ) from e
        if ctl:
            nxt = self.fn(end - 1)(end - 1, m)
        else:
            nxt = end
        if nxt is not None and end == p + 1 and self.state_changed:
            self.pc[m if m is not True else slice(None)] = nxt
            return None
        return nxt

    def whole(self, m, width):
        """Does `m` consist of all the live threads of some warps (width 32) or warpgroups (128)?"""
        pad = -self.T % width
        mm, alive = (np.pad(a, (0, pad)).reshape(-1, width) for a in (m, self.alive))
        return not (alive & ~mm)[mm.any(1)].any()

    def gather_warpgroup(self, p, m):
        """Threads at `p` whose whole warpgroup has arrived; the others of `m` block."""
        group = np.arange(self.T) // 128
        here = ((self.pc == p) & self.alive | m) & np.isin(group, np.unique(group[m]))
        missing = np.unique(group[self.alive & ~here])
        ready = here & ~np.isin(group, missing)
        self.pc[here] = p
        self.blocked[here] = ~ready[here]
        for w in np.unique(self.warp_of[here & ~ready]):
            self.reason[w] = "waiting for the other warps of the warpgroup"
        return ready if ready.any() else None

    def gather_lanes(self, p, m):
        """Threads of `m` (plus those waiting here) whose named partner lanes are all at `p`; else block."""
        ins = self.code[p]
        here = (self.pc == p) & self.alive | m
        here &= np.repeat(m.reshape(-1, 32).any(1), 32)
        at = here.reshape(-1, 32).astype(np.uint64) @ (np.uint64(1) << np.arange(32, dtype=np.uint64))
        alive = self.alive.reshape(-1, 32).astype(np.uint64) @ (
            np.uint64(1) << np.arange(32, dtype=np.uint64)
        )
        if WARP_SYNC.get(ins.op, -1) == -1 and ins.has("sync"):
            need = np.broadcast_to(self.src(ins.args[-1], "u32"), self.T).astype(np.uint64)
        else:
            need = np.full(self.T, 0xFFFFFFFF, np.uint64)
        need = need & np.repeat(alive, 32)
        ready = here & ((need & ~np.repeat(at, 32)) == 0)
        self.pc[here] = p
        self.blocked[here & ~ready] = True
        self.blocked[ready] = False
        for w in np.unique(self.warp_of[here & ~ready]):
            self.reason[w] = "waiting for other lanes of the warp"
        return ready if ready.any() else None

    def exit_threads(self, m):
        """Retire threads; wake lanes that waited for them and recheck barriers."""
        sel = slice(None) if m is True else m
        self.pc[sel] = EXITED
        self.alive[sel] = False
        self.state_changed = True
        if self.alive.any():
            touched = np.repeat(np.broadcast_to(m, self.T).reshape(-1, 32).any(1), 32)
            waiting = touched & self.blocked & self.alive
            for b in self.barriers.values():
                waiting &= ~b.arrived
            self.blocked &= ~waiting
            for key in list(self.barriers):
                self.barriers[key].try_release()

    def report(self):
        """Where every live warp stands."""
        out = []
        for w in range(self.W):
            s = slice(32 * w, 32 * w + 32)
            for pc in np.unique(self.pc[s][self.alive[s]]):
                lanes = np.flatnonzero((self.pc[s] == pc) & self.alive[s])
                ins = self.code[min(int(pc), len(self.code) - 1)]
                state = self.reason[w] if self.blocked[s][lanes].any() else "runnable"
                out.append(
                    f"  warp {w} lanes {lanes[0]}..{lanes[-1]} ({len(lanes)}): {state} at PTX line "
                    f"{ins.line}: `{ins.text}`"
                )
        return "\n".join(out)
