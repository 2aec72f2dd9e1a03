"""The CUDA C++ sums over attention's scores: one kernel."""

from __future__ import annotations

from collections.abc import Iterator

from .case import Case, Compiled
from .cuda_cases import compiles_for, cubin_of


def _compile(target: str) -> Compiled:
    """The sums; beside them what adds shares is nothing."""
    cubin = cubin_of("attention_sums.cu", target, SUMS_ALONE=1)
    return Compiled("attention_sums", "64 queries, 64 keys", cubin, 0)


def cuda_attention_sums_cases(op: str, target: str) -> Iterator[Case]:
    """Nothing where there is no nvcc, or for what it does not compile for."""
    if compiles_for(target):
        yield Case(op, "every call", _compile, tensor_cores=True, compiled=True)
