"""The operators' meaning once more, from docs/contract.md alone, as naive compositions of torch's functions.

In float64 these are the oracle of the reference backend; in the dtype under test they are the baseline that
every other backend's accuracy is measured by. They share nothing with fastformer.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F


def attention_allowed(M, N, *, causal=False, window=None, corner=None, device="cpu"):
    """Bool [M, N]: what `causal`, `window` and `corner` leave visible."""
    if causal in ("upper_left", "lower_right"):
        corner = causal
    offset = N - M if corner == "lower_right" else 0
    distance = torch.arange(N, device=device)[None, :] - torch.arange(M, device=device)[:, None] - offset
    allowed = torch.ones(M, N, dtype=torch.bool, device=device)
    if causal:
        allowed &= distance <= 0
    if window is not None:
        left, right = window
        if left is not None:
            allowed &= distance >= -left
        if right is not None:
            allowed &= distance <= right
    return allowed


def attention(
    query,
    key,
    value,
    *,
    mask=None,
    key_padding_mask=None,
    key_lengths=None,
    causal=False,
    window=None,
    corner=None,
    bias=None,
    relative_bias=None,
    softcap=None,
    sink=None,
    scale=None,
    keep=None,
    keep_scale=1.0,
    return_lse=False,
    return_weights=False,
):
    """`fastformer.attention`, but dropout comes as what it decided: `keep` [B, H, M, N] and `keep_scale`."""
    (B, H, M, D), N = query.shape, key.shape[-2]
    device = query.device
    key, value = (t.repeat_interleave(H // t.shape[1], 1) if t.shape[1] else t for t in (key, value))

    allowed = attention_allowed(M, N, causal=causal, window=window, corner=corner, device=device)
    allowed = allowed.expand(B, H, M, N)
    # A key that no query may see, whatever it holds, must not even be multiplied by 0.
    hidden = torch.zeros(B, H, N, dtype=torch.bool, device=device)
    if mask is not None:
        allowed = allowed & mask
        hidden = hidden | ~mask.expand(B, H, M, N).any(2)
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None, :]
        hidden = hidden | ~key_padding_mask[:, None, :]
    if key_lengths is not None:
        real = torch.arange(N, device=device)[None, :] < key_lengths[:, None]
        allowed = allowed & real[:, None, None, :]
        hidden = hidden | ~real[:, None, :]
    key, value = (torch.where(hidden[..., None], 0.0, t) for t in (key, value))

    scores = query @ key.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if relative_bias is not None:
        index = torch.arange(N, device=device)[None, :] - torch.arange(M, device=device)[:, None] + M - 1
        scores = scores + relative_bias[:, index]
    scores = torch.where(allowed, scores, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[None, :, None, None].expand(B, H, M, 1)], -1)

    # A row without any finite score would make its softmax and that softmax's gradient NaN.
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    alive = torch.where(dead, 0.0, scores)
    if scores.shape[-1]:
        weights = torch.where(dead, 0.0, alive.softmax(-1))
        lse = torch.where(dead[..., 0], -torch.inf, alive.logsumexp(-1))
    else:
        weights, lse = scores, torch.full(scores.shape[:-1], -torch.inf, dtype=scores.dtype)
    weights = weights[..., :N]
    if keep is not None:
        weights = torch.where(keep, weights * keep_scale, 0.0)

    results = [weights.to(value.dtype) @ value]
    if return_lse:
        results.append(lse if lse.dtype == torch.float64 else lse.float())
    if return_weights == "mean":
        results.append(weights.mean(1))
    elif return_weights:
        results.append(weights)
    return results[0] if len(results) == 1 else tuple(results)


def packed_attention(
    query,
    key,
    value,
    *,
    cu_seqlens_q,
    cu_seqlens_k,
    relative_bias=None,
    keep=None,
    return_lse=False,
    **arguments,
):
    """Sequence after sequence. query [total, H, D]; `keep` lists a [1, H, M, N] for each sequence."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    longest_q = max((b - a for a, b in pairwise(starts_q)), default=0)
    outs, lses = [], []
    for index, ((m0, m1), (n0, n1)) in enumerate(zip(pairwise(starts_q), pairwise(starts_k), strict=True)):
        rows, columns = m1 - m0, n1 - n0
        if relative_bias is not None:
            # Entry (j - i + longest_q - 1), so a shorter sequence reads from further in.
            first = longest_q - rows
            arguments["relative_bias"] = relative_bias[:, first : first + max(rows + columns - 1, 0)]
        if keep is not None:
            arguments["keep"] = keep[index]
        q, k, v = (t.transpose(0, 1)[None] for t in (query[m0:m1], key[n0:n1], value[n0:n1]))
        out, lse = attention(q, k, v, return_lse=True, **arguments)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    out = torch.cat(outs) if outs else query.new_zeros(*query.shape[:2], value.shape[-1])
    return (out, torch.cat(lses, 1)) if return_lse else out


def norm(s, weight=None, bias=None, *, kind="layer", eps=1e-5):
    shape = s.shape[-1:]
    weight, bias = (t if t is None else t.to(s.dtype) for t in (weight, bias))
    if kind == "layer":
        return F.layer_norm(s, shape, weight, bias, eps)
    normed = F.rms_norm(s, shape, weight, eps)
    return normed if bias is None else normed + bias


def add_norm(x, residual, weight=None, bias=None, *, kind="layer", eps=1e-5, keep=None, keep_scale=1.0):
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if keep is not None:
        x = torch.where(keep, x * keep_scale, 0.0)
    s = residual.to(dtype) + x.to(dtype)
    return norm(s, weight, bias, kind=kind, eps=eps), s


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x) ** 2,
}
GATED_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def feed_forward(
    x, w1, b1, w2, b2, *, activation="gelu", w_gate=None, b_gate=None, keep=None, keep_scale=1.0
):
    hidden = F.linear(x, w1, b1)
    if activation in GATED_ACTIVATIONS:
        hidden = ACTIVATIONS[GATED_ACTIVATIONS[activation]](F.linear(x, w_gate, b_gate)) * hidden
    else:
        hidden = ACTIVATIONS[activation](hidden)
    if keep is not None:
        hidden = torch.where(keep, hidden * keep_scale, 0.0)
    return F.linear(hidden, w2, b2)
