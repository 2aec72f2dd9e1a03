"""layer_norm and add_norm forward, on the widths of MiniLM, BERT-base and a large decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastformer
from benchmarks.case import Case, Grid, Rivals, forward, serving

OPERATORS = ("layer_norm", "add_norm")


def cases(grid: Grid) -> list[Case]:
    shapes = {"minilm": (4096, 384), "bert-base": (2048, 768), "wide": (1024, 4096)}
    if grid.quick:
        shapes = {"minilm": (512, 384)}
    return [
        _case(operator, label, (grid.scaled(rows, on_cuda=16), columns), dtype, grid.device)
        for operator in OPERATORS
        for label, (rows, columns) in shapes.items()
        for dtype in grid.dtypes
    ]


def _case(operator: str, label: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    rows, columns = shape
    shapes = [(rows, columns)] * (2 if operator == "add_norm" else 1) + [(columns,), (columns,)]

    def draw() -> tuple:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes)

    rivals = RIVALS[operator]
    return Case(
        operator=operator,
        name=f"{label} {rows}x{columns}",
        dtype=dtype,
        contenders=rivals.contenders(rivals.torch, forward),
        draw=draw,
        backend=serving(rivals.fastformer),
    )


def layer_norm_naive(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight + bias


def add_norm_naive(x, residual, weight, bias):
    total = x + residual
    return layer_norm_naive(total, weight, bias), total


def add_norm_torch(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias), total


RIVALS = {
    "layer_norm": Rivals(
        naive=layer_norm_naive,
        torch=lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
        fastformer=lambda x, weight, bias: fastformer.layer_norm(x, weight.shape, weight, bias),
    ),
    "add_norm": Rivals(naive=add_norm_naive, torch=add_norm_torch, fastformer=fastformer.add_norm),
}


def bench_norm(take):
    take()
