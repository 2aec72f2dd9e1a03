"""Tensor-core instructions: ldmatrix, stmatrix, movmatrix, mma.sync and wgmma."""

import numpy as np

from ..errors import PtxError, UnsupportedOpcode
from ..machine import op
from ..memory import WINDOW
from ..numeric import FP8, bf16_decode, bf16_encode, f16_encode, tensor_core_sum, tf32_decode
from ..parse import Reg, Vec

# element format -> (bytes, raw array -> numbers, numbers -> raw array)
FORMATS = {
    "bf16": (2, bf16_decode, bf16_encode),
    "f16": (2, lambda x: x.view(np.float16).astype(np.float32), f16_encode),
    "f32": (4, lambda x: x.view(np.float32), lambda y: y.astype(np.float32, copy=False)),
    "tf32": (4, tf32_decode, None),
    "e4m3": (1, FP8["e4m3"].__getitem__, None),
    "e5m2": (1, FP8["e5m2"].__getitem__, None),
    "s8": (1, lambda x: x.view(np.int8).astype(np.float64), None),
    "u8": (1, lambda x: x.astype(np.float64), None),
    "s32": (4, lambda x: x.view(np.int32).astype(np.float64), lambda y: y.astype(np.int64).astype(np.int32)),
}


# ---- ldmatrix / stmatrix ------------------------------------------------------------------------
def _matrix_form(ins):
    count = next(int(m[1]) for m in ins.mods if m in ("x1", "x2", "x4"))
    if not ins.has("m8n8"):
        raise UnsupportedOpcode(f"{ins.opcode}")
    return count, ins.has("trans")


@op("ldmatrix")
def ldmatrix(k, ins):
    count, trans = _matrix_form(ins)
    addr = k.address(ins.args[1], "shared" if any("shared" in m for m in ins.mods) else "generic")
    outs = [k.raw(d) for d in ins.args[0].items]
    row_lanes = (np.arange(k.W)[:, None] * 32 + np.arange(8 * count)).ravel()
    u4 = np.dtype("u4")

    def run(m):
        w = k.warps(m, ins)
        lanes = row_lanes if m is True else (w[:, None] * 32 + np.arange(8 * count)).ravel()
        rows = k.read(addr()[lanes], u4, 4, lanes, ins)  # 16-byte rows
        rows = rows.reshape(len(w), count, 8, 4)
        if trans:
            rows = np.ascontiguousarray(rows.view(np.uint16).swapaxes(2, 3)).view(np.uint32)
        for j, o in enumerate(outs):
            v = rows[:, j].reshape(len(w), 32)
            if m is True:
                o[:] = v.ravel()
            else:
                o.reshape(-1, 32)[w] = v

    return run


@op("stmatrix")
def stmatrix(k, ins):
    count, trans = _matrix_form(ins)
    addr = k.address(ins.args[0], "shared" if any("shared" in m for m in ins.mods) else "generic")
    srcs = [k.raw(d) for d in ins.args[1].items]

    def run(m):
        w = k.warps(m, ins)
        lanes = (w[:, None] * 32 + np.arange(8 * count)).ravel()
        rows = np.stack([s.reshape(-1, 32)[w] for s in srcs], 1).reshape(len(w), count, 8, 4)
        if trans:
            rows = np.ascontiguousarray(np.ascontiguousarray(rows).view(np.uint16).swapaxes(2, 3)).view(
                np.uint32
            )
        k.write(addr()[lanes], np.ascontiguousarray(rows).reshape(-1, 4), lanes, ins)

    return run


@op("movmatrix")
def movmatrix(k, ins):
    a, d = k.raw(ins.args[1]), k.raw(ins.args[0])

    def run(m):
        w = k.warps(m, ins)
        v = np.ascontiguousarray(a.reshape(-1, 32)[w]).view(np.uint16).reshape(len(w), 8, 8).swapaxes(1, 2)
        d.reshape(-1, 32)[w] = np.ascontiguousarray(v).view(np.uint32).reshape(len(w), 32)

    return run


# ---- fragments ----------------------------------------------------------------------------------
def _operand_index(rows, cols, per_reg):
    """Where each element of A (M x K) or B^T (N x K) sits in (register, lane, slot) order.

    A lane holds `per_reg` consecutive K values of row lane // 4; registers walk the rows by 8, then K.
    """
    r, c = np.indices((rows, cols))
    reg, lane = c // (4 * per_reg) * (rows // 8) + r // 8, r % 8 * 4 + c % (4 * per_reg) // per_reg
    return ((reg * 32 + lane) * per_reg + c % per_reg).ravel()


