"""What a warp issues, on listings worked out by hand."""

from __future__ import annotations

import struct

import pytest

pytest.importorskip("triton")

from .issued import Launch, issued
from .sass import parse
from .test_hot_loop import listing

CALL = Launch(grid=(3, 1), block=(64, 2), arguments=struct.pack("<IIq", 5, 0x80000000, -3), place=(2, 0))


def opcodes(*lines, launch=CALL, architecture=80):
    architecture, code = parse(listing(*lines, architecture=architecture))
    return [instruction.opcode for instruction in issued(architecture, code, launch)]


def test_a_loop_is_followed_as_often_as_its_argument_says():
    found = opcodes(
        "MOV R0, RZ", "FADD R1, R1, R1", "IADD3 R0, R0, 0x1, RZ",
        "ISETP.GE.AND P0, PT, R0, c[0x0][0x160], PT",
        "@!P0 BRA {1}", "EXIT",
    )  # fmt: skip
    assert found.count("FADD") == 5 and found[-1] == "EXIT" and len(found) == 1 + 5 * 4 + 1


def test_what_is_not_done_takes_its_slot_too():
    assert opcodes("ISETP.NE.AND P0, PT, RZ, RZ, PT", "@P0 FADD R1, R1, R1", "EXIT") == [
        "ISETP",
        "FADD",
        "EXIT",
    ]


def test_no_branch_hangs_on_memory():
    with pytest.raises(AssertionError, match="BRA at 0x20 hangs on"):
        opcodes("LDG.E R0, [R2.64]", "ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 BRA {3}", "EXIT")
    # Nor on what may have been overwritten by it.
    with pytest.raises(AssertionError, match="hangs on"):
        opcodes(
            "MOV R3, RZ", "LDG.E.64 R2, [R4.64]", "ISETP.NE.AND P0, PT, R3, RZ, PT", "@P0 BRA {4}", "EXIT"
        )


LESS_BELOW = "ISETP.LT.U32.AND P1, PT, RZ, 0x1, PT"


@pytest.mark.parametrize("lines, value", [
    (("MOV R0, c[0x0][0x160]",), 5),
    (("S2R R0, SR_CTAID.X", "IMAD R0, R0, c[0x0][0x0], RZ"), 128),
    (("MOV R0, c[0x0][0xc]",), 3),
    (("IADD3 R0, -RZ, 0x7, -0x2",), 5),
    (("MOV R2, 0xffffffff", "IADD3 R3, P0, R2, 0x1, RZ", "IADD3.X R0, RZ, 0x4, RZ, P0, !PT"), 5),
    (("IMAD.WIDE.U32 R0, RZ, RZ, c[0x0][0x168]",), 0xFFFFFFFD),
    (("MOV R1, 0x80000000", "IMAD.WIDE.U32 R2, R1, 0x2, RZ", "MOV R0, R3"), 1),
    (("MOV R1, 0x80000000", "IMAD.WIDE R2, R1, 0x2, RZ", "MOV R0, R3"), 0xFFFFFFFF),
    (("SHF.R.S32.HI R0, RZ, 0x1f, c[0x0][0x164]",), 0xFFFFFFFF),
    (("SHF.R.U32.HI R0, RZ, 0x1f, c[0x0][0x164]",), 1),
    (("MOV R1, -0x1", "LEA.HI R0, R1, 0xa, RZ, 0x3"), 17),
    (("LEA R0, R0, 0x3, 0x2",), None),
    (("MOV R0, 0x5", "LEA R0, R0, 0x3, 0x2"), 23),
    (("LOP3.LUT R0, RZ, 0xc, RZ, 0x3c, !PT",), 12),
    (("MOV R1, 0xa", "LOP3.LUT R0, R1, 0xc, RZ, 0xc0, !PT"), 8),
    ((LESS_BELOW, "ISETP.LT.AND.EX P0, PT, RZ, RZ, PT, P1", "SEL R0, 0x6, 0x7, P0"), 6),
    (("ISETP.LT.AND P0, PT, RZ, -0x1, PT", "SEL R0, 0x6, 0x7, P0"), 7),
    (("ISETP.LT.U32.AND P0, PT, RZ, -0x1, PT", "SEL R0, 0x6, 0x7, P0"), 6),
    (("ISETP.NE.OR P0, PT, RZ, RZ, !PT", "SEL R0, 0x6, 0x7, P0"), 7),
    (("PLOP3.LUT P0, PT, PT, PT, PT, 0x80, 0x0", "P2R R0, PR, RZ, 0x1"), 1),
    (("HFMA2.MMA R0, -RZ, RZ, 1.875, 0",), 0x3F800000),
])  # fmt: skip
def test_integers(lines, value):
    last = len(lines) + 3
    lines = [
        *lines,
        f"ISETP.NE.AND P0, PT, R0, {value or 0:#x}, PT",
        f"@P0 BRA {{{last}}}",
        "MUFU.EX2 R1, R1",
        "EXIT",
    ]
    if value is None:
        with pytest.raises(AssertionError, match="hangs on"):
            opcodes(*lines)
    else:
        assert "MUFU" in opcodes(*lines)
        lines[-4] = f"ISETP.NE.AND P0, PT, R0, {value ^ 1:#x}, PT"
        assert "MUFU" not in opcodes(*lines)
