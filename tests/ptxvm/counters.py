"""Deterministic per-launch execution counters."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

CLASSES = {
    "ld": "memory",
    "st": "memory",
    "atom": "atomic",
    "red": "atomic",
    "mma": "tensor",
    "wgmma": "tensor",
    "ldmatrix": "ldmatrix",
    "stmatrix": "ldmatrix",
    "shfl": "shuffle",
    "vote": "shuffle",
    "match": "shuffle",
    "redux": "shuffle",
    "elect": "shuffle",
    "activemask": "shuffle",
    "bar": "barrier",
    "barrier": "barrier",
    "mbarrier": "barrier",
    "bra": "control",
    "brx": "control",
    "ret": "control",
    "exit": "control",
    "cvt": "convert",
    "setp": "compare",
    "selp": "compare",
    "set": "compare",
    "mov": "move",
    "cvta": "move",
}
MUFU = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh")


def opcode_class(ins):
    """Reporting class of an instruction."""
    if ins.op in MUFU or (ins.op == "div" and ins.type[0] == "f"):
        return "mufu"
    if ins.op in ("ld", "st"):
        space = next(
            (m for m in ins.mods if m.split("::")[0] in ("global", "shared", "local", "param", "const")),
            "generic",
        )
        return f"{ins.op}.{space.split('::')[0]}"
    if ins.op == "cp":
        return "cp.async"
    if ins.op in CLASSES:
        return CLASSES[ins.op]
    t = next((m for m in reversed(ins.mods) if m[0] in "fbsu" and m[-1].isdigit()), "")
    return "float" if t.startswith(("f", "bf")) else "integer"


@dataclass
class Counters:
    """What one launch executed. `warp_instructions` counts one per warp per issued instruction."""

    warp_instructions: Counter = field(default_factory=Counter)  # opcode class -> count
    opcodes: Counter = field(default_factory=Counter)  # full opcode -> count
    tensor_flops: int = 0
    mufu_ops: int = 0  # thread-level
    global_load_bytes: int = 0  # requested by threads
    global_load_sectors: int = 0  # 32-byte sectors, per warp request
    global_store_bytes: int = 0
    global_store_sectors: int = 0
    shared_requests: int = 0  # warp-level ld/st.shared, ldmatrix
    shared_wavefronts: int = 0  # bank passes they took
    shared_wavefronts_ideal: int = 0  # passes without conflicts
    barriers: int = 0  # completed CTA barriers
    ctas: int = 0
    wall_seconds: float = 0.0  # the one non-deterministic field

    @property
    def load_efficiency(self):
        """Requested bytes / (32 * sectors); 1.0 is perfectly coalesced."""
        return self.global_load_bytes / max(1, 32 * self.global_load_sectors)

    @property
    def store_efficiency(self):
        return self.global_store_bytes / max(1, 32 * self.global_store_sectors)

    @property
    def bank_conflicts(self):
        """Extra shared-memory passes caused by bank conflicts."""
        return self.shared_wavefronts - self.shared_wavefronts_ideal

    def add_code(self, code, executed):
        """Account for `executed[i]` warp-level issues of each instruction."""
        for ins, n in zip(code, executed, strict=False):
            if n:
                cls = opcode_class(ins)
                self.warp_instructions[cls] += int(n)
                self.opcodes[ins.opcode] += int(n)
                if cls == "mufu":
                    self.mufu_ops += int(n) * 32

    def global_access(self, store, addr, size, warp):
        """Count a global access of `size` bytes per lane at `addr` by lanes of `warp`."""
        first = addr >> 5
        if size > 32:  # v8.b32 and wider still touch whole sectors
            first = np.concatenate([first + i for i in range(size // 32)])
            warp = np.tile(warp, size // 32)
        sectors = len(np.unique(warp.astype(np.int64) << 48 | (first & ((1 << 48) - 1))))
        if store:
            self.global_store_bytes += len(addr) * size
            self.global_store_sectors += sectors
        else:
            self.global_load_bytes += len(addr) * size
            self.global_load_sectors += sectors

    def shared_access(self, off, size, lane, warp):
        """Count bank passes: 32 4-byte banks; 8- and 16-byte accesses go in half and quarter warps."""
        if len(off) == 0:
            return
        key = (size, (off - (off[0] & ~127)).tobytes(), lane.tobytes(), warp.tobytes())
        cost = _conflict_cache.get(key)
        if cost is None:
            if len(_conflict_cache) > 20000:
                _conflict_cache.clear()
            cost = _conflict_cache[key] = _bank_passes(off, size, lane, warp)
        self.shared_requests += cost[0]
        self.shared_wavefronts += cost[1]
        self.shared_wavefronts_ideal += cost[2]


_conflict_cache = {}


def _bank_passes(off, size, lane, warp):
    words = max(1, size // 4)
    phase = warp.astype(np.int64) * 8 + lane * words // 32
    phase = np.repeat(phase, words)
    word = (off[:, None] // 4 + np.arange(words)).ravel()
    pairs = np.unique(np.stack([phase, word]), axis=1)
    phases, index = np.unique(pairs[0], return_inverse=True)
    per_bank = np.bincount(index * 32 + pairs[1] % 32, minlength=len(phases) * 32).reshape(-1, 32)
    return len(np.unique(warp)), int(per_bank.max(axis=1).sum()), len(phases)
