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


def toeplitz(relative_bias, M, N):
    """[H or 1, M, N]: entry j - i + M - 1 at (i, j)."""
    device = relative_bias.device
    return relative_bias[:, torch.arange(N, device=device) - torch.arange(M, device=device)[:, None] + M - 1]


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
        scores = scores + toeplitz(relative_bias, M, N)
    scores = torch.where(allowed, scores, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[None, :, None, None].expand(B, H, M, 1)], -1)

    # A row without any finite score would make its softmax and that softmax's gradient NaN.
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    alive = torch.where(dead, 0.0, scores)
    if scores.shape[-1]:
        weights = torch.where(dead, 0.0, alive.softmax(-1))
        # Of scores near finfo.min, where lse is the largest of them, logsumexp's own gradient is 1 for each.
        pivot = alive.detach().amax(-1, keepdim=True)
        lse = torch.where(dead, -torch.inf, pivot + (alive - pivot).logsumexp(-1, keepdim=True))[..., 0]
    else:
        weights, lse = scores, scores.new_full(scores.shape[:-1], -torch.inf)
    weights = weights[..., :N]
    if keep is not None:
        weights = torch.where(keep, weights * keep_scale, 0.0)

    weights = weights.to(value.dtype)  # float32 where the bias is and query is not
    results = [weights @ value]
    if return_lse:
        results.append(lse if lse.dtype == torch.float64 else lse.float())
    if return_weights == "mean":
        results.append(weights.mean(1) if H else weights.sum(1))  # of no heads: nothing, not NaN
    elif return_weights:
        results.append(weights)
    return results[0] if len(results) == 1 else tuple(results)


def sequences(query, key, value, *, cu_seqlens_q, cu_seqlens_k, mask=None, bias=None, **arguments):
    """The arguments of `attention` for each packed sequence. query [total, H, D]; mask and bias are of the
    longest sequences, [S, H, max M, max N]; `keep` lists a [1, H, M, N] for each sequence."""
    spans_q, spans_k = (list(pairwise(starts.tolist())) for starts in (cu_seqlens_q, cu_seqlens_k))
    longest_q, longest_k = (
        max((end - start for start, end in spans), default=0) for spans in (spans_q, spans_k)
    )
    shape = (len(spans_q), query.shape[1], longest_q, longest_k)
    mask, bias = (t if t is None else t.expand(shape) for t in (mask, bias))
    for index, ((m0, m1), (n0, n1)) in enumerate(zip(spans_q, spans_k, strict=True)):
        rows, columns = m1 - m0, n1 - n0
        of_sequence = dict(arguments)
        for name, tensor in (("query", query[m0:m1]), ("key", key[n0:n1]), ("value", value[n0:n1])):
            of_sequence[name] = tensor.transpose(0, 1)[None]
        for name, tensor in (("mask", mask), ("bias", bias)):
            if tensor is not None:
                of_sequence[name] = tensor[index : index + 1, :, :rows, :columns]
        if arguments.get("relative_bias") is not None:
            # Entry (j - i + longest_q - 1), so a shorter sequence reads from further in.
            first = longest_q - rows
            of_sequence["relative_bias"] = arguments["relative_bias"][
                :, first : first + max(rows + columns - 1, 0)
            ]
        if arguments.get("keep") is not None:
            of_sequence["keep"] = arguments["keep"][index]
        yield of_sequence


def packed_attention(query, key, value, *, return_lse=False, return_weights=False, **arguments):
    """Sequence after sequence; weights are of the longest sequences, with zeros beyond the others' ends."""
    outs, lses, all_weights = [], [], []
    for of_sequence in sequences(query, key, value, **arguments):
        results = attention(**of_sequence, return_lse=True, return_weights=return_weights or True)
        out, lse, weights = results
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
        all_weights.append(weights)
    results = [torch.cat(outs) if outs else query.new_zeros(*query.shape[:2], value.shape[-1])]
    if return_lse:
        results.append(torch.cat(lses, 1))
    if return_weights:
        longest_q, longest_k = (max(w.shape[dim] for w in all_weights) for dim in (-2, -1))
        results.append(
            torch.cat(
                [F.pad(w, (0, longest_k - w.shape[-1], 0, longest_q - w.shape[-2])) for w in all_weights]
            )
        )
    return results[0] if len(results) == 1 else tuple(results)


def paged_attention(
    query,
    key_pages,
    value_pages,
    page_table,
    lengths,
    *,
    causal=True,
    window=None,
    softcap=None,
    sink=None,
    scale=None,
    return_lse=False,
):
    """Batch element after batch element, on its own keys, fetched from their places one by one."""
    S = key_pages.shape[1]
    results = []
    for b, length in enumerate(lengths.tolist()):
        places = [(int(page_table[b, n // S]), n % S) for n in range(length)]
        key, value = (
            torch.stack([cache.new_zeros(cache.shape[2:]), *(cache[place] for place in places)], 1)[:, 1:]
            for cache in (key_pages, value_pages)
        )  # [H_kv, N, D]
        results.append(
            attention(
                query[b : b + 1],
                key[None],
                value[None],
                causal="lower_right" if causal else False,
                window=window,
                corner="lower_right",
                softcap=softcap,
                sink=sink,
                scale=scale,
                return_lse=True,
            )
        )
    out, lse = (torch.cat(parts) for parts in zip(*results, strict=True))
    return (out, lse) if return_lse else out


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
