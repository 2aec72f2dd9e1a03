"""The meaning of every operator, in plain PyTorch: what docs/contract.md says, as code.

The functions here are differentiable compositions of torch operators, so that autograd, forward mode,
vmap and double backward of any order come from torch itself. 16-bit inputs are computed in float32,
float64 stays float64. Nothing here is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..specs import AttentionSpec, FeedForwardSpec, NormSpec, PagedAttentionSpec
from .philox import dropout_scale, keep_consecutive, keep_fragments


def ready() -> str | None:
    return None


def why_not(op: str, spec: Any, tensors: tuple[Tensor | None, ...]) -> str | None:
    return None


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def vjp_at(
    function: Callable[..., Any], arguments: Sequence[Any], places: Sequence[int]
) -> tuple[Any, Callable[[Any], tuple[Tensor | None, ...]]]:
    """function(*arguments), and the pullback to its arguments: a gradient at `places`, None elsewhere."""

    def of_places(*inputs: Tensor) -> Any:
        replaced = list(arguments)
        for place, tensor in zip(places, inputs, strict=True):
            replaced[place] = tensor
        return function(*replaced)

    outputs, pull = torch.func.vjp(of_places, *[arguments[place] for place in places])[:2]

    def gradients(cotangents: Any) -> tuple[Tensor | None, ...]:
        by_place = dict(zip(places, pull(cotangents), strict=True))
        return tuple(by_place.get(place) for place in range(len(arguments)))

    return outputs, gradients


def _unpack(packed: Tensor, sequence: Tensor, position: Tensor, count: int, longest: int) -> Tensor:
    """[total, H, D] to [S, H, longest, D], zeros beyond each sequence's end."""
    padded = packed.new_zeros(count, longest, *packed.shape[1:])
    return padded.index_put((sequence, position), packed).transpose(1, 2)


