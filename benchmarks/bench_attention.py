"""Attention forward: full, causal and with padding, on the shapes of MiniLM, BERT-base and a long one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastformer
from benchmarks.case import Case, Grid, Rivals, compiled

OPERATORS = ("attention",)


def cases(grid: Grid) -> list[Case]:
    shapes = {
        "minilm": (grid.scaled(16, on_cuda=16), 12, 128, 32),
        "bert-base": (grid.scaled(4, on_cuda=16), 12, 512, 64),
        "long": (grid.scaled(2, on_cuda=16), 4, 2048, 64),
    }
    if grid.quick:
        shapes = {"minilm": (grid.scaled(4, on_cuda=16), 12, 128, 32)}
    return [
        _case(f"{kind} {label}", kind, shape, dtype, grid.device)
        for label, shape in shapes.items()
        for kind in ("full", "causal", "padded")
        for dtype in grid.dtypes
    ]


def _case(name: str, kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Case:
    B, H, N, D = shape
    lengths = torch.linspace(N // 4, N, B).round().long()
    scores = {"full": B * N * N, "causal": B * N * (N + 1) // 2, "padded": N * int(lengths.sum())}[kind]

    def draw() -> tuple:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(B, H, N, D, generator=generator, dtype=dtype).to(device) for _ in range(3)
        )
        real = (torch.arange(N) < lengths[:, None]).to(device)  # [B, N], True = real token
        return (query, key, value, real) if kind == "padded" else (query, key, value)

    rivals = RIVALS[kind]
    return Case(
        operator="attention",
        name=f"{name} {B}x{H}x{N}x{D}",
        dtype=dtype,
        contenders={
            "naive": rivals.naive,
            "torch": rivals.torch,
            # torch's fused operator is a single call that the compiler leaves as it is.
            "compile": compiled(rivals.naive),
            "fastformer": rivals.fastformer,
        },
        draw=draw,
        backend=rivals.backend,
        flops=4 * H * D * scores,
    )


def full_naive(query, key, value):
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value


def causal_naive(query, key, value):
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ value


def padded_naive(query, key, value, real):
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return scores.masked_fill(~real[:, None, None, :], -torch.inf).softmax(-1) @ value


RIVALS = {
    "full": Rivals(
        naive=full_naive,
        torch=F.scaled_dot_product_attention,
        fastformer=fastformer.attention,
        backend=lambda *qkv: fastformer.explain(fastformer.attention, *qkv).backend,
    ),
    "causal": Rivals(
        naive=causal_naive,
        torch=lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True),
        fastformer=lambda *qkv: fastformer.attention(*qkv, causal=True),
        backend=lambda *qkv: fastformer.explain(fastformer.attention, *qkv, causal=True).backend,
    ),
    "padded": Rivals(
        naive=padded_naive,
        torch=lambda q, k, v, real: F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :]),
        fastformer=lambda q, k, v, real: fastformer.attention(q, k, v, key_padding_mask=real),
        backend=lambda q, k, v, real: (
            fastformer.explain(fastformer.attention, q, k, v, key_padding_mask=real).backend
        ),
    ),
}


def bench_attention(take):
    take()
