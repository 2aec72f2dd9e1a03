"""Which keys the queries of one head may see: window, lengths, padding and mask in one description.

Three kinds, from the cheapest: blocks that no query of a tile sees (ranges, skipped), keys that no query of
the head sees (`real_keys`: zeros when they are loaded, whatever they hold), and what is left, which `visible`
tells of every (query, key). Forward, backward and the passes over weights all go by these.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Bits of a padding mask that a program looks at in one step.
SCAN: tl.constexpr = tl.constexpr(1024)


class Head(NamedTuple):
    """One head of one batch element, or of one packed sequence."""

    b: Any  # int64
    h: Any  # int64; where a tile holds rows of several heads, the first of these
    h_kv: Any  # int64
    row_h: Any  # int64: h or, where a tile holds rows of several heads, theirs, [BLOCK_M, 1]
    stream: Any  # int32, b * H + row_h: dropout's counter
    first_query: Any  # int64, rows before the packed sequence's own
    first_key: Any
    M: Any  # this sequence's
    N: Any
    longest_M: Any  # the call's
    longest_N: Any
    offset: Any  # key i + offset is on query i's diagonal
    left: Any  # None or int
    right: Any
    key_begin: Any  # every key outside is hidden from all queries
    key_end: Any


class Blocks(NamedTuple):
    """Multiples of a block's size, begin <= full_begin <= full_end <= end. Those in
    [full_begin, full_end) are visible from end to end, and those outside [begin, end) not at all."""

    begin: Any
    full_begin: Any
    full_end: Any
    end: Any


@triton.jit
def _real_range(call, b, h, N):
    """(first, last + 1) of the keys that padding and the mask of keys leave; (N, 0) where none is left."""
    begin, end = N, N * 0
    for start in range(0, N, SCAN):
        offs_n = start + tl.arange(0, SCAN)
        bits = _real_bits(call, b, h, offs_n, offs_n < N)
        begin = tl.minimum(begin, tl.min(tl.where(bits, offs_n, N), 0))
        end = tl.maximum(end, tl.max(tl.where(bits, offs_n + 1, 0), 0))
    return begin, end


@triton.jit
def _real_bits(call, b, h, offs_n, real):
    if call.padding is not None:
        at = b * call.padding.stride_b + offs_n.to(tl.int64) * call.padding.stride_n
        real = real & tl.load(call.padding.ptr + at, mask=real, other=0)
    if call.key_mask is not None:
        at = b * call.key_mask.stride_b + h * call.key_mask.stride_h
        real = real & tl.load(
            call.key_mask.ptr + at + offs_n.to(tl.int64) * call.key_mask.stride_n, mask=real, other=0
        )
    return real


@triton.jit
def head_of(call, b, h, M, N, H, H_kv, left, right, lower_right):
    """The Head of batch element (or packed sequence) b and query head h, both int32."""
    return _head_of(call, b, h, h // (H // H_kv), M, N, H, left, right, lower_right)


@triton.jit
def _head_of(call, b, h, h_kv, M, N, H, left, right, lower_right):
    stream = b * H + h
    b, h, h_kv = b.to(tl.int64), h.to(tl.int64), h_kv.to(tl.int64)
    first_query, first_key = b * 0, b * 0
    longest_M, longest_N = M, N
    if call.starts_q_ptr is not None:
        start_q, start_k = tl.load(call.starts_q_ptr + b), tl.load(call.starts_k_ptr + b)
        M = tl.load(call.starts_q_ptr + b + 1) - start_q
        N = tl.load(call.starts_k_ptr + b + 1) - start_k
        first_query, first_key = start_q.to(tl.int64), start_k.to(tl.int64)
    key_begin, key_end = N * 0, N
    if call.padding is not None or call.key_mask is not None:
        key_begin, key_end = _real_range(call, b, h, N)
    if call.lengths_ptr is not None:
        length = tl.load(call.lengths_ptr + b)  # int32 or int64, any value
        key_end = tl.maximum(tl.minimum(length, key_end), 0).to(tl.int32)
    return Head(
        b, h, h_kv, h, stream, first_query, first_key, M, N, longest_M, longest_N, (N - M) * lower_right,
        left, right, key_begin, key_end,
    )  # fmt: skip


@triton.jit
def group_of(call, b, h_kv, M, N, H, left, right, lower_right, GROUP: tl.constexpr):
    """The first of the GROUP query heads that read key head h_kv; its range of keys holds all of theirs."""
    head = _head_of(call, b, h_kv * GROUP, h_kv, M, N, H, left, right, lower_right)
    key_begin, key_end = head.key_begin, head.key_end
    if call.key_mask is not None:
        for index in range(1, GROUP):
            other = _head_of(call, b, h_kv * GROUP + index, h_kv, M, N, H, left, right, lower_right)
            key_begin = tl.minimum(key_begin, other.key_begin)
            key_end = tl.maximum(key_end, other.key_end)
    return _member(head, head.h, 0, key_begin, key_end)


@triton.jit
def member_of(first, index):
    """Head number `index` of the group that group_of told the first of."""
    return _member(first, first.h + index, index, first.key_begin, first.key_end)


@triton.jit
def heads_of_rows(first, members):
    """The Head of a tile whose rows are of several heads of a group: members, int32 [BLOCK_M, 1], counts them
    from the first. The mask of keys must be the same for all."""
    return _member(first, first.h, members, first.key_begin, first.key_end)


@triton.jit
def _member(first, h, index, key_begin, key_end):
    return Head(
        first.b, h, first.h_kv, first.row_h + index, first.stream + index, first.first_query, first.first_key,
        first.M, first.N, first.longest_M, first.longest_N, first.offset, first.left, first.right,
        key_begin, key_end,
    )  # fmt: skip


@triton.jit
def _blocks(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """Whole blocks of the exact ranges [begin, end) and [full_begin, full_end); 0 <= begin."""
    begin = begin // BLOCK * BLOCK
    end = tl.maximum(tl.cdiv(tl.maximum(end, 0), BLOCK) * BLOCK, begin)
    full_begin = tl.minimum(tl.cdiv(tl.maximum(full_begin, begin), BLOCK) * BLOCK, end)
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK * BLOCK, full_begin)
    return Blocks(begin, full_begin, full_end, end)


@triton.jit
def key_blocks(head, m0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of keys for queries m0 .. m0 + BLOCK_M - 1. Masks and padding hide more (see `masks_keys`)."""
    begin, full_begin = head.key_begin, head.key_begin
    end, full_end = head.key_end, head.key_end
    last = tl.minimum(m0 + BLOCK_M, head.M) - 1
    if head.left is not None:
        begin = tl.maximum(begin, m0 + head.offset - head.left)
        full_begin = tl.maximum(full_begin, last + head.offset - head.left)
    if head.right is not None:
        end = tl.minimum(end, last + head.offset + head.right + 1)
        full_end = tl.minimum(full_end, m0 + head.offset + head.right + 1)
    return _blocks(begin, full_begin, full_end, end, BLOCK_N)


