"""The CUDA C++ sums over attention's scores: one kernel for each type of operands."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from .case import Case, Compiled
from .cuda_cases import DTYPES, compiles_for, cubin_of


def _compile(dtype: str, target: str) -> Compiled:
    """The sums; beside them what adds shares is nothing."""
    cubin = cubin_of("attention_sums.cu", target, TYPE=DTYPES[dtype], SUMS_ALONE=1)
    return Compiled("attention_sums", "64 queries, 64 keys", cubin, 0)


def cuda_attention_sums_cases(op: str, target: str) -> Iterator[Case]:
    """Nothing where there is no nvcc, or for what it does not compile for."""
    if not compiles_for(target):
        return
    for dtype in DTYPES:
        yield Case(op, dtype, partial(_compile, dtype), tensor_cores=True, compiled=True)
