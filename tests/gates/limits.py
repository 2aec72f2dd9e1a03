"""What a kernel's figures must keep to, and those of the best shipped binaries beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tests.triton.offline import SHARED_LIMIT

from .readings import PRODUCTS, Reading

# Bytes a thread that a kernel may spill: none, but where configs.py tells a measured reason.
MOST_SPILLED = 0
# {(kernel, target, case)}; the reasons stand in configs.py.
EXCUSED_SPILLS: dict[tuple[str, str, str], int] = {
    ("key_gradients", "sm_80", "D=256 D_v=256 bfloat16 everything"): 16,
    ("query_gradients", "sm_86", "D=256 D_v=256 bfloat16 everything"): 8,
    ("query_gradients", "sm_89", "D=256 D_v=256 bfloat16 everything"): 8,
    ("key_gradients", "sm_80", "D=128 D_v=128 float32 everything"): 16,
    ("key_gradients", "sm_90", "D=128 D_v=128 bfloat16 packed"): 16,
    # CUDA C++, two scalars that every block of keys reads once. With 16 queries a warp nothing spills, and on
    # sm_90 w1 falls from .37 to .30.
    **{
        ("attention_fwd", target, f"D=128 {dtype} whole"): 8
        for target in ("sm_90", "sm_100")
        for dtype in ("bfloat16", "float16")
    },
    # CUDA C++, two scalars a tile of queries. At D = 64 a tile of 64 queries spills nothing, and reads .55 of
    # shared memory a product, where this one reads .45.
    **{
        ("attention_bwd_keys", target, f"D={width} {dtype} plain"): 8
        for width, target in ((64, "sm_80"), (64, "sm_100"), (128, "sm_90"))
        for dtype in ("bfloat16", "float16")
    },
}

# How often a hot loop of 16-bit attention may run each of its products, where tiles have more queries than a
# warp's 16: once. {(kernel, head dim)}: as often. At 256 a tile whose warps share all work spills 8 to 136
# bytes with numbers of single scores, and of keys takes more than 99 KB of shared memory.
MOST_REPEATS = 1.01
_REPEATING = (("attention_fwd", "D=256"), ("key_gradients", "D=256"), ("key_gradients", "D=192"))
EXCUSED_REPEATS = dict.fromkeys(_REPEATING, 1.5)

# Bytes that a plain norm in CUDA C++ moves to and from DRAM for each instruction that it issues: norm_plan.h
# tells why.
LEAST_BYTES_PER_SLOT = 7.0


class Limits(NamedTuple):
    """Of an operator's plain bfloat16 call; with masks, bias or dropout only the spill gate binds."""

    most_nt: float = float("inf")
    least_w1: float = 0.0


# {(operator and direction, target, head dim)}. They bind the kernels that "auto" runs on the target.
LIMITS = {
    # What the tiles measured that an H100 timed as fastest, and a little, so that they do not get worse
    # unseen: 2.70 and .57; 4.47 and .30. Tiles with better figures were slower there, 506 TFLOP/s beside 540,
    # and 341 (w1 .53) beside 455: w1 is of a warp's own code, and does not see several programs that share a
    # multiprocessor and fill each other's waits.
    ("attention_fwd", "sm_90", 128): Limits(most_nt=2.8, least_w1=0.55),
    ("attention_fwd", "sm_90", 64): Limits(most_nt=4.6, least_w1=0.28),
    ("attention_fwd_cuda", "sm_80", 128): Limits(most_nt=2.6, least_w1=0.60),
    ("attention_fwd_cuda", "sm_80", 64): Limits(most_nt=3.6, least_w1=0.60),
    ("attention_bwd_cuda", "sm_80", 128): Limits(most_nt=1.8),
    ("attention_bwd_cuda", "sm_80", 64): Limits(most_nt=2.5),
    # Of each product, which has no head dim. feed_forward_plan.h counts 0.95 slots beside an mma.
    ("feed_forward_cuda", "sm_80", None): Limits(most_nt=1.2, least_w1=0.70),
}
# Of Triton's kernels where CUDA C++ comes first and keeps to the limit above: what they measured and a
# little, so that they do not get worse unseen. They serve what CUDA C++ refuses, and whoever built without
# nvcc. Forward measured 3.77 and .56: what is computed of single scores takes the slots. Backward measured
# 2.61: seven products and every weight twice, because without float atomics dK with dV, and dQ, are a kernel
# each.
SECOND_CHOICE = {
    ("attention_fwd", "sm_80", 64): Limits(most_nt=3.85, least_w1=0.54),
    ("attention_bwd", "sm_80", 128): Limits(most_nt=2.7),
}


class Anchor(NamedTuple):
    """Figures read off a shipped binary, bfloat16, no mask."""

    name: str
    spilling: str  # instructions that spill
    nt: float
    serial: float
    w1: float