@triton.jit
def query_blocks(head, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of queries for keys n0 .. n0 + BLOCK_N - 1. A block past query M - 1 is no full one, nor is
    any where a key of the tile is not real. Masks and padding hide more (see `masks_keys`)."""
    begin, full_begin = head.M * 0, head.M * 0
    end, full_end = head.M, head.M
    last = tl.minimum(n0 + BLOCK_N, head.key_end) - 1
    if head.right is not None:
        begin = tl.maximum(begin, n0 - head.offset - head.right)
        full_begin = tl.maximum(full_begin, last - head.offset - head.right)
    if head.left is not None:
        end = tl.minimum(end, last - head.offset + head.left + 1)
        full_end = tl.minimum(full_end, n0 - head.offset + head.left + 1)
    if n0 + BLOCK_N > head.key_end or n0 < head.key_begin:
        full_end = full_end * 0
    if n0 >= head.key_end or n0 + BLOCK_N <= head.key_begin:
        end = end * 0
    return _blocks(begin, full_begin, full_end, end, BLOCK_M)


@triton.jit
def block_count(blocks, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """How many blocks are full or, with EDGE, how many are visible and not full."""
    full = blocks.full_end - blocks.full_begin
    if EDGE:
        return (blocks.end - blocks.begin - full) // BLOCK
    else:
        return full // BLOCK


@triton.jit
def block_start(blocks, index, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """Where the block of that index begins among those that block_count counts."""
    if EDGE:
        start = blocks.begin + index * BLOCK
        return start + tl.where(start >= blocks.full_begin, blocks.full_end - blocks.full_begin, 0)
    else:
        return blocks.full_begin + index * BLOCK


@triton.jit
def masks_keys(call):
    """Whether keys may be hidden anywhere, so that no block is full. Known when a kernel is compiled."""
    return call.mask is not None or call.key_mask is not None or call.padding is not None


@triton.jit
def real_keys(call, head, offs_n):
    """bool [BLOCK_N]: the keys that some query of the head may see, windows apart."""
    return _real_bits(call, head.b, head.h, offs_n, offs_n < head.key_end)


@triton.jit
def visible(call, head, m, n, real):
    """bool: which keys each query of a tile may see. m, n and `real` (what `real_keys` gave for the keys) lie
    along the tile's dimensions: [BLOCK_M, 1], [1, BLOCK_N] and [1, BLOCK_N], or transposed."""
    seen = (m >= 0) & real
    diagonal = m + head.offset
    if head.left is not None:
        seen = seen & (n >= diagonal - head.left)
    if head.right is not None:
        seen = seen & (n <= diagonal + head.right)
    if call.mask is not None:
        at = head.b * call.mask.stride_b + head.row_h * call.mask.stride_h
        offsets = m.to(tl.int64) * call.mask.stride_m + n.to(tl.int64) * call.mask.stride_n
        seen = seen & tl.load(call.mask.ptr + at + offsets, mask=seen & (m < head.M), other=0)
    return seen
