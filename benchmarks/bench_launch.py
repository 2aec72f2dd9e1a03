"""What a call costs before it computes anything: layer_norm on four rows of 64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.bench_norm import RIVALS
from benchmarks.case import Case, Grid, compiled

OPERATORS = ("launch",)
SHAPE = (4, 64)


def cases(grid: Grid) -> list[Case]:
    return [
        _case("layer_norm, no gradient", _same, grid.device, needs_grad=False),
        _case("layer_norm, with gradient", _same, grid.device, needs_grad=True),
        _case("layer_norm, forward and backward", _forward_and_backward, grid.device, needs_grad=True),
    ]


def _case(name: str, wrap: Callable[[Callable], Callable], device: str, *, needs_grad: bool) -> Case:
    def draw() -> tuple:
        generator = torch.Generator().manual_seed(0)
        drawn = (
            torch.randn(shape, generator=generator).to(device) for shape in (SHAPE, SHAPE[1:], SHAPE[1:])
        )
        return tuple(tensor.requires_grad_(needs_grad) for tensor in drawn)

    rivals = RIVALS["layer_norm"]
    return Case(
        operator="launch",
        name=name,
        dtype=torch.float32,
        contenders={
            "naive": wrap(rivals.naive),
            "torch": wrap(rivals.torch),
            "compile": wrap(compiled(rivals.torch)),
            "fastformer": wrap(rivals.fastformer),
        },
        draw=draw,
        backend=rivals.backend,
        needs_grad=needs_grad,
    )


def _same(function: Callable) -> Callable:
    return function


def _forward_and_backward(function: Callable) -> Callable:
    def run(*inputs):
        out = function(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, out.detach())

    return run


def bench_launch(take):
    take()
