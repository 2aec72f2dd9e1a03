"""A call of attention as its kernels see it: every tensor with its strides, None for what was not given.

What is None is known when a kernel is compiled, so that nobody pays for an argument that was not given.
Python builds `Tensors` and the sizes once a call; a kernel takes them as they are and makes its `Head`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .launch import TARGET, dropout_constants

LOG2_E = math.log2(math.e)


class Rows(NamedTuple):
    """query, key, value, out or a gradient of theirs: [B, H, M, width]; packed, stride_b is 0."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any  # columns are contiguous
    far: Any  # None, or 1 where the rows of a tile lie further apart than 32 bits can say


class Scores(NamedTuple):
    """A mask or a bias, [B, H, M, N], with stride 0 where it is broadcast."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any
    stride_n: Any


class KeyBits(NamedTuple):
    """bool [B, H, N]: which keys are real, for all queries alike."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_n: Any


class RowStats(NamedTuple):
    """float32 [B, H, M] each; packed [H, total], stride_b 0."""

    lse_ptr: Any
    max_ptr: Any
    sum_ptr: Any
    stride_b: Any
    stride_h: Any


class Tensors(NamedTuple):
    query: Any  # Rows
    key: Any  # Rows
    value: Any  # Rows
    mask: Any  # None or Scores of bool
    key_mask: Any  # None or KeyBits: a mask whose query dimension is 1
    padding: Any  # None or KeyBits, the same for all heads
    lengths_ptr: Any  # None or int [B]
    bias: Any  # None or Scores
    relative_bias_ptr: Any  # None or [H or 1, M + N - 1]
    relative_bias_stride_h: Any
    sink_ptr: Any  # None or [H]
    seed_ptr: Any  # int64 [1], None without dropout
    starts_q_ptr: Any  # None or int32 [S + 1]: packed sequences
    starts_k_ptr: Any
    scale: Any  # float >= 0: what a product counts in logits (see QUERY_SIGN)
    softcap: Any  # None or float
    long_chains: Any  # None, or 1 where float32 products are summed up over 128 columns at once and not 64
    dropout_scale: Any  # float


# Sizes of a call, arguments of every kernel in this order. Triton would compile anew for a size of 1 and for
# one that 16 divides, and for these there is nothing in it.
SIZES = ("M", "N", "H", "H_kv", "left", "right", "lower_right", "threshold")


class AttentionCall(NamedTuple):
    """What Python knows of a call."""

    tensors: Tensors
    sizes: tuple[Any, ...]  # SIZES; left and right None for an open side
    flags: dict[str, Any]  # constexpr arguments that every kernel takes: D, D_v, BLOCK_D, BLOCK_DV, ...
    B: int
    H: int
    H_kv: int
    M: int  # packed: of the longest sequence
    N: int
    D: int
    D_v: int
    packed: bool
    dtype: torch.dtype

    @property
    def widest(self) -> int:
        """The padded width of the heads by which tiles are chosen."""
        return max(self.flags["BLOCK_D"], self.flags["BLOCK_DV"])

    @property
    def is_irregular(self) -> bool:
        """Whether addresses take more than strides of 16 bytes: packed, or rows that are not aligned."""
        strides = (stride for rows in self.tensors[:3] for stride in rows[1:4])
        return self.packed or math.gcd(*strides) * self.dtype.itemsize % 16 != 0

    @property
    def kind(self) -> str:
        """What lies between products and weights beside a scale, and beside hidden keys in whole blocks.

        "plain": nothing; "light": nothing of single scores but dropout; "masked": of these a mask, and no
        dropout; "more": other things of single scores.
        """
        t = self.tensors
        if t.bias is not None or t.relative_bias_ptr is not None:
            return "more"
        if t.mask is not None:
            return "more" if t.seed_ptr is not None else "masked"
        others = (t.key_mask, t.padding, t.softcap, t.seed_ptr)
        return "plain" if all(other is None for other in others) else "light"

    @property
    def sides(self) -> int:
        """How many ends of a query's keys a window or causality bounds, or as many as have its registers."""
        sides = sum(side is not None for side in self.sizes[4:6])
        # Where heads end takes registers too: at D = 128 on sm_90 lengths spill 40 bytes ahead, 16 with one
        # side.
        if self.packed:
            return max(sides, 1)
        return sides if self.tensors.lengths_ptr is None else 2


def with_contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


# Tiles have at most 256 rows, and less than this in each.
_FAR = 2**31 // 512