ANCHORS = {
    ("attention_fwd", "sm_80", 128): [
        Anchor("FlashAttention-2 in PyTorch 2.14.1", "30", 3.64, 0.68, 0.58),
        Anchor("flash-attn 2.8.3", "68", 2.6, 0.76, 0.60),
    ],
    ("attention_fwd", "sm_80", 64): [
        Anchor("FlashAttention-2 in PyTorch 2.14.1", "70", 5.49, 0.58, 0.53),
        Anchor("flash-attn 2.8.3", "153", 3.63, 0.66, 0.51),
    ],
    ("attention_fwd", "sm_90", 128): [
        Anchor("FlashAttention-3", "6", 1.65, 0.66, 0.65),
        Anchor("plain Triton", "0", 1.91, 0.66, 0.54),
    ],
    ("attention_fwd", "sm_90", 64): [Anchor("FlashAttention-3", "6", 3.24, 0.47, 0.42)],
    ("attention_bwd", "sm_80", 128): [
        Anchor("FlashAttention-2 in PyTorch 2.14.1", "33", 2.2, 0.74, 0.52),
        Anchor("flash-attn 2.8.3", "33", 1.8, 0.77, 0.54),
    ],
    ("attention_bwd", "sm_80", 64): [
        Anchor("FlashAttention-2 in PyTorch 2.14.1", "56", 3.3, 0.64, 0.45),
        Anchor("flash-attn 2.8.3", "48", 2.5, 0.69, 0.49),
    ],
    ("attention_bwd", "sm_90", 128): [Anchor("FlashAttention-3", "0-3", 1.2, 0.77, 0.77)],
    ("attention_bwd", "sm_90", 64): [Anchor("FlashAttention-3", "0", 2.1, 0.60, 0.67)],
}

for _width in (64, 128):
    for _op in ("attention_fwd", "attention_bwd"):
        ANCHORS[f"{_op}_cuda", "sm_80", _width] = ANCHORS[_op, "sm_80", _width]

# Products of matrices that an operator's meaning asks for, for each pair of a query and a key (feed_forward's
# are a case each); and those that each kernel's hot loop runs, recomputed ones too.
USEFUL_PRODUCTS = {"attention_fwd": 2, "attention_fwd_cuda": 2, "attention_bwd": 5, "attention_bwd_cuda": 5}
USEFUL_PRODUCTS["feed_forward_cuda"] = 1
RUN_PRODUCTS = {kernel: sum(of_columns) for kernel, of_columns in PRODUCTS.items()}
RUN_PRODUCTS["attention_bwd_keys"] = 5
RUN_PRODUCTS["feed_forward"] = 1
# Other kernels with products, whose hot loop has one.
MULTIPLYING = {*RUN_PRODUCTS, "hidden", "hidden_bwd", "gemm", "score_sum", "relative_bias", "attention_sums"}


class Useful(NamedTuple):
    """Figures of all of a call's kernels together, per product that is useful: what is computed twice counts
    against the kernels, and does not flatter them."""

    nt: float
    serial: float
    w1: float


def useful(op: str, readings: Sequence[Reading]) -> Useful | None:
    """None where the operator has no count of useful products, nothing runs on tensor cores, or machine code
    does not tell how large its products are."""
    run = (r for r in readings if r.kernel in RUN_PRODUCTS and r.loop)
    loops = [(RUN_PRODUCTS[r.kernel] * r.repeats, r.loop) for r in run]
    wanted = USEFUL_PRODUCTS.get(op)
    if wanted is None or not loops or any(loop.tensor == 0 or loop.kflop == 0 for _, loop in loops):
        return None
    return Useful(
        sum(products * loop.nt for products, loop in loops) / wanted,
        wanted / sum(products / loop.serial for products, loop in loops),
        wanted / sum(products / loop.w1 for products, loop in loops),
    )


def misses(readings: Sequence[Reading]) -> list[str]:
    """Sentences on what the kernels of one case and target take or do beyond their limits."""
    first = readings[0]
    found = []
    for reading in readings:
        allowed = EXCUSED_SPILLS.get((reading.kernel, reading.target, reading.case), MOST_SPILLED)
        if reading.spilled > allowed:
            found.append(f"{reading.kernel} spills {reading.spilled} bytes a thread; {allowed} allowed")
        if reading.shared > SHARED_LIMIT[reading.target]:
            limit = SHARED_LIMIT[reading.target]
            found.append(f"{reading.kernel} takes {reading.shared} bytes of shared memory of {limit}")
        width = reading.case.split()[0]
        repeats = EXCUSED_REPEATS.get((reading.kernel, width), MOST_REPEATS)
        if reading.repeats > repeats:
            found.append(f"{reading.kernel} runs its products {reading.repeats:.2f} times; {repeats} allowed")
        moved, wanted = reading.bytes_per_slot, LEAST_BYTES_PER_SLOT
        if reading.gated and moved is not None and moved < wanted:
            sentence = f"moves {moved:.1f} bytes of DRAM to an instruction; at least {wanted} wanted"
            found.append(f"{reading.kernel} {sentence}")
        if (
            reading.tensor_cores
            and reading.kernel in MULTIPLYING
            and reading.loop
            and not reading.loop.tensor
        ):
            found.append(f"{reading.kernel} has no product on tensor cores")
    bound = LIMITS | SECOND_CHOICE
    limits = bound.get((first.op, first.target, first.dim)) if first.gated else None
    figures = useful(first.op, readings)
    if limits is None or figures is None:
        return found
    if figures.nt > limits.most_nt:
        found.append(f"nt is {figures.nt:.2f}; at most {limits.most_nt} allowed")
    if figures.w1 < limits.least_w1:
        found.append(f"w1 is {figures.w1:.2f}; at least {limits.least_w1} wanted")
    return found
