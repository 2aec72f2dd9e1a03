"""CUDA C++'s feed_forward: the kernel of every product and type."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.cuda.emulated_feed_forward import KERNELS

from .case import Case, Compiled
from .cuda_cases import DTYPES, compiles_for, cubin_of

# As feed_forward_plan.h has them.
_TILE = "block=128x128x32 stages=3 num_warps=4"
_SHARED = 48 << 10


def _compile(kernel: str, dtype: str, target: str) -> Compiled:
    cubin = cubin_of("feed_forward.cu", target, TYPE=DTYPES[dtype], KERNEL=KERNELS.index(kernel))
    return Compiled("feed_forward", _TILE, cubin, _SHARED)


def cuda_feed_forward_cases(op: str, target: str) -> Iterator[Case]:
    """Nothing where there is no nvcc, or for what it does not compile for."""
    if not compiles_for(target):
        return
    for kernel in KERNELS:
        for dtype in DTYPES:
            call = partial(_compile, kernel, dtype)
            gated = dtype == "bfloat16"
            yield Case(op, f"{dtype} {kernel}", call, None, gated, tensor_cores=True, compiled=True)
