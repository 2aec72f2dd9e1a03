"""What a warp issues from its first instruction to its exit, read off machine code.

The code is followed for the warp's first lane, with the kernel's own arguments. Integers that come from the
arguments and from the place in the grid are computed. What comes from memory and floating point is unknown,
and no branch may hang on it, but for that of a division, whose operands are taken to be ordinary.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from .sass import Instruction

# Where constant bank 0 holds a launch's block, grid and arguments, by the chip's major release.
_BLOCK = {8: 0x0, 9: 0x0, 10: 0x360, 12: 0x360}
_GRID = {8: 0xC, 9: 0xC, 10: 0x370, 12: 0x370}
_ARGUMENTS = {8: 0x160, 9: 0x210, 10: 0x380, 12: 0x380}
_MOST_ISSUED = 1_000_000
_WORD = (1 << 32) - 1
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "EQ": int.__eq__,
    "NE": int.__ne__,
    "LT": int.__lt__,
    "LE": int.__le__,
    "GT": int.__gt__,
    "GE": int.__ge__,
}


class Launch(NamedTuple):
    """One block of a launch."""

    grid: tuple[int, int]
    block: tuple[int, int]
    arguments: bytes
    place: tuple[int, int] = (0, 0)  # of the block in the grid
    warp: int = 0  # of the block's


class Unknown(Exception):
    """What was read does not come from the launch alone."""


def _constants(architecture: int, launch: Launch) -> bytes:
    """Constant bank 0; what the driver keeps there beside the launch is 0."""
    major = architecture // 10
    bank = bytearray(_ARGUMENTS[major]) + launch.arguments
    for start, sizes in ((_BLOCK[major], launch.block), (_GRID[major], launch.grid)):
        struct.pack_into("<3I", bank, start, *sizes, 1)
    return bytes(bank)


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


@cache
def _next(operand: str) -> str:
    """The register or constant that holds the upper half of a pair."""
    if constant := re.fullmatch(r"(c\[0x0\]\[.*?)(0x[0-9a-f]+)\]", operand):
        return f"{constant[1]}{int(constant[2], 16) + 4:#x}]"
    return re.sub(r"\d+", lambda number: str(int(number[0]) + 1), operand)


class _Lane:
    """Registers and predicates whose values are known."""

    def __init__(self, architecture: int, launch: Launch) -> None:
        self.bank = _constants(architecture, launch)
        y, x = divmod(32 * launch.warp, launch.block[0])
        self.values = {"RZ": 0, "URZ": 0, "SRZ": 0, "PT": 1, "UPT": 1, "SR_TID.X": x, "SR_TID.Y": y}
        self.values |= {"SR_CTAID.X": launch.place[0], "SR_CTAID.Y": launch.place[1]}

    def word(self, operand: str) -> int:
        """32 bits of a register, an immediate or a constant; a predicate is 0 or 1."""
        if (known := self.values.get(operand)) is not None:
            return known
        if operand[0] == "-":
            return -self.word(operand[1:]) & _WORD
        if operand[0] == "~":
            return ~self.word(operand[1:]) & _WORD
        if operand[0] == "!":
            return 1 - self.word(operand[1:])
        if operand.startswith("0x"):
            return int(operand, 16) & _WORD
        if constant := re.fullmatch(r"c\[0x0\]\[(U?R\w+)?\+?(0x[0-9a-f]+)?\]", operand):
            offset = int(constant[2] or "0", 16) + (self.word(constant[1]) if constant[1] else 0)
            return int.from_bytes(self.bank[offset : offset + 4], "little")
        raise Unknown(operand)

    def wide(self, operand: str, words: int) -> int:
        """That many words; an immediate is extended with its sign."""
        if operand[0] == "-":
            return -self.wide(operand[1:], words) & (1 << 32 * words) - 1
        if operand.startswith("0x") or operand in ("RZ", "URZ", "SRZ"):
            return _signed(self.word(operand)) & (1 << 32 * words) - 1
        found = 0
        for place in range(words):
            found |= self.word(operand) << 32 * place
            operand = _next(operand)
        return found

    def write(self, name: str, value: int, words: int = 1) -> None:
        for _ in range(words):
            if name not in ("RZ", "URZ", "PT", "UPT"):
                self.values[name] = value & _WORD
            name, value = _next(name), value >> 32

    def forget(self, name: str, words: int) -> None:
        for _ in range(words):
            if name not in ("RZ", "URZ", "PT", "UPT"):
                self.values.pop(name, None)
            name = _next(name)


@cache
def _is_predicate(operand: str) -> bool:
    return re.fullmatch(r"U?P[T\d]", operand) is not None


@cache
def _split(opcode: str, listed: str) -> tuple[list[str], list[str]]:
    """What an instruction writes, and what it reads."""
    operands = [operand.strip().removesuffix(".reuse") for operand in listed.split(",")]
    if not re.match(r"U?[RP]", operands[0]):
        return [], operands
    if _is_predicate(operands[0]):
        count = 1 if opcode == "FCHK" else 2
    else:
        count = 1
        while count < len(operands) and _is_predicate(operands[count]):
            count += 1
    return operands[:count], operands[count:]


def _compare(lane: _Lane, modifiers: tuple[str, ...], read: list[str]) -> int:
    """ISETP. Of a comparison's upper words (.EX) the last operand is what the lower words gave."""
    wide, unsigned = {"S64", "U64"} & {*modifiers}, {"U32", "U64"} & {*modifiers}
    a, b = (lane.wide(operand, 2 if wide else 1) for operand in read[:2])
    if not unsigned:
        a, b = (_signed(value, 64 if wide else 32) for value in (a, b))
    equal_above = "EX" in modifiers and a == b
    found = lane.word(read[3]) if equal_above else int(_COMPARISONS[modifiers[0]](a, b))
    other = lane.word(read[2])
    return found | other if "OR" in modifiers else found & other


