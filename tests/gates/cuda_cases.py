"""The CUDA C++ kernels: every instantiation that a launcher can launch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.cuda.emulated_attention import AttentionTile
from tests.cuda.structures import CSRC, plans
from tests.ptxvm import nvcc

from .case import Case, Compiled

# What was compiled and read is kept here, unless pytest has a place for it.
CACHE = Path(__file__).parents[2] / "build" / "gates"
_SOURCE = Path(__file__).parents[1] / "cuda" / "instances" / "attention_fwd.cu"
_DTYPES = {"bfloat16": 1, "float16": 2}
_KINDS = ("whole", "padded", "general")
_WIDTHS = (32, 64, 96, 128, 192, 256)
# The chips of one major release run the code of its first.
_BUILT = {"sm_86": "80", "sm_89": "80"}


def _plans() -> ctypes.CDLL:
    if nvcc.cache_folder is None:
        CACHE.mkdir(parents=True, exist_ok=True)
        nvcc.cache_folder = CACHE
    return plans()


def _compile(width: int, dtype: str, kind: str, target: str) -> Compiled:
    number = _KINDS.index(kind)
    defined = (f"-DTYPE={_DTYPES[dtype]}", f"-DWIDTH={width}", f"-DKIND={number}")
    arch = _BUILT.get(target, target.removeprefix("sm_"))
    cubin = nvcc.compile_cubin(_SOURCE, arch, f"-I{CSRC}", f"-I{CSRC / 'cuda'}", *defined)
    tile = AttentionTile()
    shared = _plans().attention_tile(width, number, ctypes.byref(tile))
    named = " ".join(f"{name}={getattr(tile, name)}" for name, _ in AttentionTile._fields_)
    named = f"block_d={width} {named}"
    return Compiled("attention_fwd", named, cubin, shared)


def cuda_attention_cases(op: str, target: str) -> Iterator[Case]:
    """Nothing where there is no nvcc, or for what it does not compile for."""
    if nvcc.find_nvcc() is None or not target.startswith("sm_"):
        return
    major = int(target.removeprefix("sm_")) // 10
    for width in _WIDTHS:
        for dtype in _DTYPES:
            for number, kind in enumerate(_KINDS):
                if not _plans().attention_is_chosen(width, number, major):
                    continue
                gated = dtype == "bfloat16" and kind == "whole"
                call = partial(_compile, width, dtype, kind)
                name = f"D={width} {dtype} {kind}"
                yield Case(op, name, call, width, gated, tensor_cores=True, compiled=True)