def rows_of(tensor: torch.Tensor) -> Rows:
    """Of [B, H, M, width], or of packed [total, H, width], with contiguous columns."""
    if tensor.dim() == 3:
        stride_b, stride_h, stride_m = 0, tensor.stride(1), tensor.stride(0)
    else:
        stride_b, stride_h, stride_m = tensor.stride(0), tensor.stride(1), tensor.stride(2)
    far = 1 if stride_m >= _FAR else None
    return Rows(tensor, stride_b, stride_h, stride_m, far)


def _broadcast_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(
        0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def scores_of(tensor: torch.Tensor | None) -> Scores | None:
    """Of a tensor [B or 1, H or 1, M or 1, N or 1]."""
    return None if tensor is None else Scores(tensor, *_broadcast_strides(tensor))


def stats_strides(stats: torch.Tensor) -> tuple[int, int]:
    """stride_b and stride_h of contiguous [B, H, M], or packed [H, total], row statistics."""
    return (0, stats.stride(0)) if stats.dim() == 2 else (stats.stride(0), stats.stride(1))


def block_width(width: int) -> int:
    """The power of two that a tile's columns are padded to; tensor cores take at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def _alignment(rows: tuple[Rows, ...], itemsize: int) -> int:
    """A power of two that divides the distances between rows, 16 bytes of elements at most; 1 where Triton
    sees as much by itself, which looks for a factor of 16."""
    common = math.gcd(*(stride for row in rows for stride in row[1:4]))
    return 1 if common % 16 == 0 else math.gcd(common, 16 // itemsize)


def attention_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    bias: torch.Tensor | None,
    relative_bias: torch.Tensor | None,
    sink: torch.Tensor | None,
    seed: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    lower_right: bool,
    softcap: float | None,
    dropout_p: float,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> AttentionCall:
    """The arguments of the raw operators (fastformer/ops/attention.py) as kernels take them.

    Nothing is copied but what must be: rows whose columns are not contiguous, and small strided vectors.
    """
    packed = cu_seqlens_q is not None
    if packed:
        assert cu_seqlens_k is not None and max_seqlen_q is not None and max_seqlen_k is not None
        B, M, N = cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k  # type: ignore[union-attr]
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()  # type: ignore[union-attr]
    else:
        B, M, N = query.shape[0], query.shape[2], key.shape[2]
    H, H_kv, D, D_v = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
    q, k, v = (rows_of(with_contiguous_rows(tensor)) for tensor in (query, key, value))
    per_key = mask is not None and mask.shape[2] == 1
    key_mask = padding = None
    if per_key:
        stride_b, stride_h, _, stride_n = _broadcast_strides(mask)  # type: ignore[arg-type]
        key_mask = KeyBits(mask, stride_b, stride_h, stride_n)
    if key_padding_mask is not None:
        padding = KeyBits(key_padding_mask, key_padding_mask.stride(0), 0, key_padding_mask.stride(1))
    if relative_bias is not None:
        relative_bias = with_contiguous_rows(relative_bias)
    threshold, dropout_scale = dropout_constants(dropout_p)
    # A negative scale turns the queries' sign and a vanishing one makes them 0, so that what a product counts
    # is positive: then the largest product has the largest weight, and -inf stays -inf.
    sign = 0 if abs(scale) * LOG2_E < torch.finfo(torch.float32).tiny else -1 if scale < 0 else 1
    tensors = Tensors(
        query=q,
        key=k,
        value=v,
        mask=None if per_key else scores_of(mask),
        key_mask=key_mask,
        padding=padding,
        lengths_ptr=None if key_lengths is None else key_lengths.contiguous(),
        bias=scores_of(bias),
        relative_bias_ptr=relative_bias,
        relative_bias_stride_h=0
        if relative_bias is None or relative_bias.shape[0] == 1
        else relative_bias.stride(0),
        sink_ptr=None if sink is None else sink.contiguous(),
        seed_ptr=seed if threshold else None,
        starts_q_ptr=cu_seqlens_q,
        starts_k_ptr=cu_seqlens_k,
        scale=abs(scale) if sign else 1.0,
        softcap=softcap,
        # Four chains spill 116 and 244 bytes there, which no tile of 13 did without.
        long_chains=1 if TARGET == "hip" and D > 128 else None,
        dropout_scale=dropout_scale,
    )
    # A side that is wider than all distances hides nothing, and its sums must not overflow.
    left, right = (None if side is None else min(side, M + N) for side in (left, right))
    flags = {
        "QUERY_SIGN": sign,
        "ALIGN": _alignment((q, k, v), query.element_size()),
        "D": D,
        "D_v": D_v,
        "BLOCK_D": block_width(D),
        "BLOCK_DV": block_width(D_v),
    }
    sizes = (M, N, H, H_kv, left, right, int(lower_right), threshold)
    return AttentionCall(tensors, sizes, flags, B, H, H_kv, M, N, D, D_v, packed, query.dtype)
