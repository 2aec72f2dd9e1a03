"""feed_forward with erf-GELU and SwiGLU: few tokens, where reading the weights is the cost, and many."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import fastformer
from benchmarks.case import Case, Grid, Rivals, forward, forward_and_backward, serving

OPERATORS = ("feed_forward", "feed_forward_training")


def cases(grid: Grid) -> list[Case]:
    return [
        _case(operator, *shape, dtype, grid.device)
        for operator in OPERATORS
        for shape in _shapes(grid, operator)
        for dtype in grid.dtypes
    ]


def _shapes(grid: Grid, operator: str) -> list[tuple[str, int, int, int]]:
    """Activation, tokens, width, hidden."""
    tokens = lambda count: grid.scaled(count, on_cuda=16)
    # A gated block of as many weights has two thirds of the hidden width.
    few, some, many = (
        [("gelu", tokens(count), width, 4 * width), ("swiglu", tokens(count), width, 8 * width // 3)]
        for count, width in ((32, 768), (256, 768), (2048, 384))
    )
    if grid.quick:
        return [("gelu", tokens(128), 384, 1536), ("swiglu", tokens(128), 384, 1024)]
    if grid.full:
        return [*few, *some, *many]
    return some if operator == "feed_forward_training" else [few[0], *some, many[0]]


def _case(
    operator: str, activation: str, tokens: int, width: int, hidden: int, dtype: torch.dtype, device: str
) -> Case:
    training = operator == "feed_forward_training"
    rivals = RIVALS[activation]

    def draw() -> tuple:
        generator = torch.Generator().manual_seed(0)
        x, grad_out = (torch.randn(tokens, width, generator=generator) for _ in range(2))
        # Weights of the size that nn.Linear gives them, so that GELU sees both of its branches.
        w1, w_gate = (torch.randn(hidden, width, generator=generator) / math.sqrt(width) for _ in range(2))
        w2 = torch.randn(width, hidden, generator=generator) / math.sqrt(hidden)
        b1, b2 = 0.1 * torch.randn(hidden, generator=generator), 0.1 * torch.randn(width, generator=generator)
        inputs = (x, w1, b1, w2, b2) if activation == "gelu" else (x, w1, w_gate, w2)
        inputs = tuple(tensor.to(device, dtype) for tensor in inputs)
        if not training:
            return inputs
        return *(tensor.requires_grad_() for tensor in inputs), grad_out.to(device, dtype)

    products = 2 if activation == "gelu" else 3
    return Case(
        operator=operator,
        name=f"{activation} {tokens}x{width}x{hidden}",
        dtype=dtype,
        contenders=rivals.contenders(rivals.torch, forward_and_backward if training else forward),
        draw=draw,
        needs_grad=training,
        backend=serving(rivals.fastformer, backward=training),
        # Each product of forward has two in backward, one for either factor's gradient.
        flops=(3 if training else 1) * products * 2 * tokens * width * hidden,
    )


def gelu_naive(x, w1, b1, w2, b2):
    hidden = x @ w1.T + b1
    hidden = 0.5 * hidden * (1 + torch.erf(hidden * math.sqrt(0.5)))
    return hidden @ w2.T + b2


def swiglu_naive(x, w1, w_gate, w2):
    gate = x @ w_gate.T
    return (gate * torch.sigmoid(gate) * (x @ w1.T)) @ w2.T


RIVALS = {
    "gelu": Rivals(
        naive=gelu_naive,
        torch=lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
        fastformer=fastformer.feed_forward,
    ),
    "swiglu": Rivals(
        naive=swiglu_naive,
        torch=lambda x, w1, w_gate, w2: F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w1), w2),
        fastformer=lambda x, w1, w_gate, w2: fastformer.feed_forward(
            x, w1, None, w2, None, activation="swiglu", w_gate=w_gate
        ),
    ),
}


def bench_feed_forward(take):
    take()
