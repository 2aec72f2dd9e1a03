"""The reading of real machine code: a Triton kernel whose products are known."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.compiler import ASTSource

from tests.triton.offline import TARGETS

from .hot_loop import hot_loops
from .sass import disassemble, parse

M, N, K, WARPS = 64, 64, 32, 4


@triton.jit
def product_kernel(
    a_ptr, b_ptr, out_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EXTRA: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    for step in range(steps):
        a = tl.load(a_ptr + step * M * K + m[:, None] * K + k[None, :])
        b = tl.load(b_ptr + step * K * N + k[:, None] * N + n[None, :])
        acc = tl.dot(a, b, acc)
        if EXTRA:
            acc = tl.exp2(acc)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc)


def compiled_loop(target, extra):
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "steps": "i32"}
    constants = {"M": M, "N": N, "K": K, "EXTRA": extra}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {(place,): [["tt.divisibility", 16]] for place in range(3)}
    source = ASTSource(
        product_kernel, signature, {(4 + i,): v for i, v in enumerate(constants.values())}, attributes
    )
    compiled = triton.compile(
        source, target=TARGETS[target], options={"num_warps": WARPS, "enable_fp_fusion": True}
    )
    return hot_loops(*parse(disassemble(compiled.asm["cubin"])))[0]


@pytest.mark.parametrize("target, opcode_fmas", [("sm_80", 16 * 8 * 16), ("sm_90", 64 * N * 16 // 4)])
def test_products_of_a_compiled_kernel(target, opcode_fmas):
    loop, busier = compiled_loop(target, False), compiled_loop(target, True)
    fmas = M * N * K // WARPS
    assert loop.kflop == busier.kflop == 2 * fmas / 1e3
    assert loop.tensor == busier.tensor == fmas // opcode_fmas
    # Every element of the accumulator is raised by one instruction a thread.
    raised = M * N // (32 * WARPS)
    assert busier.mix["mufu"] - loop.mix.get("mufu", 0) == raised
    assert busier.nt > loop.nt and busier.serial < loop.serial and busier.w1 < loop.w1
