"""SASS as cuobjdump prints it: instructions with their scheduling fields, basic blocks, innermost loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# The kind of an instruction by its opcode; the first match wins.
_KINDS = [
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("tensor", r"([HIQODB]MMA|[HIQB]GMMA|UTC\w*MMA)$"),
        ("mufu", r"MUFU$"),
        ("fma", r"(FFMA2?|FADD2?|FMUL2?)$"),
        ("half", r"(HFMA2|HADD2|HMUL2)\w*$"),
        ("minmax", r"(FMNMX3?|HMNMX2|FSETP|FSEL|FSET|FCHK|HSETP2)$"),
        ("conv", r"(F2FP|F2F|F2I|I2F|I2FP|F2IP|FRND)$"),
        ("shfl", r"(SHFL|REDUX|VOTE|MATCH)$"),
        ("ldsm", r"(LDSM|STSM)$"),
        ("lds", r"LDS$"),
        ("sts", r"(STS|ATOMS)$"),
        ("async_copy", r"(LDGSTS|UTMA(LDG|STG|REDG|PF|CCTL)|UBLK\w+)$"),
        ("tmem", r"(LDTM|STTM|UTCCP|UTC\w*BAR|UTCATOMSWS)$"),
        ("gmem", r"(LDG?|STG?|REDG?|ATOMG?|REDAS)$"),
        ("spill", r"(LDL|STL)$"),
        ("bar", r"BAR$"),
        (
            "sync",
            r"(SYNCS|(LDG)?DEPBAR|MEMBAR|FENCE|ERRBAR|WARPGROUP\w*|WARPSYNC|ELECT|NANOSLEEP|"
            r"CCTL\w*|UCGABAR\w*|UTMACMDFLUSH|ACQBULK|USETMAXREG|B2R)$",
        ),
        ("branch", r"(BRA|BRXU?|JM[PX]|EXIT|BSSY|BSYNC|BREAK|CALL|RET|YIELD|KILL|NOP)$"),
        ("uniform", r"(U[A-Z0-9]+|R2UR|S2UR|LDCU)$"),
        ("imad", r"IMAD$"),
        ("special", r"(C?S2R|LDC|P2R|R2P|POPC|FLO|BREV)$"),
        ("int", r"."),
    )
]
_ENDS_BLOCK = {"BRA", "JMP", "EXIT", "RET", "BRX", "BRXU", "JMX", "KILL"}
_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9]*)((?:\.[A-Za-z0-9_]+)*)\s*([^;]*?)\s*;"
    r"[^\n]*\n\s*/\*\s*0x([0-9a-f]{16})"
)


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: str
    kind: str
    # What ptxas scheduled: cycles until the next may issue; the scoreboards (0..5, 7 for none) that are
    # released once the result is written and once the operands are read; a mask of those waited for.
    stall: int
    write_barrier: int
    read_barrier: int
    wait_mask: int


def disassemble(cubin: bytes) -> str:
    """What cuobjdump prints of a cubin's kernels, with the encoding of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Its standard error warns of formats of Blackwell's cubins that make no difference here.
        command = [CUOBJDUMP, "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse_all(text: str) -> dict[str, tuple[int, list[Instruction]]]:
    """{function: what `parse` finds}."""
    head, *functions = text.split("Function : ")
    architecture = re.search(r"code for sm_\d+", head)
    assert architecture is not None, "not what cuobjdump -sass prints"
    return {function.split()[0]: parse(f"{architecture[0]}\n{function}") for function in functions}


def parse(text: str) -> tuple[int, list[Instruction]]:
    """(architecture, instructions) of one function: 80 and so on."""
    instructions = []
    for address, predicate, opcode, modifiers, operands, high in _INSTRUCTION.findall(text):
        control = int(high, 16) >> 41  # stall:4 yield:1 write_barrier:3 read_barrier:3 wait_mask:6
        instructions.append(
            Instruction(
                int(address, 16),
                predicate.strip(),
                opcode,
                tuple(modifiers.split(".")[1:]),
                operands,
                next(kind for kind, pattern in _KINDS if pattern.match(opcode)),
                max(1, control & 15),
                control >> 5 & 7,
                control >> 8 & 7,
                control >> 11 & 63,
            )
        )
    architecture = re.search(r"code for sm_(\d+)", text)
    assert architecture is not None and instructions, "not what cuobjdump -sass prints"
    return int(architecture[1]), instructions


def _basic_blocks(code: list[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Ranges of instructions, and each block's successors."""
    place = {instruction.address: index for index, instruction in enumerate(code)}
    targets, leaders = {}, {0}
    for index, instruction in enumerate(code):
        # ptxas leaves some loops by a call that returns nowhere: @P0 CALL.REL.NOINC.
        leaves = instruction.opcode == "CALL" and "NOINC" in instruction.modifiers and instruction.predicate
        if instruction.opcode in _ENDS_BLOCK or leaves:
            leaders.add(index + 1)
            addresses = re.findall(r"0x[0-9a-f]+", instruction.operands)
            # BRA.DIV leads to the cold path of a divergent warp.
            jumps = instruction.opcode in ("BRA", "JMP") and "DIV" not in instruction.modifiers
            if (jumps or leaves) and addresses:
                targets[index] = place.get(int(addresses[-1], 16), 0)
                leaders.add(targets[index])
    starts = sorted(leader for leader in leaders if leader < len(code))
    blocks = [range(start, end) for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]
    number = {start: block for block, start in enumerate(starts)}
    successors = []
    for block in blocks:
        last = code[block[-1]]
        goes_on = (
            last.opcode not in _ENDS_BLOCK
            or last.predicate
            or re.match(r"!?U?P\d", last.operands)
            or "DIV" in last.modifiers
        )
        following = [number[targets[block[-1]]]] if block[-1] in targets else []
        if goes_on and block.stop < len(code):
            following.append(number[block.stop])
        successors.append(following)
    return blocks, successors


def _natural_loops(successors: list[list[int]]) -> dict[int, set[int]]:
    """{header: blocks of its loop}, from the back edges of a depth-first walk that starts at the entry."""
    predecessors: dict[int, set[int]] = defaultdict(set)
    back_edges, on_path, seen = [], {0}, {0}
    walk = [(0, iter(successors[0]))]
    while walk:
        node, rest = walk[-1]
        following = next(rest, None)
        if following is None:
            on_path.remove(node)
            walk.pop()
            continue
        predecessors[following].add(node)
        if following in on_path:
            back_edges.append((node, following))
        elif following not in seen:
            seen.add(following)
            on_path.add(following)
            walk.append((following, iter(successors[following])))
    loops: dict[int, set[int]] = defaultdict(set)
    for tail, header in back_edges:
        loops[header].add(header)
        reached = [tail]
        while reached:
            block = reached.pop()
            if block not in loops[header]:
                loops[header].add(block)
                reached += predecessors[block]
    return loops


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of the innermost loops that multiply on tensor cores; where none does, of all innermost
    loops; where there is no loop, the whole code. Loops inside a body without such a product, which wait for
    a barrier, are no part of it."""
    blocks, successors = _basic_blocks(code)
    loops = _natural_loops(successors)

    def multiplies(members: Iterable[int]) -> bool:
        return any(code[index].kind == "tensor" for block in members for index in blocks[block])

    multiplying = {header: body for header, body in loops.items() if multiplies(body)}
    bodies = []
    for header, body in (multiplying or loops).items():
        inner = [other for head, other in loops.items() if head != header and other < body]
        if any(multiplies(other) or not multiplying for other in inner):
            continue
        own = sorted(body.difference(*inner))
        bodies.append([code[index] for block in own for index in blocks[block]])
    return bodies or [code]
