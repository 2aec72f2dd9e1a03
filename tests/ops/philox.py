"""Philox4x32 and the maps from elements to decisions, in numpy, from the paper and docs/contract.md alone.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import numpy as np
import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
WIDTH = np.uint64(32)


def philox4x32(counter, key, rounds=7):
    """Four words for each counter. `counter`: four integers or arrays that broadcast; `key`: two integers."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counter))
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (product1 >> WIDTH) ^ c1 ^ np.uint64(k0),
            product1 & LOW,
            (product0 >> WIDTH) ^ c3 ^ np.uint64(k1),
            product0 & LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def threshold(p):
    return round(p * 65536)


def keep_scale(p):
    """What a kept element is multiplied by, rounded to float32; 0 where nothing is kept."""
    dropped = threshold(p)
    return float(np.float32(65536 / (65536 - dropped))) if dropped < 65536 else 0.0


def _keep(counter, word, half, seed, p):
    seed %= 1 << 64
    words = np.stack(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)))
    word = np.broadcast_to(word, words.shape[1:])
    chosen = np.take_along_axis(words, word[None].astype(np.int64), 0)[0]
    decisions = (chosen >> (np.uint64(16) * half.astype(np.uint64))) & np.uint64(0xFFFF)
    return torch.from_numpy(decisions >= threshold(p))


def _fragment_keep(columns, rows, stream, kind, seed, p):
    """Column j = 32 J + 8 w + 2 t + e, counter (4 J + t, row, stream, kind), word w, half e."""
    j = np.arange(columns)
    counter = 4 * (j // 32) + (j % 8) // 2
    return _keep((counter, rows, stream, kind), (j % 32) // 8, j % 2, seed, p)


def attention_keep(B, H, M, N, seed, p, first_batch=0):
    """Bool [B, H, M, N]: the weights that dropout keeps; `first_batch` is the b of the first."""
    stream = (first_batch * H + np.arange(B * H)).reshape(B, H, 1, 1)
    return _fragment_keep(N, np.arange(M).reshape(1, 1, M, 1), stream, 0, seed, p)


def feed_forward_keep(rows, columns, seed, p):
    """Bool [rows, columns]."""
    return _fragment_keep(columns, np.arange(rows).reshape(rows, 1), 0, 2, seed, p)


def norm_keep(rows, columns, seed, p):
    """Bool [rows, columns]: column j = 8 q + 2 w + e, counter (q, row, 0, 1)."""
    j = np.arange(columns)
    return _keep((j // 8, np.arange(rows).reshape(rows, 1), 0, 1), (j % 8) // 2, j % 2, seed, p)
