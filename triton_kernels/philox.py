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
def matrix_keep(
    seed, row, col_start, stream, KIND: tl.constexpr, threshold, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Which of the columns col_start .. col_start + BLOCK_C - 1 of each row survive, bool [ROWS, BLOCK_C].

    Column j = 32J + 8w + 2t + e takes half e (low first) of word w of the call with counter
    (4J + t, row, stream, KIND): what a thread holds of one row in the accumulators of mma and wgmma. KIND is
    0 for attention, whose stream is batch * heads + head, and 2 for feed_forward, whose stream is 0.
    row int32 [ROWS], stream int32 or, of each row, [ROWS, 1]; col_start and BLOCK_C are multiples of 32.
    """
    call = col_start // 8 + tl.arange(0, BLOCK_C // 8)[None, :]
    zero = tl.zeros([ROWS, BLOCK_C // 8], tl.int32)  # [ROWS, 4J + t]
    w0, w1, w2, w3 = tl.philox(seed, zero + call, zero + row[:, None], zero + stream, zero + KIND, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROWS, 4J + t, 2, 2]: [..., i, o] is word 2i + o
    words = words.reshape([ROWS, BLOCK_C // 32, 4, 4]).permute(0, 1, 3, 2)  # [ROWS, J, w, t]
    halves = tl.join(words & 0xFFFF, words >> 16)  # [ROWS, J, w, t, e]
    return halves.reshape([ROWS, BLOCK_C]).to(tl.int32) >= threshold
