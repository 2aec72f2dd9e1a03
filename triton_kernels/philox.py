"""Dropout decisions: Philox4x32-7, eight 16-bit decisions to a call, keep where the decision >= threshold.

A decision depends on the seed and on its own coordinates alone, never on a tile's size or layout.
"""

import triton
import triton.language as tl


@triton.jit
def norm_keep(seed, row, start, threshold, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which of the columns start .. start + BLOCK_C - 1 of each row survive, bool [ROWS, BLOCK_C].

    Column j = 8q + 2w + e takes half e (low first) of word w of the call with counter (q, row, 0, 1): the
    eight columns that a thread loads as 16 bytes of a 16-bit tensor. row int32 [ROWS]; start is a
    multiple of 8.
    """
    q = start // 8 + tl.arange(0, BLOCK_C // 8)[None, :]
    zero = tl.zeros([ROWS, BLOCK_C // 8], tl.int32)  # [ROWS, Q]
    w0, w1, w2, w3 = tl.philox(seed, zero + q, zero + row[:, None], zero, zero + 1, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROWS, Q, 2, 2]: [..., i, o] is word 2i + o
    words = words.reshape([ROWS, BLOCK_C // 2])
    halves = tl.join(words & 0xFFFF, words >> 16)  # [ROWS, BLOCK_C / 2, 2]
    return halves.reshape([ROWS, BLOCK_C]).to(tl.int32) >= threshold


@triton.jit
def attention_keep(seed, stream, offs_m, n0, threshold, BLOCK_N: tl.constexpr):
    """Which weights of columns n0 .. n0 + BLOCK_N - 1 of each row survive, bool [BLOCK_M, BLOCK_N].

    Column j = 32J + 8w + 2t + e takes half e (low first) of word w of the call with counter
    (4J + t, i, stream, 0): what a thread holds of a row in an accumulator of tensor cores, so that the
    decisions arrive where they are needed. offs_m int32 [BLOCK_M]; n0 and BLOCK_N are multiples of 32.
    """
    BLOCK_M: tl.constexpr = offs_m.shape[0]
    call = n0 // 8 + tl.arange(0, BLOCK_N // 8)[None, :]
    zero = tl.zeros([BLOCK_M, BLOCK_N // 8], tl.int32)  # [BLOCK_M, 4J + t]
    w0, w1, w2, w3 = tl.philox(seed, zero + call, zero + offs_m[:, None], zero + stream, zero, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., i, o] is word 2i + o
    words = words.reshape([BLOCK_M, BLOCK_N // 32, 4, 4]).permute(0, 1, 3, 2)  # [BLOCK_M, J, w, t]
    halves = tl.join(words & 0xFFFF, words >> 16)  # [BLOCK_M, J, w, t, e]
    return halves.reshape([BLOCK_M, BLOCK_N]).to(tl.int32) >= threshold
