"""The CUDA C++ sums over attention's scores: a kernel for types of 16 bits, and one for float32."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from .case import Case, Compiled
from .cuda_cases import compiles_for, cubin_of


def _compile(float32: bool, target: str) -> Compiled:
    """The sums; beside them what adds shares is nothing."""
    cubin = cubin_of("attention_sums.cu", target, SUMS_ALONE=1, FLOAT32=int(float32))
    return Compiled("attention_sums", "64 queries, 64 keys", cubin, 0)


def cuda_attention_sums_cases(op: str, target: str) -> Iterator[Case]:
    """Nothing where there is no nvcc, or for what it does not compile for."""
    if compiles_for(target):
        for float32, name in ((False, "every call"), (True, "every call of float32")):
            yield Case(op, name, partial(_compile, float32), tensor_cores=True, compiled=True)
