"""A model of a kernel's hot loop, from its machine code alone. It ranks variants; it is no clock.

Cycles are those of one of a multiprocessor's four quarters, for one warp and one iteration. Fractions are of
the chip's dense 16-bit peak. Not modelled: DRAM, L2, bank conflicts, skew at barriers, throttling, prologues,
masked blocks, the grid's tail.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from .sass import Instruction, innermost_loops

# mma, wgmma: dense bf16 multiply-adds a clock of a whole multiprocessor, by mma.sync and by wgmma (A100: 312
# TFLOP/s = 108 SM * 1.41 GHz * 1024 * 2; H100 SXM: 989 = 132 * 1.83 * 2048 * 2; mma.sync on Hopper reaches
# 62 % of wgmma, arXiv 2402.13499). The others: cycles a warp instruction keeps a pipe, from the lanes that
# the CUDA programming guide gives (8.0: 64, 64, 64, 16; 9.0: 128, 64, 64, 16).
RATES = {
    80: {"mma": 1024, "wgmma": 0, "fma": 2, "imad": 2, "alu": 2, "mufu": 8},
    86: {"mma": 512, "wgmma": 0, "fma": 1, "imad": 2, "alu": 2, "mufu": 8},  # and 89
    90: {"mma": 1270, "wgmma": 2048, "fma": 1, "imad": 2, "alu": 2, "mufu": 8},
    100: {"mma": 1024, "wgmma": 0, "fma": 1, "imad": 2, "alu": 2, "mufu": 8},
    120: {"mma": 512, "wgmma": 0, "fma": 1, "imad": 1, "alu": 2, "mufu": 8},
}
# Bytes a clock of shared memory's and L1's one port.
_SHARED_BYTES = 128
# Speed of a product beside one of bf16.
_TYPE_SPEED = {"TF32": 0.5, "E4M3": 2.0, "E5M2": 2.0, "S8": 2.0, "U8": 2.0}
# Cycles until a scoreboard is released.
_LATENCY = {
    "mufu": 20,
    "shfl": 24,
    "ldsm": 30,
    "lds": 26,
    "sts": 20,
    "spill": 32,
    "gmem": 300,
    "tensor": 34,
    "conv": 16,
    "uniform": 12,
}
_OTHER_LATENCY, _READ_LATENCY = 8, 10
# One mma.m16n8k16: what non-tensor instructions are counted against.
_MMA_FMAS = 2048


class Cost(NamedTuple):
    pipe: str | None = None
    cycles: float = 0  # that the pipe is busy
    fmas: int = 0  # a warp, on tensor cores
    shared: float = 0  # cycles of shared memory's port
    global_bytes: int = 0


@dataclass(frozen=True)
class HotLoop:
    """The innermost loop with the fewest issue slots to a product on tensor cores."""

    instructions: int
    mix: dict[str, int]  # instructions by kind
    kflop: float  # of products, a warp and iteration
    nt: float  # non-tensor instructions to an mma.m16n8k16; 0 where nothing is multiplied
    bytes_per_slot: float  # of global loads and stores to an issue slot
    cycles: dict[str, float]  # by pipe; "issue" is one an instruction
    solo: float  # cycles of an iteration of a lone warp
    bound: float  # fraction of the peak, if all pipes overlapped
    serial: float  # if products never overlapped the rest
    w1: float  # of one warp a scheduler
    w2: float  # of two

    @property
    def tensor(self) -> int:
        return self.mix.get("tensor", 0)


def _tensor_cost(instruction: Instruction, rates: dict[str, int]) -> Cost:
    """HGMMA.64xNxK is a product of four warps, HMMA.16816 of one; SASS does not tell tcgen05's shapes."""
    of_group, modifiers = "GMMA" in instruction.opcode, ".".join(instruction.modifiers)
    shape = re.search(r"(\d+)x(\d+)x(\d+)" if of_group else r"\b(\d\d)(\d)(\d+)\b", modifiers)
    m, n, k = map(int, shape.groups()) if shape else (0, 0, 0)
    fmas = m * n * k // (4 if of_group else 1)
    speed = next((_TYPE_SPEED[t] for t in instruction.modifiers if t in _TYPE_SPEED), 1)
    in_registers = re.match(r"R\d+,\s*R\d+", instruction.operands)
    rows = n if in_registers else n + m  # of B, and of A where that comes from shared memory too
    shared = rows * 32 / _SHARED_BYTES if of_group else 0
    return Cost("tensor", fmas * 4 / (speed * rates["wgmma" if of_group else "mma"]), fmas, shared)


