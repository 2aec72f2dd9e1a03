"""Every operator as a function of differentiable tensors alone, beside the plain formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastformer

from . import philox, plain

SEED = 21
B, H, M, N, D = 2, 2, 3, 4, 4
ROWS, E, WIDTH = 3, 4, 5

MASK = torch.tensor([[[[True, True, False, True]]], [[[True, False, True, True]]]])
ATTENTION = ((B, H, M, D), (B, H, N, D), (B, H, N, D))
FEED_FORWARD = ((ROWS, E), (WIDTH, E), (WIDTH,), (E, WIDTH), (E,))


@dataclass(frozen=True)
class Operator:
    ours: Callable
    plain: Callable
    shapes: tuple[tuple[int, ...], ...]
    # Whether a new leading dimension of every input is a batch, so that vmap may add it.
    batches: bool = True

    def inputs(self, dtype, batch=(), requires_grad=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        # Half a standard deviation: of larger numbers second derivatives have a tail so long that the one
        # draw with the largest of them is judged, and no other.
        return tuple(
            (torch.randn((*batch, *shape), generator=generator) / 2).to(dtype).requires_grad_(requires_grad)
            for shape in self.shapes
        )


def _dropout():
    return {"dropout_p": 0.5, "seed": torch.tensor([SEED])}


def _dropped(keep):
    return {"keep": keep, "keep_scale": 2.0}


def _with_all(attention):
    def call(q, k, v, bias, relative_bias, sink):
        return attention(
            q,
            k,
            v,
            mask=MASK,
            window=(2, 1),
            corner="lower_right",
            bias=bias,
            relative_bias=relative_bias,
            sink=sink,
            softcap=3.0,
            scale=0.7,
            return_lse=True,
        )

    return call


def _gated(feed_forward, activation, **more):
    return lambda x, w1, b1, w2, b2, w_gate, b_gate: feed_forward(
        x, w1, b1, w2, b2, activation=activation, w_gate=w_gate, b_gate=b_gate, **more
    )


_attention_keep = philox.attention_keep(B, H, M, N, SEED, 0.5)
_norm_keep = philox.norm_keep(ROWS, E, SEED, 0.5)
_feed_forward_keep = philox.feed_forward_keep(ROWS, WIDTH, SEED, 0.5)
GATED = (*FEED_FORWARD, (WIDTH, E), (WIDTH,))
NORM = ((ROWS, E), (ROWS, E), (E,), (E,))

OPERATORS = {
    "attention": Operator(fastformer.attention, plain.attention, ATTENTION),
    "attention, causal, mask": Operator(
        lambda q, k, v: fastformer.attention(q, k, v, causal="lower_right", mask=MASK),
        lambda q, k, v: plain.attention(q, k, v, causal="lower_right", mask=MASK),
        ATTENTION,
    ),
    "attention, all arguments": Operator(
        _with_all(fastformer.attention),
        _with_all(plain.attention),
        (*ATTENTION, (B, 1, M, N), (H, M + N - 1), (H,)),
    ),
    "attention, weights": Operator(
        lambda q, k, v: fastformer.attention(q, k, v, return_weights=True),
        lambda q, k, v: plain.attention(q, k, v, return_weights=True),
        ATTENTION,
    ),
    "attention, mean weights": Operator(
        lambda q, k, v: fastformer.attention(q, k, v, return_weights="mean"),
        lambda q, k, v: plain.attention(q, k, v, return_weights="mean"),
        ATTENTION,
    ),
    "attention, dropout": Operator(
        lambda q, k, v: fastformer.attention(q, k, v, **_dropout()),
        lambda q, k, v: plain.attention(q, k, v, **_dropped(_attention_keep)),
        ATTENTION,
        batches=False,
    ),
    "sdpa": Operator(
        lambda q, k, v, bias: fastformer.scaled_dot_product_attention(q, k, v, attn_mask=bias),
        lambda q, k, v, bias: plain.attention(q, k, v, bias=bias),
        (*ATTENTION, (M, N)),
    ),
    "layer_norm": Operator(
        lambda x, weight, bias: fastformer.layer_norm(x, (E,), weight, bias),
        lambda x, weight, bias: F.layer_norm(x, (E,), weight, bias),
        ((ROWS, E), (E,), (E,)),
    ),
    "rms_norm": Operator(
        lambda x, weight: fastformer.rms_norm(x, (E,), weight, 1e-5),
        lambda x, weight: F.rms_norm(x, (E,), weight, 1e-5),
        ((ROWS, E), (E,)),
    ),
    "add_norm": Operator(fastformer.add_norm, plain.add_norm, NORM),
    "add_norm, rms": Operator(
        lambda x, residual, weight, bias: fastformer.add_norm(x, residual, weight, bias, kind="rms"),
        lambda x, residual, weight, bias: plain.add_norm(x, residual, weight, bias, kind="rms"),
        NORM,
    ),
    "add_norm, dropout": Operator(
        lambda x, residual, weight, bias: fastformer.add_norm(x, residual, weight, bias, **_dropout()),
        lambda x, residual, weight, bias: plain.add_norm(x, residual, weight, bias, **_dropped(_norm_keep)),
        NORM,
        batches=False,
    ),
    "feed_forward": Operator(fastformer.feed_forward, plain.feed_forward, FEED_FORWARD),
    "feed_forward, swiglu": Operator(
        _gated(fastformer.feed_forward, "swiglu"), _gated(plain.feed_forward, "swiglu"), GATED
    ),
    "feed_forward, recompute": Operator(
        _gated(fastformer.feed_forward, "geglu_tanh", recompute=True),
        _gated(plain.feed_forward, "geglu_tanh"),
        GATED,
    ),
    "feed_forward, dropout": Operator(
        lambda *tensors: fastformer.feed_forward(*tensors, activation="silu", **_dropout()),
        lambda *tensors: plain.feed_forward(*tensors, activation="silu", **_dropped(_feed_forward_keep)),
        FEED_FORWARD,
        batches=False,
    ),
}


def as_tuple(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def called_operators(*graphs):
    """Names of everything that compiled graphs call, those nested in them too."""
    modules = (module for graph in graphs for module in graph.modules())
    nested = (module for module in modules if isinstance(module, torch.fx.GraphModule))
    return {str(node.target) for module in nested for node in module.graph.nodes}