def _accumulator_index(cols, packed):
    """The same for a 16-row accumulator: a lane holds columns 2j, 2j+1 of rows r and r + 8."""
    r, c = np.indices((16, cols))
    lane = r % 8 * 4 + c % 8 // 2
    if packed:
        return (((c // 8 * 2 + r // 8) * 32 + lane) * 2 + c % 2).ravel()
    return ((c // 8 * 4 + r // 8 * 2 + c % 2) * 32 + lane).ravel()


class Fragment:
    """A (warps, rows, cols) matrix spread over the registers of each warp's lanes."""

    def __init__(self, k, items, rows, cols, kind, accumulator=False):
        self.k, self.shape = k, (-1, rows, cols)
        self.elem, self.decode, self.encode = FORMATS[kind]
        self.regs = [k.raw(r) if isinstance(r, Reg) else np.full(k.T, k.src(r, "u32")) for r in items]
        self.regs = [r.reshape(-1, 32) for r in self.regs]
        per_reg = self.regs[0].itemsize // self.elem
        if len(self.regs) * 32 * per_reg != rows * cols:
            raise UnsupportedOpcode("fragment size does not match the shape")
        self.raw_type = np.dtype(f"u{self.elem}")
        self.index = (
            _accumulator_index(cols, per_reg == 2) if accumulator else _operand_index(rows, cols, per_reg)
        )
        self.inverse = np.argsort(self.index)

    def load(self, w, all_warps):
        flat = np.empty((len(w), len(self.regs), 32), self.regs[0].dtype)
        for i, r in enumerate(self.regs):
            flat[:, i] = r if all_warps else r[w]
        flat = flat.view(self.raw_type).reshape(len(w), -1)
        return self.decode(flat.take(self.index, axis=1)).reshape(self.shape)

    def store(self, d, w, all_warps):
        raw = self.encode(d.reshape(len(w), -1).take(self.inverse, axis=1)).view(self.regs[0].dtype)
        raw = raw.reshape(len(w), len(self.regs), 32)
        for i, r in enumerate(self.regs):
            r[slice(None) if all_warps else w] = raw[:, i]


@op("mma")
def mma(k, ins):
    """mma.sync.aligned.mMnNkK.row.col.D.A.B.C for f16, bf16, tf32, fp8, int8."""
    shape = next(m for m in ins.mods if m[0] == "m" and "n" in m and "k" in m)
    M, rest = shape[1:].split("n")
    M, (N, K) = int(M), map(int, rest.split("k"))
    if M != 16 or not (ins.has("row") and ins.has("col")):
        raise UnsupportedOpcode(ins.opcode)
    td, ta, tb, tc = [m for m in ins.mods if m in FORMATS][-4:]
    d, a, b, c = (x.items if isinstance(x, Vec) else (x,) for x in ins.args[:4])
    fa, fb = Fragment(k, a, M, K, ta), Fragment(k, b, N, K, tb)  # B^T has the lane pattern of A
    acc, out = Fragment(k, c, M, N, tc, True), Fragment(k, d, M, N, td, True)
    saturate = ins.has("satfinite") and td == "s32"
    flops = 2 * M * N * K
    truncates = ta == "tf32"  # of 16-bit operands the results' rounding hides it, and it takes time

    def run(m):
        w, whole = k.warps(m, ins), m is True
        left, right, start = fa.load(w, whole), fb.load(w, whole), acc.load(w, whole)
        if truncates:
            products = left[:, :, None].astype(np.float64) * right[:, None]
            r = tensor_core_sum(np.concatenate((products, start[..., None]), -1))
        else:
            r = left @ right.swapaxes(1, 2) + start
        if saturate:
            r = np.clip(r, -(2**31), 2**31 - 1)
        out.store(r, w, whole)
        k.counters.tensor_flops += flops * len(w)

    return run


# ---- wgmma ----------------------------------------------------------------------------------------
def _operand_offsets(desc, rows, cols, elem, mn_major):
    """Shared byte offsets (rows, cols) of a wgmma operand described by a 64-bit matrix descriptor.

    `rows` runs over M or N, `cols` over K. Canonical layouts as in the PTX ISA: K-major puts 8 rows of one
    swizzle width together, MN-major puts one swizzle width of rows together for 8 values of K.
    """
    start, lead, stride = (desc & 0x3FFF) << 4, (desc >> 16 & 0x3FFF) << 4, (desc >> 32 & 0x3FFF) << 4
    mode = desc >> 62 & 3  # 0 none, 1 128B, 2 64B, 3 32B
    width = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    r, c = np.indices((rows, cols))
    if not mn_major:
        off = r // 8 * stride + r % 8 * width
        off += (
            (c * elem // 16 * lead + c * elem % 16)
            if mode == 0
            else (c * elem // width * lead + c * elem % width)
        )
    else:
        per = width // elem
        block, within = (stride, lead) if mode == 0 else (lead, stride)
        off = r // per * block + r % per * elem + c // 8 * within + c % 8 * width
    addr = start + off
    if mode:
        base = (desc >> 49 & 7) << 7
        bits = {1: 7, 2: 3, 3: 1}[mode]
        addr = addr ^ (((addr - base) >> 7 & bits) << 4)
    return addr


@op("wgmma")
def wgmma(k, ins):
    if ins.mods[0] == "fence":
        return lambda m: None
    if ins.mods[0] == "commit_group":

        def commit(m):
            for g in np.unique(k.warps(m, ins) // 4):
                k.wgmma_groups.setdefault(int(g), [[]]).append([])

        return commit
    if ins.mods[0] == "wait_group":
        keep = ins.args[0].value

        def wait(m):
            """Finish all but the newest `keep` groups; their operands must still be untouched."""
            warps = k.warps(m, ins)
            for g in np.unique(warps // 4):
                groups = k.wgmma_groups.setdefault(int(g), [[]])
                while len(groups) - 1 > keep:
                    for check in groups.pop(0):
                        check()
                if keep == 0 or len(groups) > 1:
                    k.shared.finish(k.W + g, warps[warps // 4 == g])

        return wait
    if ins.mods[0] != "mma_async" or ins.has("sp"):
        raise UnsupportedOpcode(ins.opcode)
    return _wgmma_mma(k, ins)


def _wgmma_mma(k, ins):
    shape = next(m for m in ins.mods if m.startswith("m64n"))
    N, K = map(int, shape[4:].split("k"))
    td, ta, tb = [m for m in ins.mods if m in FORMATS][-3:]
    d, a, b, *flags = ins.args
    acc = Fragment(k, d.items, 16, N, td, True)
    frag = Fragment(k, a.items, 16, K, ta) if isinstance(a, Vec) else None
    desc_a = None if frag else k.src(a, "u64")
    desc_b = k.src(b, "u64")
    scale_d = k.pred(flags[0])
    imm = [f.value for f in flags[1:]]
    scale_a, scale_b = (imm[0], imm[1]) if len(imm) > 1 else (1, 1)
    trans = imm[2:] if len(imm) > 2 else [0, 0]
    trans_a, trans_b = (0, trans[0]) if frag else (trans[0], trans[1] if len(trans) > 1 else 0)
    if frag and len(trans) > 1:
        trans_b = trans[1]

    def operand(desc, rows, kind, mn_major, lanes, agent):
        """Fetch (rows, K) through a descriptor -> (matrix, thunk that checks it is still intact)."""
        elem, decode, _ = FORMATS[kind]
        off = _operand_offsets(int(desc), rows, K, elem, mn_major).ravel()
        # gather whole elements; the shadow check works on 16-byte pieces, each read once
        pieces = np.unique(off // 16 * 16)
        who = np.repeat(lanes[:1], len(pieces))
        addr = pieces + WINDOW["shared"]

        def check():
            k.read(addr, np.dtype("u4"), 4, who, ins, count=False, agent=agent)

        check()
        raw = k.shared.rows(np.dtype(f"u{elem}"), 1)[off // elem, 0]
        return decode(raw).reshape(rows, K), check

    def run(m):
        warps = k.warps(m, ins)
        for g in np.unique(warps // 4):
            w = np.arange(4 * g, 4 * g + 4)
            if not np.isin(w, warps).all():
                raise PtxError(
                    f"{k.where(ins, int(w[0]) * 32)}: wgmma needs the 4 warps of the warpgroup together"
                )
            lanes, checks = np.arange(128 * g, 128 * g + 128), []
            k.shared.join(k.W + g, w)
            one = lambda v, lanes=lanes: v if np.ndim(v) == 0 else v[lanes[0]]
            if frag:
                A = frag.load(w, False).reshape(64, K)
            else:
                A, check = operand(one(desc_a), 64, ta, trans_a, lanes, k.W + g)
                checks.append(check)
            B, check = operand(one(desc_b), N, tb, trans_b, lanes, k.W + g)
            checks.append(check)
            r = (A * scale_a) @ (B * scale_b).T
            if one(np.asarray(scale_d())):
                r = r + acc.load(w, False).reshape(64, N)
            acc.store(r.reshape(4, 16, N), w, False)
            k.wgmma_groups.setdefault(int(g), [[]])[-1].extend(checks)
            k.counters.tensor_flops += 2 * 64 * N * K

    return run