def cost(instruction: Instruction, rates: dict[str, int]) -> Cost:
    kind, modifiers = instruction.kind, instruction.modifiers
    if kind == "tensor":
        return _tensor_cost(instruction, rates)
    if kind in ("lds", "sts", "spill", "gmem") or instruction.opcode == "LDGSTS":
        width = 512 if "128" in modifiers else 256 if "64" in modifiers else 64 if "U16" in modifiers else 128
        is_global = kind == "gmem" or instruction.opcode == "LDGSTS"
        return Cost("smem", shared=max(width, 128) / (_SHARED_BYTES / 4), global_bytes=width * is_global)
    if kind in ("ldsm", "shfl"):
        matrices = next((int(m) for m in modifiers if m in "24"), 1) if kind == "ldsm" else 1
        return Cost("smem", shared=4 * matrices)
    if kind == "mufu" or instruction.opcode in ("F2F", "F2I", "I2F", "FRND"):
        return Cost("mufu", rates["mufu"])
    if kind in ("fma", "half", "imad"):
        return Cost("fma", rates["imad" if kind == "imad" else "fma"])
    if kind in ("minmax", "conv", "int"):
        return Cost("alu", rates["alu"])
    return Cost()


def solo_cycles(code: list[Instruction], rates: dict[str, int], passes: int = 4) -> float:
    """Steady-state cycles an iteration of a lone warp: ptxas's schedule replayed in order."""
    now, start = 0.0, 0.0
    released = [0.0] * 6  # when each scoreboard is
    groups = [0.0] * 9  # when each group of asynchronous products ends
    free: Counter[str | None] = Counter()  # when each pipe is
    costs = [cost(instruction, rates) for instruction in code]
    for _ in range(passes):
        start = now
        for instruction, (pipe, cycles, _, shared, _) in zip(code, costs, strict=True):
            waited = [released[i] for i in range(6) if instruction.wait_mask >> i & 1]
            now = max([now, *waited])
            if instruction.opcode == "WARPGROUP" and "DEPBAR" in instruction.modifiers:
                pending = int(re.findall(r"\d+", instruction.operands)[-1], 16)
                now = max(now, groups[-1 - pending])
            busy = shared if pipe == "smem" else cycles
            if "GMMA" in instruction.opcode:
                free[pipe] = max(now, free[pipe]) + busy  # type: ignore[assignment]
                if "gsb" in instruction.operands:
                    groups.append(free[pipe])
            elif pipe:
                now = max(now, free[pipe])
                free[pipe] = now + busy  # type: ignore[assignment]
            latency = _LATENCY.get(instruction.kind, _OTHER_LATENCY)
            for barrier, delay in (
                (instruction.write_barrier, latency),
                (instruction.read_barrier, _READ_LATENCY),
            ):
                if barrier < 6:
                    released[barrier] = max(released[barrier], now + delay)
            now += instruction.stall
    return now - start


def measure(code: list[Instruction], rates: dict[str, int]) -> HotLoop:
    """What one loop body costs."""
    busy: Counter[str | None] = Counter()
    global_bytes, fmas, peak = 0, 0, 0.0
    for instruction in code:
        found = cost(instruction, rates)
        busy.update({found.pipe: found.cycles, "smem": found.shared})  # type: ignore[dict-item]
        fmas, global_bytes = fmas + found.fmas, global_bytes + found.global_bytes
        if found.pipe == "tensor":
            own = rates["wgmma" if "GMMA" in instruction.opcode else "mma"]
            peak += found.cycles * own / max(rates["mma"], rates["wgmma"])
    mix = Counter(instruction.kind for instruction in code)
    slots = len(code)
    cycles = {"tensor": busy["tensor"], "issue": slots}
    cycles |= {pipe: busy[pipe] for pipe in ("mufu", "fma", "alu", "smem")}
    longest, solo = max(cycles.values()), solo_cycles(code, rates)
    rest = max(slots - mix["tensor"], cycles["mufu"], cycles["fma"], cycles["alu"])
    return HotLoop(
        instructions=slots,
        mix=dict(mix.most_common()),
        kflop=2 * fmas / 1e3,
        nt=(slots - mix["tensor"]) * _MMA_FMAS / fmas if fmas else 0.0,
        bytes_per_slot=global_bytes / slots,
        cycles=cycles,
        solo=solo,
        bound=peak / longest,
        serial=peak / (max(cycles["tensor"], cycles["smem"]) + rest),
        w1=peak / max(solo, longest),
        w2=2 * peak / max(solo, 2 * longest),
    )


def hot_loops(architecture: int, code: list[Instruction]) -> list[HotLoop]:
    """Every loop of `innermost_loops`, the hottest first: loops of a half of the most products come before
    smaller ones, and then fewer slots to a product."""
    rates = RATES[max(known for known in RATES if known <= architecture)]
    loops = [measure(body, rates) for body in innermost_loops(code)]
    most = max(loop.kflop for loop in loops)
    return sorted(loops, key=lambda loop: (2 * loop.kflop < most, loop.nt, -loop.instructions))
