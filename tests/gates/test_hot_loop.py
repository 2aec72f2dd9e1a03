"""What is read off machine code, on listings whose figures can be worked out by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from .hot_loop import RATES, hot_loops, solo_cycles
from .sass import innermost_loops, parse

NONE = 7  # no scoreboard


def listing(*lines, architecture=80):
    """A listing as cuobjdump prints it. A line is an instruction, or (instruction, stall, write barrier, read
    barrier, wait mask); `{n}` in it stands for the address of line n."""
    text = f"\n\tcode for sm_{architecture}\n\t\tFunction : kernel\n"
    for number, line in enumerate(lines):
        instruction, stall, write, read, wait = (line, 1, NONE, NONE, 0) if isinstance(line, str) else line
        instruction = instruction.format(*(f"0x{16 * n:x}" for n in range(len(lines))))
        control = stall | write << 5 | read << 8 | wait << 11
        text += f"        /*{16 * number:04x}*/                   {instruction} ;  /* 0x000000ff0000723c */\n"
        text += f"                                                     /* 0x{control << 41:016x} */\n"
    return text


MMA = "HMMA.16816.F32.BF16 R12, R4, R8, R12"
LOOP = (
    "S2R R0, SR_TID.X",
    MMA,  # 1: the loop's header
    MMA,
    "LDSM.16.MT88.4 R4, [R2]",
    "MUFU.EX2 R1, R1",
    "FFMA.FTZ R1, R1, R2, R3",
    "LDL R5, [R1+0x4]",
    "IADD3 R0, R0, 0x1, RZ",
    "ISETP.NE.AND P0, PT, R0, RZ, PT",
    "@P0 BRA {1}",
    "STG.E.128 [R2.64], R4",
    "EXIT",
)


def only_loop(*lines, architecture=80):
    (loop,) = hot_loops(*parse(listing(*lines, architecture=architecture)))
    return loop


def test_instructions_and_their_scheduling():
    architecture, code = parse(listing(("@!P1 LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", 13, 2, 5, 0b100001)))
    assert architecture == 80
    (load,) = code
    assert (load.predicate, load.opcode, load.kind) == ("@!P1", "LDG", "gmem")
    assert load.modifiers == ("E", "128", "CONSTANT")
    assert (load.stall, load.write_barrier, load.read_barrier, load.wait_mask) == (13, 2, 5, 0b100001)


def test_text_without_instructions_is_no_listing():
    with pytest.raises(AssertionError, match="cuobjdump"):
        parse("cuobjdump info: no device code")


def test_mix_and_bounds_of_a_loop():
    loop = only_loop(*LOOP)
    assert loop.instructions == 9
    counted = {"tensor": 2, "ldsm": 1, "mufu": 1, "fma": 1, "spill": 1, "int": 2, "branch": 1}
    assert loop.mix == counted
    assert loop.kflop == 2 * 2 * 16 * 8 * 16 / 1e3
    assert loop.nt == 7 / 2
    # A quarter of sm_80 multiplies 256 pairs a clock: 8 cycles for each of the two products. Shared memory:
    # four 8x8 matrices take 16, the spilled word 4. Beside the products 7 slots, but 8 cycles of MUFU.
    assert loop.cycles == {"tensor": 16, "issue": 9, "mufu": 8, "fma": 2, "alu": 4, "smem": 20}
    assert loop.serial == 16 / (20 + 8)
    assert loop.bound == 16 / 20


def test_a_chip_of_another_rate():
    loop = only_loop(*LOOP, architecture=89)
    assert loop.cycles["tensor"] == 2 * 2048 * 4 / RATES[86]["mma"]
    assert loop.nt == 7 / 2


def test_no_loop_is_all_of_the_code():
    loop = only_loop("LDG.E.128 R4, [R2.64]", "FADD R4, R4, R4", "STG.E.64 [R2.64], R4", "EXIT")
    assert (loop.instructions, loop.nt, loop.serial) == (4, 0, 0)
    assert loop.bytes_per_slot == (512 + 256) / 4


def test_of_nested_loops_the_inner():
    lines = ("NOP", "FADD R0, R0, R0", MMA, "FADD R1, R1, R1", "@P0 BRA {2}", "@P1 BRA {1}", "EXIT")
    assert [loop.instructions for loop in hot_loops(*parse(listing(*lines)))] == [3]


def test_a_call_that_leaves_a_loop():
    inner = (MMA, "@P0 CALL.REL.NOINC {4}", "BRA {1}")
    lines = ("@P2 BRA {4}", *inner, MMA, "@P1 BRA {0}", "EXIT")
    assert [loop.instructions for loop in hot_loops(*parse(listing(*lines)))] == [3]


def test_a_wait_inside_the_loop_is_no_loop_of_its_own():
    wait = ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3", "@!P0 BRA {1}")
    lines = (MMA, *wait, "FADD R0, R0, R0", "@P1 BRA {0}", "EXIT")
    _, code = parse(listing(*lines))
    (body,) = innermost_loops(code)
    assert [instruction.opcode for instruction in body] == ["HMMA", "FADD", "BRA"]


def test_loops_without_products_are_left_out_beside_one_with():
    sweep = ("STS [R0], RZ", "@P0 BRA {0}")
    assert only_loop(*sweep, MMA, "@P1 BRA {2}", "EXIT").instructions == 2
    assert only_loop(*sweep, "EXIT").instructions == 2


def test_the_hottest_loop_comes_first():
    masked = (MMA, "FSEL R0, R0, RZ, P2", "FSEL R1, R1, RZ, P2", "@P0 BRA {0}")
    full = (MMA, "@P1 BRA {4}", "EXIT")
    assert [loop.nt for loop in hot_loops(*parse(listing(*masked, *full)))] == [1, 3]


def test_a_divergent_branch_is_no_way_back():
    assert only_loop(MMA, "BRA.DIV ~URZ, {0}", "FADD R0, R0, R0", "EXIT").instructions == 4


def test_a_product_of_four_warps():
    lines = (
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT, gsb0", 1, NONE, NONE, 0),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 1, NONE, NONE, 0),
        "@P0 BRA {0}",
        "EXIT",
    )
    loop = only_loop(*lines, architecture=90)
    fmas = 64 * 128 * 16 / 4
    assert loop.kflop == 2 * fmas / 1e3
    assert loop.cycles["tensor"] == fmas * 4 / RATES[90]["wgmma"] == 64
    assert loop.cycles["smem"] == (64 + 128) * 32 / 128  # A and B, of bytes [rows, 16]
    # The wait is for the product's end, and the branch's slot comes after it: nothing overlaps.
    assert loop.solo == 64 + 2
    assert loop.w1 == 64 / 66


def test_a_lone_warp_waits_for_its_scoreboards():
    use = ("FADD R1, R0, R0", 2, NONE, NONE, 0b1)
    _, code = parse(listing(("MUFU.EX2 R0, R0", 1, 0, NONE, 0), use))
    assert solo_cycles(code, RATES[80]) == 20 + 2
    _, code = parse(listing(("MUFU.EX2 R0, R0", 1, 0, NONE, 0), (*use[:-1], 0b10)))
    assert solo_cycles(code, RATES[80]) == 8  # nobody waits for the result; the pipe takes 8 cycles
