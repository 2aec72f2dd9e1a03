"""What a call costs before it computes anything: layer_norm on four rows of 64."""

from __future__ import annotations

import torch

from benchmarks.bench_norm import RIVALS
from benchmarks.case import Case, Grid, forward, forward_and_backward, serving

OPERATORS = ("launch",)
SHAPE = (4, 64)


def cases(grid: Grid) -> list[Case]:
    return [
        _case("layer_norm, no gradient", grid.device, needs_grad=False),
        _case("layer_norm, with gradient", grid.device, needs_grad=True),
        _case("layer_norm, forward and backward", grid.device, needs_grad=True, backward=True),
    ]


def _case(name: str, device: str, *, needs_grad: bool, backward: bool = False) -> Case:
    shapes = (SHAPE, SHAPE[1:], SHAPE[1:])
    rivals = RIVALS["layer_norm"]

    def draw() -> tuple:
        generator = torch.Generator().manual_seed(0)
        *inputs, grad_out = (torch.randn(shape, generator=generator).to(device) for shape in (*shapes, SHAPE))
        inputs = (tensor.requires_grad_(needs_grad) for tensor in inputs)
        return (*inputs, grad_out) if backward else tuple(inputs)

    return Case(
        operator="launch",
        name=name,
        dtype=torch.float32,
        contenders=rivals.contenders(rivals.torch, forward_and_backward if backward else forward),
        draw=draw,
        backend=serving(rivals.fastformer, backward=backward),
        needs_grad=needs_grad,
    )


def bench_launch(take):
    take()