def _places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of every packed token: its sequence, and its position there."""
    token = torch.arange(total, device=cu_seqlens.device)
    bounds = cu_seqlens.long()
    sequence = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
    return sequence, token - bounds[sequence]


def _visible(
    spec: AttentionSpec,
    shape: tuple[int, int, int, int],
    device: torch.device,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    lengths_q: Tensor | None,
    lengths_k: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """visible [B or 1, H or 1, M, N], and alive [B or 1, H or 1, 1, N]: keys not masked for every query."""
    _, _, M, N = shape
    j = torch.arange(N, device=device)
    alive = None
    if key_padding_mask is not None:
        alive = key_padding_mask[:, None, None, :]
    if lengths_k is not None:
        real = (j < lengths_k[:, None])[:, None, None, :]
        alive = real if alive is None else alive & real
    visible = torch.ones(1, 1, M, N, dtype=torch.bool, device=device)
    if spec.left is not None or spec.right is not None:
        distance = (j - torch.arange(M, device=device)[:, None])[None, None]  # [1, 1, M, N]
        if spec.lower_right and lengths_q is not None:
            assert lengths_k is not None
            distance = distance - (lengths_k - lengths_q)[:, None, None, None]
        elif spec.lower_right:
            distance = distance - (N - M)
        if spec.left is not None:
            visible = visible & (distance >= -spec.left)
        if spec.right is not None:
            visible = visible & (distance <= spec.right)
    if mask is not None:
        if mask.shape[-2] == 1:
            alive = mask if alive is None else alive & mask
        else:
            visible = visible & mask
    if alive is not None:
        visible = visible & alive
    if lengths_q is not None:
        visible = visible & (torch.arange(M, device=device)[:, None] < lengths_q[:, None, None, None])
    return visible, alive


def _relative_bias_matrix(relative_bias: Tensor, M: int, N: int) -> Tensor:
    """The Toeplitz matrix [1, H or 1, M, N] whose (i, j) is entry j - i + M - 1."""
    i = torch.arange(M, device=relative_bias.device)[:, None]
    j = torch.arange(N, device=relative_bias.device)
    return relative_bias[:, j - i + M - 1][None]


def attention(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    key_lengths: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse, and the weights that `spec.return_weights` names, or None."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _attention_padded(
            spec,
            query,
            key,
            value,
            mask,
            key_padding_mask,
            None,
            key_lengths,
            bias,
            relative_bias,
            sink,
            seed,
        )
    assert spec.max_seqlen_q is not None and spec.max_seqlen_k is not None
    places_q = _places(cu_seqlens_q, query.shape[0])
    places_k = _places(cu_seqlens_k, key.shape[0])
    count = cu_seqlens_q.shape[0] - 1
    out, lse, weights = _attention_padded(
        spec,
        _unpack(query, *places_q, count, spec.max_seqlen_q),
        _unpack(key, *places_k, count, spec.max_seqlen_k),
        _unpack(value, *places_k, count, spec.max_seqlen_k),
        mask,
        None,
        cu_seqlens_q.diff(),
        cu_seqlens_k.diff(),
        bias,
        relative_bias,
        sink,
        seed,
    )
    # [S, H, M, ...] back to [total, H, ...], and lse to [H, total].
    return out.transpose(1, 2)[places_q], lse.transpose(1, 2)[places_q].transpose(0, 1), weights


def _attention_padded(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    lengths_q: Tensor | None,
    lengths_k: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    B, H, M, _ = query.shape
    N = key.shape[2]
    compute = _compute_dtype(query.dtype)
    visible, alive = _visible(spec, (B, H, M, N), query.device, mask, key_padding_mask, lengths_q, lengths_k)

    groups = H // max(key.shape[1], 1)
    q = query.to(compute)  # [B, H, M, D]
    k = key.to(compute).repeat_interleave(groups, 1)  # [B, H, N, D]
    v = value.to(compute).repeat_interleave(groups, 1)  # [B, H, N, D_v]
    if alive is not None:
        # A key that no query sees may hold NaN, which 0 * NaN would spread.
        k = torch.where(alive.transpose(-1, -2), k, 0)
        v = torch.where(alive.transpose(-1, -2), v, 0)

    scores = spec.scale * (q @ k.transpose(-1, -2))  # [B, H, M, N]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if bias is not None:
        scores = scores + bias.to(compute)
    if relative_bias is not None:
        scores = scores + _relative_bias_matrix(relative_bias.to(compute), M, N)
    scores = torch.where(visible, scores, float("-inf"))

    # The pivot is any constant: log(sum(exp(s - c))) + c does not depend on c. A row that sees
    # nothing has the maximum -inf: pivot on 0, or -inf - -inf makes NaN.
    pivot = F.pad(scores.detach(), (0, 1), value=float("-inf")).amax(-1, keepdim=True)  # [B, H, M, 1]
    sink_logit = None
    if sink is not None:
        sink_logit = sink.to(compute)[None, :, None, None]
        pivot = torch.maximum(pivot, sink_logit.detach())
    pivot = torch.where(pivot == float("-inf"), 0, pivot)
    exponentials = torch.exp(scores - pivot)
    row_sum = exponentials.sum(-1, keepdim=True)  # [B, H, M, 1]
    if sink_logit is not None:
        row_sum = row_sum + torch.exp(sink_logit - pivot)
    empty = row_sum == 0
    safe_sum = torch.where(empty, 1, row_sum)
    weights = exponentials / safe_sum
    lse = torch.where(empty, float("-inf"), pivot + torch.log(safe_sum)).squeeze(-1)

    if spec.dropout_p > 0:
        assert seed is not None
        keep = keep_fragments(
            seed,
            spec.dropout_p,
            torch.arange(M, device=query.device),
            torch.arange(B * H, device=query.device)[:, None],
            0,
            N,
        ).view(B, H, M, N)
        weights = torch.where(keep, weights * dropout_scale(spec.dropout_p), 0)
    out = (weights @ v).to(query.dtype)
    if spec.return_weights is None:
        return out, lse, None
    returned = weights.sum(1) / max(H, 1) if spec.return_weights == "mean" else weights
    return out, lse, returned.to(query.dtype)


def attention_bwd(
    spec: AttentionSpec,
    needs: tuple[bool, ...],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    *tensors: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, relative_bias and sink, None where there is no need of one."""
    places = (0, 1, 2, 6, 7, 8)  # in ATTENTION_TENSORS
    needed = [p for p, need in zip(places, needs, strict=True) if need and tensors[p] is not None]

    def outputs(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(output for output in attention(spec, *tensors) if output is not None)  # type: ignore[arg-type]

    primals, pull = vjp_at(outputs, tensors, needed)
    cotangents = (grad_out, grad_lse, grad_weights)[: len(primals)]
    grads = pull(tuple(map(_given, cotangents, primals)))
    return tuple(grads[place] for place in places)


def _given(grad: Tensor | None, output: Tensor) -> Tensor:
    return torch.zeros_like(output) if grad is None else grad


def paged_attention(
    spec: PagedAttentionSpec,
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out, lse: attention of a padded batch of which every element has the corner of its own length."""
    M, (P, S) = query.shape[2], key_pages.shape[:2]
    # Past a sequence's last page the table may hold anything; what is no page's number counts as the last.
    pages = torch.where((page_table >= 0) & (page_table < P), page_table, P - 1).long()
    key, value = (cache[pages].flatten(1, 2).transpose(1, 2) for cache in (key_pages, value_pages))
    lengths_k = lengths.long().clamp(0, page_table.shape[1] * S)
    asked = AttentionSpec(spec.scale, spec.left, spec.right, True, spec.softcap)
    out, lse, _ = _attention_padded(
        asked, query, key, value, None, None, torch.full_like(lengths_k, M), lengths_k, None, None, sink, None
    )
    return out, lse


def norm(
    spec: NormSpec,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """norm(residual + dropout(x)) and residual + dropout(x), both in promote_types(x, residual)."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    s = x.to(_compute_dtype(dtype))
    if spec.dropout_p > 0:
        assert seed is not None
        rows = x[..., 0].numel() if x.shape[-1] else 0
        keep = keep_consecutive(seed, spec.dropout_p, rows, x.shape[-1]).view(x.shape)
        s = torch.where(keep, s * dropout_scale(spec.dropout_p), 0)
    if residual is not None:
        s = residual.to(s.dtype) + s
    s = s.to(dtype)
    # A view: autograd then adds up the norm's gradients, which cancel where a row is nearly constant, before
    # the sum's own gradient comes in.
    normed = _norm_of(spec, s.view_as(s).to(_compute_dtype(dtype)), weight, bias)
    return normed.to(dtype), s


def _norm_of(spec: NormSpec, s: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Ba et al. 2016 (layer) and Zhang & Sennrich 2019 (rms), over the last dimension."""
    centred = s - s.mean(-1, keepdim=True) if spec.kind == "layer" else s
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + spec.eps)
    if weight is not None:
        out = out * weight.to(s.dtype)
    if bias is not None:
        out = out + bias.to(s.dtype)
    return out


def norm_bwd(
    spec: NormSpec,
    grad_out: Tensor,
    grad_sum: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the saved sum s: ds, dx (empty without dropout), dweight and dbias (empty where not needed)."""
    wide = s.to(_compute_dtype(s.dtype))
    ones = wide.new_ones(s.shape[-1]) if weight is None else weight.to(wide.dtype)
    pull = torch.func.vjp(partial(_norm_of, spec), wide, ones, torch.zeros_like(ones))[1]
    ds, dweight, dbias = pull(grad_out.to(wide.dtype))
    if grad_sum is not None:
        ds = ds + grad_sum.to(wide.dtype)
    empty = wide.new_empty(0)
    dx = empty.to(s.dtype)
    if spec.dropout_p > 0:
        assert seed is not None
        keep = keep_consecutive(seed, spec.dropout_p, s[..., 0].numel(), s.shape[-1]).view(s.shape)
        dx = torch.where(keep, ds * dropout_scale(spec.dropout_p), 0).to(s.dtype)
    return ds.to(s.dtype), dx, dweight if need_dweight else empty, dbias if need_dbias else empty


def _activate(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return torch.relu(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "silu":
        return F.silu(x)
    assert name == "relu2"
    return torch.relu(x).square()


def feed_forward(
    spec: FeedForwardSpec,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """Products in x's dtype (accumulated in float32 by the library that multiplies), the rest in float32."""
    compute = _compute_dtype(x.dtype)
    hidden = F.linear(x, w1, b1).to(compute)  # [..., F]
    if spec.gated:
        assert w_gate is not None
        hidden = _activate(spec.activation, F.linear(x, w_gate, b_gate).to(compute)) * hidden
    else:
        hidden = _activate(spec.activation, hidden)
    if spec.dropout_p > 0:
        assert seed is not None
        rows = hidden[..., 0].numel()
        row = torch.arange(rows, device=x.device)
        keep = keep_fragments(seed, spec.dropout_p, row, torch.zeros_like(row), 2, w1.shape[0])
        hidden = torch.where(keep.view(hidden.shape), hidden * dropout_scale(spec.dropout_p), 0)
    return F.linear(hidden.to(x.dtype), w2, b2)


def feed_forward_bwd(
    spec: FeedForwardSpec,
    needs: tuple[bool, ...],
    grad_out: Tensor,
    pre: Tensor,
    pre_gate: Tensor,
    *tensors: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w_gate, b_gate, w2, b2, None where there is no need; recomputes from x."""
    needed = [p for p, need in enumerate(needs) if need and tensors[p] is not None]
    return vjp_at(partial(feed_forward, spec), tensors, needed)[1](grad_out)[:-1]
