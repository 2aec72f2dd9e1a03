"""feed_forward forward with erf-GELU: few tokens, where reading the weights is the cost, and many."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import fastformer
from benchmarks.case import Case, Grid, Rivals, compiled

OPERATORS = ("feed_forward",)


def cases(grid: Grid) -> list[Case]:
    shapes = [("bert-base", 32, 768, 3072), ("bert-base", 256, 768, 3072), ("minilm", 2048, 384, 1536)]
    if grid.quick:
        shapes = [("minilm", 128, 384, 1536)]
    return [
        _case(label, grid.scaled(tokens, on_cuda=16), width, hidden, dtype, grid.device)
        for label, tokens, width, hidden in shapes
        for dtype in grid.dtypes
    ]


def _case(label: str, tokens: int, width: int, hidden: int, dtype: torch.dtype, device: str) -> Case:
    def draw() -> tuple:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, width, generator=generator)
        # Weights of the size that nn.Linear gives them, so that GELU sees both of its branches.
        w1 = torch.randn(hidden, width, generator=generator) / math.sqrt(width)
        w2 = torch.randn(width, hidden, generator=generator) / math.sqrt(hidden)
        b1, b2 = 0.1 * torch.randn(hidden, generator=generator), 0.1 * torch.randn(width, generator=generator)
        return tuple(tensor.to(device, dtype) for tensor in (x, w1, b1, w2, b2))

    return Case(
        operator="feed_forward",
        name=f"{label} {tokens}x{width}x{hidden}",
        dtype=dtype,
        contenders={
            "naive": RIVALS.naive,
            "torch": RIVALS.torch,
            "compile": compiled(RIVALS.torch),
            "fastformer": RIVALS.fastformer,
        },
        draw=draw,
        backend=RIVALS.backend,
        flops=4 * tokens * width * hidden,
    )


def feed_forward_naive(x, w1, b1, w2, b2):
    hidden = x @ w1.T + b1
    hidden = 0.5 * hidden * (1 + torch.erf(hidden * math.sqrt(0.5)))
    return hidden @ w2.T + b2


RIVALS = Rivals(
    naive=feed_forward_naive,
    torch=lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
    fastformer=fastformer.feed_forward,
    backend=lambda *inputs: fastformer.explain(fastformer.feed_forward, *inputs).backend,
)


def bench_feed_forward(take):
    take()