def _look_up(table: int, a: int, b: int, c: int) -> int:
    """LOP3's function of each bit: entry 4 a + 2 b + c of the table."""
    found = 0
    for entry in range(8):
        if table >> entry & 1:
            found |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return found & _WORD


def _sum(lane: _Lane, modifiers: tuple[str, ...], read: list[str]) -> int:
    """IADD3, bit 32 the carry; -a is ~a + 1, and carries like it."""
    total = sum(lane.word(carry) for carry in read[3:])
    for operand in read[:3]:
        total += (~lane.word(operand[1:]) & _WORD) + 1 if operand[0] == "-" else lane.word(operand)
    return total


def _shift(lane: _Lane, modifiers: tuple[str, ...], read: list[str]) -> int:
    low, places, high = (lane.word(operand) for operand in read)
    if modifiers[0] == "R":
        return (_signed(high) if "S32" in modifiers else high) >> places
    return (high << 32 | low) << places >> 32 if "HI" in modifiers else low << places


def _product(lane: _Lane, modifiers: tuple[str, ...], read: list[str]) -> int:
    a, b = lane.word(read[0]), lane.word(read[1])
    if "WIDE" not in modifiers:
        return a * b + sum(lane.word(operand) for operand in read[2:])
    return (a * b if "U32" in modifiers else _signed(a) * _signed(b)) + lane.wide(read[2], 2)


def _scaled(lane: _Lane, modifiers: tuple[str, ...], read: list[str]) -> int:
    """LEA: b + (a << places), of .HI the upper word of a's pair alone; its carries are only of addresses."""
    a, b = lane.word(read[0]), lane.word(read[1])
    if "HI" not in modifiers:
        return b + (a << lane.word(read[2]))
    if "X" in modifiers:
        raise Unknown("LEA.HI.X")
    above, places = (_signed(a) >> 31, read[2]) if "SX32" in modifiers else (lane.word(read[2]), read[3])
    return b + ((above << 32 | a) << lane.word(places) >> 32)


def _halves(read: list[str]) -> int:
    """HFMA2 of -0 * 0 and two immediates, which loads a constant."""
    if read[0] != "-RZ" or read[1] != "RZ":
        raise Unknown("HFMA2")
    high, low = (struct.unpack("<H", struct.pack("<e", float(operand)))[0] for operand in read[2:])
    return high << 16 | low


