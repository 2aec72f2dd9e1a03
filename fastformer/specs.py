"""What is asked of an operator, apart from its tensors: hashable, validated, one normal form.

Public functions build these once per call; dispatch and every backend read them. The order of an
operator's tensors is fixed here too, so that all floors pass them positionally.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Key j is visible to query i iff -left <= j - i - offset <= right, where offset is N - M when
    `lower_right` and 0 otherwise, and None leaves that side open. Causal is right = 0."""

    scale: float
    left: int | None = None
    right: int | None = None
    lower_right: bool = False
    softcap: float | None = None
    dropout_p: float = 0.0
    # Packed sequences only: the longest sequence's M and N.
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    # None, "per_head" or "mean".
    return_weights: str | None = None


ATTENTION_TENSORS = (
    "query",  # [B, H, M, D], or packed [total, H, D]
    "key",  # [B, H_kv, N, D]
    "value",  # [B, H_kv, N, D_v]
    "mask",  # bool, broadcastable to [B, H, M, N], True = may attend
    "key_padding_mask",  # bool [B, N], True = real token
    "key_lengths",  # int32 or int64 [B]
    "bias",  # float, broadcastable to [B, H, M, N]
    "relative_bias",  # float [H or 1, M + N - 1]
    "sink",  # float [H]
    "seed",  # int64 [1]
    "cu_seqlens_q",  # int32 [S + 1]
    "cu_seqlens_k",  # int32 [S + 1]
)


@dataclass(frozen=True, slots=True)
class PagedAttentionSpec:
    """As AttentionSpec, with the corner of each batch element's own length: key j is visible to query i iff
    -left <= j - i - (length - M) <= right."""

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float | None = None


PAGED_ATTENTION_TENSORS = (
    "query",  # [B, H, M, D]
    "key_pages",  # [P, S, H_kv, D]
    "value_pages",  # [P, S, H_kv, D_v]
    "page_table",  # int32 [B, pages]
    "lengths",  # int32 or int64 [B]
    "sink",  # float [H]
)


@dataclass(frozen=True, slots=True)
class NormSpec:
    """norm over the last dimension; `kind` is "layer" or "rms"."""

    kind: str
    eps: float
    dropout_p: float = 0.0


# x [..., C] and residual [..., C] (None: plain norm of x), weight [C], bias [C], seed int64 [1].
NORM_TENSORS = ("x", "residual", "weight", "bias", "seed")


@dataclass(frozen=True, slots=True)
class FeedForwardSpec:
    """`activation` is the ungated name (relu, gelu, gelu_tanh, silu, relu2); with `gated` the hidden
    row is activation(x @ w_gate.T + b_gate) * (x @ w1.T + b1)."""

    activation: str
    gated: bool = False
    dropout_p: float = 0.0
    recompute: bool = False


# x [..., E], w1 [F, E], b1 [F], w_gate [F, E], b_gate [F], w2 [E_out, F], b2 [E_out], seed int64 [1].
FEED_FORWARD_TENSORS = ("x", "w1", "b1", "w_gate", "b_gate", "w2", "b2", "seed")

TENSORS = {
    "attention": ATTENTION_TENSORS,
    "paged_attention": PAGED_ATTENTION_TENSORS,
    "norm": NORM_TENSORS,
    "feed_forward": FEED_FORWARD_TENSORS,
}
# Operators that have a forward direction alone.
WITHOUT_GRADIENT = ("paged_attention",)
