"""Attention of one query over many keys, as generating text has it: reading key and value is the cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastformer
from benchmarks.case import Case, Grid, Rivals, forward, serving

OPERATORS = ("decode",)


def cases(grid: Grid) -> list[Case]:
    heads = ((12, 12), (8, 2))  # query's, key's and value's
    if grid.quick:
        sizes = [(256, 64)]
    elif grid.full:
        sizes = [(N, D) for N in (1024, 4096) for D in (64, 128)]
    else:
        sizes = [(1024, 64), (4096, 128)]
    return [
        _case(grid.scaled(8, on_cuda=16), *counts, N, D, dtype, grid.device)
        for N, D in sizes
        for counts in heads
        for dtype in grid.dtypes
    ]


def _case(B: int, H: int, H_kv: int, N: int, D: int, dtype: torch.dtype, device: str) -> Case:
    def draw() -> tuple:
        generator = torch.Generator().manual_seed(0)
        shapes = ((B, H, 1, D), (B, H_kv, N, D), (B, H_kv, N, D))
        return tuple(torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes)

    return Case(
        operator="decode",
        name=f"{H}/{H_kv} heads {B}x{H}x{N}x{D}",
        dtype=dtype,
        contenders=RIVALS.contenders(RIVALS.naive, forward),
        draw=draw,
        backend=serving(RIVALS.fastformer),
    )


def decode_naive(query, key, value):
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, 1) if shared > 1 else tensor for tensor in (key, value))
    return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1) @ value


RIVALS = Rivals(
    naive=decode_naive,
    torch=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]),
    fastformer=fastformer.attention,
)


def bench_decode(take):
    take()
