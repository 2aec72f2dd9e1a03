"""`judge` for attention, and the one error that the plain formula happens not to have."""

from __future__ import annotations

import torch

import fastformer
from fastformer.testing import cotangents, in_float64

from . import plain
from .judging import judge

# Where one key has most of a row's weight, dS = P (dP - delta) is the difference of two numbers that are
# nearly the same, the very same where it has all of it. The plain formula's delta is the sum of P dP, whose
# errors are dP's own and go with them: with one key it has no error at all. A kernel takes delta = do · out,
# D_v products whose sum rounds apart from dP's (of D_v = 16 and one key errors of 1.4e-6 were measured). So
# for such keys, and no other, the baseline is granted one float32 rounding of what is subtracted.
MOST_OF_THE_WEIGHT = 0.5
ROUNDING = torch.finfo(torch.float32).eps


def _rounded_scores(grad_out, grad_weights, query, key, value, bias=None, relative_bias=None, **arguments):
    """The sum of the scores of one padded call, each times what its gradient may lose."""
    weights = plain.attention(
        query, key, value, bias=bias, relative_bias=relative_bias, **arguments, return_weights=True
    )[1]
    groups = query.shape[1] // max(key.shape[1], 1)
    terms = grad_out.abs() @ value.abs().repeat_interleave(groups, 1).transpose(-1, -2)
    if grad_weights is not None:
        terms = terms + grad_weights.abs()
    lost = torch.where(weights > MOST_OF_THE_WEIGHT, ROUNDING * weights * terms, 0.0).detach()
    scale = arguments.get("scale")
    scores = query.abs() @ key.abs().repeat_interleave(groups, 1).transpose(-1, -2)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else abs(scale))
    if bias is not None:
        scores = scores + bias.nan_to_num(neginf=0.0)
    if relative_bias is not None:
        scores = scores + plain.toeplitz(relative_bias, *scores.shape[-2:])
    return (scores * lost).sum()


def rounding_of_heavy_keys(inputs, plain_only):
    """Gradient's name -> the error that it is granted, for the keys that have most of a row's weight."""
    inputs = in_float64(inputs)
    leaves = {name: t for name, t in inputs.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    wanted = [name for name in ("query", "key", "bias", "relative_bias") if name in leaves]
    if not wanted or 0 in inputs["query"].shape or 0 in inputs["key"].shape:
        return {}
    arguments = {**inputs, **in_float64(plain_only)}
    packed = arguments.get("cu_seqlens_q") is not None
    with torch.no_grad():
        results = (plain.packed_attention if packed else plain.attention)(**arguments)
    grads = cotangents(results if isinstance(results, tuple) else (results,))
    grad_weights = grads[-1] if arguments.pop("return_weights", False) else None
    if grad_weights is not None and grad_weights.dim() == 3:  # of the mean over heads
        grad_weights = grad_weights[:, None] / inputs["query"].shape[-2 if packed else 1]
    # Dropout's own scale: a kept weight's gradient is so much larger, a dropped one's is nothing.
    grad_out = grads[0] * arguments.pop("keep_scale", 1.0)
    for name in ("keep", "return_lse"):
        arguments.pop(name, None)
    total = (
        sum(_of_sequences(grad_out, grad_weights, arguments))
        if packed
        else _rounded_scores(grad_out, grad_weights, **arguments)
    )
    errors = torch.autograd.grad(total, [leaves[name] for name in wanted], allow_unused=True)
    return {f"d_{name}": error.abs() for name, error in zip(wanted, errors, strict=True) if error is not None}


def _of_sequences(grad_out, grad_weights, arguments):
    spans = arguments["cu_seqlens_q"].diff().tolist()
    pieces = zip(grad_out.split(spans), plain.sequences(**arguments), strict=True)
    for index, (grad, of_sequence) in enumerate(pieces):
        query, key = of_sequence["query"], of_sequence["key"]
        if 0 in query.shape or 0 in key.shape:
            continue
        weights = grad_weights
        if weights is not None:
            weights = weights[index : index + 1, :, : query.shape[2], : key.shape[2]]
        yield _rounded_scores(grad.transpose(0, 1)[None], weights, **of_sequence)


def judge_attention(inputs, **how):
    """`judge` of fastformer.attention, padded or packed."""
    packed = inputs.get("cu_seqlens_q") is not None
    formula = plain.packed_attention if packed else plain.attention
    return judge(fastformer.attention, formula, inputs, unavoidable=rounding_of_heavy_keys, **how)
