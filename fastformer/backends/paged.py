"""paged_attention by a backend's attention, for backends that have no kernel of their own for it.

The keys of all batch elements are gathered one after another: packed sequences, whose diagonals end at each
sequence's own last key, as a padded batch's do not. There are as many rows as the page table has room for,
whatever the lengths, so that nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..specs import AttentionSpec
from . import raw_ops

# Where a packed sequence begins is told in 32 bits.
_MAX_KEYS = 2**31 - 1


def refusal(tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why packed sequences cannot hold the keys of this call of paged_attention, or None."""
    _, key_pages, _, page_table, *_ = tensors
    assert key_pages is not None and page_table is not None
    if math.prod(page_table.shape) * key_pages.shape[1] > _MAX_KEYS:
        return f"its paged_attention takes page tables with room for {_MAX_KEYS} keys at most"
    return None


def packed(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    sink: Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
) -> tuple[AttentionSpec, tuple[Tensor | None, ...]]:
    """The same as a call of attention, with the tensors of specs.ATTENTION_TENSORS."""
    B, M = query.shape[0], query.shape[2]
    longest = page_table.shape[1] * key_pages.shape[1]
    bounds = F.pad(lengths.clamp(0, longest).cumsum(0), (1, 0))  # int64 [B + 1]
    places = _places(page_table, bounds, B * longest, key_pages)
    rows = query.transpose(1, 2).flatten(0, 1)  # [B * M, H, D]
    key, value = key_pages[places], value_pages[places]  # [B * longest, H_kv, D]
    starts_q = torch.arange(B + 1, dtype=torch.int32, device=query.device) * M
    spec = AttentionSpec(scale, left, right, True, softcap, max_seqlen_q=M, max_seqlen_k=longest)
    return spec, (rows, key, value, *(None,) * 5, sink, None, starts_q, bounds.to(torch.int32))


def paged_attention_fwd(backend: str, query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The raw operator of fastformer/ops/paged_attention.py, by the raw attention_fwd of `backend`."""
    B, H, M, _ = query.shape
    if 0 in (B, H, M):
        out = query.new_empty(B, H, M, arguments[1].shape[-1])
        return out, query.new_empty(B, H, M, dtype=torch.float32)
    spec, tensors = packed(query, *arguments)
    out, lse, _, _ = raw_ops.attention_fwd(backend, spec, *tensors)
    contiguous = torch.contiguous_format
    return (
        out.view(B, M, H, -1).transpose(1, 2).clone(memory_format=contiguous),
        lse.view(H, B, M).transpose(0, 1).clone(memory_format=contiguous),
    )


def _places(page_table: Tensor, bounds: Tensor, rows: int, key_pages: Tensor) -> tuple[Tensor, Tensor]:
    """Of each packed key: its page and its place there. Of the rows past the last key: any that exist."""
    (B, columns), (P, S) = page_table.shape, key_pages.shape[:2]
    row = torch.arange(rows, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:], row, right=True).clamp(max=B - 1)
    position = row - bounds[sequence]
    page = page_table[sequence, (position // S).clamp(max=columns - 1)]
    # What is no page's number counts as the last.
    return torch.where((page >= 0) & (page < P), page, P - 1).long(), position % S
