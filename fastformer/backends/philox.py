"""The contract's dropout decisions in plain PyTorch: the generator, its maps from elements to decisions."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def dropout_threshold(p: float) -> int:
    """A 16-bit decision keeps its element iff it is at least this; 65536 drops everything."""
    return round(p * 65536)


def dropout_scale(p: float) -> float:
    """What kept elements are multiplied with: one over the probability that the threshold really gives."""
    threshold = dropout_threshold(p)
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def _multiply_wide(constant: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * words, both below 2**32, without leaving int64."""
    low = words * (constant & 0xFFFF)
    high = words * (constant >> 16)
    middle = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (middle >> 32)) & _WORD, middle & _WORD


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> list[Tensor]:
    """Philox4x32 with seven rounds (Salmon et al., SC 2011): four int64 tensors of 32-bit words."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(7):
        high0, low0 = _multiply_wide(0xD2511F53, c0)
        high1, low1 = _multiply_wide(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def keep_consecutive(seed: Tensor, p: float, rows: int, columns: int) -> Tensor:
    """norm's decisions, bool [rows, columns]: column j = 8q + 2w + e is half e of word w of
    call (q, row, 0, 1)."""
    q = torch.arange((columns + 7) // 8, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    zero = torch.zeros_like(row)
    words = torch.stack(philox(seed, *torch.broadcast_tensors(q, row, zero, zero + 1)), -1)  # [rows, q, w]
    halves = torch.stack((words & 0xFFFF, words >> 16), -1)  # [rows, q, w, e]
    return halves.flatten(1)[:, :columns] >= dropout_threshold(p)


def keep_fragments(seed: Tensor, p: float, rows: Tensor, third: Tensor, fourth: int, columns: int) -> Tensor:
    """attention's and feed_forward's decisions, bool [*rows.shape, columns]: column j = 32J + 8w + 2t + e is
    half e of word w of call (4J + t, row, third, fourth), the order of an mma accumulator fragment."""
    blocks = (columns + 31) // 32
    call = torch.arange(4 * blocks, device=seed.device)
    row, third = torch.broadcast_tensors(rows, third)
    row, third = row[..., None], third[..., None]
    fourth_word = torch.full_like(row, fourth)
    words = torch.stack(philox(seed, *torch.broadcast_tensors(call, row, third, fourth_word)), -1)
    words = words.unflatten(-2, (blocks, 4)).transpose(-1, -2)  # [..., J, w, t]
    halves = torch.stack((words & 0xFFFF, words >> 16), -1)  # [..., J, w, t, e]
    return halves.flatten(-4)[..., :columns] >= dropout_threshold(p)
