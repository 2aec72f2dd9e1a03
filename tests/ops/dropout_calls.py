"""Calls with dropout: what each operator keeps as its public function shows it, and calls to judge."""

from __future__ import annotations

import functools

import torch

import fastformer
from fastformer.testing import attention_inputs, feed_forward_inputs, norm_inputs

from . import philox, plain


def seed_tensor(seed):
    return torch.tensor([seed])


def dropout_of(p, *shape, seed=-0x123456789ABCDEF):
    """What fastformer.attention alone takes and what the plain formula alone takes; shape: [B, H, M, N]."""
    only = {"dropout_p": p, "seed": seed_tensor(seed)}
    return only, {"keep": philox.attention_keep(*shape, seed, p), "keep_scale": philox.keep_scale(p)}


def attention_scaled_keep(B, H, M, N, seed, p, *, backend=None, H_kv=None):
    """keep * scale [B, H, M, N]: every score is 0, so every weight is 1/N, and v is the identity times N."""
    query, key = torch.zeros(B, H, M, 4), torch.zeros(B, H_kv or H, N, 4)
    value = (torch.eye(N) * N).expand(B, H_kv or H, N, N)
    return fastformer.attention(query, key, value, dropout_p=p, seed=seed_tensor(seed), backend=backend)


def norm_scaled_keep(rows, columns, seed, p, *, backend=None):
    x, residual = torch.ones(rows, columns), torch.zeros(rows, columns)
    return fastformer.add_norm(x, residual, dropout_p=p, seed=seed_tensor(seed), backend=backend)[1]


def feed_forward_scaled_keep(rows, columns, seed, p, *, backend=None):
    return fastformer.feed_forward(
        torch.zeros(rows, 4),
        torch.zeros(columns, 4),
        torch.ones(columns),
        torch.eye(columns),
        None,
        activation="relu",
        dropout_p=p,
        seed=seed_tensor(seed),
        backend=backend,
    )


def assert_keeps(found, keep, p):
    assert torch.equal(found != 0, keep), f"{int(((found != 0) != keep).sum())} decisions differ"
    torch.testing.assert_close(found, keep * philox.keep_scale(p), rtol=1e-6, atol=0)


def dropout_calls(dtype, p, seed=4):
    """Name -> (function, plain, inputs, keep)."""
    attention = attention_inputs(B=2, H=4, H_kv=2, M=20, N=70, dtype=dtype, requires_grad=True)
    norm = norm_inputs(6, 5, 72, dtype=dtype, requires_grad=True)
    feed = feed_forward_inputs(6, 5, gated=True, dtype=dtype, requires_grad=True)
    attention_keep = philox.attention_keep(2, 4, 20, 70, seed, p)
    norm_keep = philox.norm_keep(30, 72, seed, p).view(6, 5, 72)
    feed_keep = philox.feed_forward_keep(30, 40, seed, p).view(6, 5, 40)
    padding = torch.arange(70) < torch.tensor([[70], [31]])
    weights = {"key_padding_mask": padding, "return_lse": True, "return_weights": True}
    mean = {"causal": "lower_right", "return_weights": "mean"}
    ff = fastformer.feed_forward
    return {
        "attention": (fastformer.attention, plain.attention, attention, attention_keep),
        "weights": (fastformer.attention, plain.attention, attention | weights, attention_keep),
        "mean weights": (fastformer.attention, plain.attention, attention | mean, attention_keep),
        "layer": (fastformer.add_norm, plain.add_norm, norm, norm_keep),
        "rms": (fastformer.add_norm, plain.add_norm, norm | {"kind": "rms"}, norm_keep),
        "feed_forward": (ff, plain.feed_forward, feed | {"activation": "geglu"}, feed_keep),
        "recompute": (
            functools.partial(ff, recompute=True),
            plain.feed_forward,
            feed | {"activation": "geglu"},
            feed_keep,
        ),
    }


CALLS = tuple(dropout_calls(torch.float32, 0.5))
