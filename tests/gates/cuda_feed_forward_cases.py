"""CUDA C++'s feed_forward: the kernel of every product and type."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.cuda.emulated_feed_forward import KERNELS

from .case import Case, Compiled
from .cuda_cases import DTYPES as HALVES
from .cuda_cases import compiles_for, cubin_of

DTYPES = HALVES | {"float32": 0}

# As feed_forward_plan.h has them.
_STEP = {"bfloat16": 32, "float16": 32, "float32": 16}
_SHARED = 48 << 10


def _compile(kernel: str, dtype: str, target: str) -> Compiled:
    cubin = cubin_of("feed_forward.cu", target, TYPE=DTYPES[dtype], KERNEL=KERNELS.index(kernel))
    tile = f"block=128x128x{_STEP[dtype]} stages=3 num_warps=4"
    return Compiled("feed_forward", tile, cubin, _SHARED)


def cuda_feed_forward_cases(op: str, target: str) -> Iterator[Case]:
    """Nothing where there is no nvcc, or for what it does not compile for."""
    if not compiles_for(target):
        return
    for kernel in KERNELS:
        for dtype in DTYPES:
            call = partial(_compile, kernel, dtype)
            gated = dtype == "bfloat16"
            yield Case(op, f"{dtype} {kernel}", call, None, gated, tensor_cores=True, compiled=True)
