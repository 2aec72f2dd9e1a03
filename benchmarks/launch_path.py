"""Python's time from a public call to its launch on the Triton backend: `python -m benchmarks.launch_path`.

Tensors are the CPU's and every launch is a no-op, so this is what a GPU waits for before it has work, without
Triton's own launch. The least of many short runs, because a busy machine only ever adds.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable
from typing import Any

import torch
import triton.runtime

import fastformer
from fastformer.backends import triton as backend

RUNS, CALLS = 500, 10


class _NoLaunch:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: None


def remove_launches() -> None:
    """For the rest of the process: kernels do nothing, and the backend serves CPU tensors."""
    kernels = importlib.import_module("fastformer.triton_kernels")
    for found in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
        module = importlib.import_module(found.name)
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel"):
                setattr(module, name, _NoLaunch())
    backend._interpreting = lambda: True


def least_us(call: Callable[[], Any]) -> float:
    for _ in range(200):
        call()
    least = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        least = min(least, time.perf_counter() - start)
    return least / CALLS * 1e6


def calls() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    x, residual = torch.randn(2, 4, 64, dtype=torch.bfloat16).unbind()
    weight, bias = torch.ones(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)
    query, key, value = torch.randn(3, 2, 4, 8, 64, dtype=torch.bfloat16).unbind()
    w1, w2 = torch.randn(128, 64, dtype=torch.bfloat16), torch.randn(64, 128, dtype=torch.bfloat16)
    return {
        "norm: layer_norm": (lambda x, w, b: fastformer.layer_norm(x, (64,), w, b), (x, weight, bias)),
        "norm: add_norm": (lambda *t: fastformer.add_norm(*t)[0], (x, residual, weight, bias)),
        "attention: plain": (fastformer.attention, (query, key, value)),
        "attention: causal": (lambda *t: fastformer.attention(*t, causal=True), (query, key, value)),
        "feed_forward: plain": (
            lambda x, w1, w2: fastformer.feed_forward(x, w1, None, w2, None),
            (x, w1, w2),
        ),
    }


def main() -> None:
    remove_launches()
    print(f"{'':22} {'call':>8} {'with gradient':>14} {'and backward':>13}   us")
    for name, (call, tensors) in calls().items():
        differentiable = tuple(tensor.clone().requires_grad_() for tensor in tensors)
        with fastformer.use_backend("triton"):
            grad = torch.ones_like(call(*tensors))
            times = [
                least_us(lambda call=call, tensors=tensors: call(*tensors)),
                least_us(lambda call=call, tensors=differentiable: call(*tensors)),
                least_us(lambda call=call, tensors=differentiable, grad=grad: call(*tensors).backward(grad)),
            ]
        print(f"{name:22} {times[0]:8.1f} {times[1]:14.1f} {times[2]:13.1f}")


if __name__ == "__main__":
    main()