def _computed(lane: _Lane, opcode: str, modifiers: tuple[str, ...], read: list[str]) -> int:
    """What an instruction of integers yields, unbounded; Unknown of all others."""
    words = _words(modifiers, opcode)
    match opcode.removeprefix("U"):
        case "ISETP":
            return _compare(lane, modifiers, read)
        case "PLOP3":
            return _look_up(lane.word(read[3]), *map(lane.word, read[:3])) & 1
        case "LOP3":
            return _look_up(lane.word(read[3]), *map(lane.word, read[:3]))
        case "IADD3" if words == 1:
            return _sum(lane, modifiers, read)
        case "IADD3" | "IADD" | "VIADD":
            return sum(lane.wide(operand, words) for operand in read)
        case "IMAD":
            if "HI" in modifiers:
                raise Unknown(opcode)
            return _product(lane, modifiers, read)
        case "LEA":
            return _scaled(lane, modifiers, read)
        case "SHF":
            return _shift(lane, modifiers, read)
        case "SEL":
            return lane.wide(read[0] if lane.word(read[2]) else read[1], words)
        case "MOV" | "LDC" | "LDCU" | "LDC" | "S2R" | "S2UR" | "R2UR" | "CS2R":
            return lane.wide(read[0], words)
        case "HFMA2":
            return _halves(read)
        case "P2R":
            if read[1] != "RZ":
                raise Unknown(opcode)
            mask = lane.word(read[2])
            return sum(lane.word(f"P{bit}") << bit for bit in range(7) if mask >> bit & 1)
        case "FCHK":
            return 0
    raise Unknown(opcode)


@cache
def _words(modifiers: tuple[str, ...], opcode: str) -> int:
    return 4 if "128" in modifiers else 2 if {"64", "WIDE"} & {*modifiers} or opcode == "CS2R" else 1


def _execute(lane: _Lane, instruction: Instruction, certain: bool) -> None:
    opcode, modifiers = instruction.opcode, instruction.modifiers
    written, read = _split(opcode, instruction.operands)
    words = _words(modifiers, opcode)
    try:
        if not certain:
            raise Unknown(opcode)
        value = _computed(lane, opcode, modifiers, read)
    except Unknown:
        for name in written:
            lane.forget(name, 1 if _is_predicate(name) else words)
        return
    for name in written:
        if not _is_predicate(name):
            lane.write(name, value, words)
        elif opcode in ("ISETP", "UISETP", "PLOP3", "UPLOP3", "FCHK") and name == written[0]:
            lane.write(name, value)
        elif opcode in ("IADD3", "UIADD3") and name == written[1]:
            lane.write(name, value >> 32)
        elif opcode in ("LOP3", "ULOP3"):
            lane.write(name, int(value & _WORD != 0))
        else:
            lane.forget(name, 1)


@cache
def _conditions(predicate: str, opcode: str, operands: str) -> list[str]:
    """Predicates that must all hold."""
    found = [predicate.lstrip("@")] if predicate else []
    return found + (re.findall(r"!?U?P\d", operands) if opcode == "BRA" else [])


def issued(architecture: int, code: list[Instruction], launch: Launch) -> Iterator[Instruction]:
    """Every instruction that the warp issues, in order; one whose predicate is false takes its slot too."""
    lane = _Lane(architecture, launch)
    at = {instruction.address: index for index, instruction in enumerate(code)}
    index = 0
    for _ in range(_MOST_ISSUED):
        instruction = code[index]
        yield instruction
        index += 1
        conditions = _conditions(instruction.predicate, instruction.opcode, instruction.operands)
        try:
            taken = all(lane.word(condition) for condition in conditions)
            certain = True
        except Unknown:
            taken, certain = True, False
        if instruction.opcode in ("BRA", "CALL", "EXIT", "RET", "BRX"):
            place = f"{instruction.opcode} at {instruction.address:#x}"
            assert certain, f"{place} hangs on {conditions}, which does not come from the launch alone"
            if taken and instruction.opcode == "EXIT":
                return
            if taken and "DIV" not in instruction.modifiers:
                assert instruction.opcode in ("BRA", "CALL"), f"{place} is not followed"
                index = at[int(re.findall(r"0x[0-9a-f]+", instruction.operands)[-1], 16)]
        elif taken:
            _execute(lane, instruction, certain)
    raise AssertionError(f"no exit within {_MOST_ISSUED} instructions")
