"""The CUDA C++ kernels: every instantiation that a launcher can launch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.cuda.emulated_attention import AttentionTile
from tests.cuda.emulated_attention_backward import BackwardTile
from tests.cuda.structures import CSRC, plans
from tests.ptxvm import nvcc
from tests.triton.offline import SHARED_LIMIT

from .case import Case, Compiled

# What was compiled and read is kept here, unless pytest has a place for it.
CACHE = Path(__file__).parents[2] / "build" / "gates"
_SOURCES = Path(__file__).parents[1] / "cuda" / "instances"
DTYPES = {"bfloat16": 1, "float16": 2}
FLOAT32 = {"float32": 0}
_KINDS = ("whole", "padded", "general", "few")
_WIDTHS = (32, 64, 96, 128, 192, 256)
_BACKWARD_WIDTHS = (64, 128, 256)
_BACKWARD_KINDS = ("general", "plain", "small")
# The chips of one major release run the code of its first.
_BUILT = {"sm_86": "80", "sm_89": "80"}


def _keep_what_is_compiled() -> None:
    if nvcc.cache_folder is None:
        CACHE.mkdir(parents=True, exist_ok=True)
        nvcc.cache_folder = CACHE


def compiled_plans() -> ctypes.CDLL:
    _keep_what_is_compiled()
    return plans()


def cubin_of(source: str | Path, target: str, **defined: int | str) -> bytes:
    _keep_what_is_compiled()
    arch = _BUILT.get(target, target.removeprefix("sm_"))
    flags = (f"-D{name}={value}" for name, value in defined.items())
    return nvcc.compile_cubin(_SOURCES / source, arch, f"-I{CSRC}", f"-I{CSRC / 'cuda'}", *flags)


def _named(width: int, tile: ctypes.Structure) -> str:
    fields = (f"{name}={getattr(tile, name)}" for name, _ in tile._fields_)
    return " ".join([f"block_d={width}", *fields])


def _compile(width: int, dtype: str, kind: str, target: str) -> Compiled:
    number = _KINDS.index(kind)
    type_number = (DTYPES | FLOAT32)[dtype]
    cubin = cubin_of("attention_fwd.cu", target, TYPE=type_number, WIDTH=width, KIND=number)
    tile = AttentionTile()
    shared = compiled_plans().attention_tile(width, number, type_number, ctypes.byref(tile))
    return Compiled("attention_fwd", _named(width, tile), cubin, shared)


def _compile_combine(target: str) -> Compiled:
    threads = compiled_plans().attention_combine_threads()
    return Compiled("attention_combine", f"threads={threads}", cubin_of("attention_combine.cu", target), 0)


def _compile_backward(width: int, dtype: str, kind: str, target: str) -> Compiled:
    """The pass over keys; beside it the others are nothing."""
    number, type_number = _BACKWARD_KINDS.index(kind), (DTYPES | FLOAT32)[dtype]
    defined = {"TYPE": type_number, "WIDTH": width, "KIND": number}
    cubin = cubin_of("attention_bwd.cu", target, **defined, KEYS_ALONE=1)
    tile = BackwardTile()
    shared = compiled_plans().attention_backward_tile(width, number, type_number, ctypes.byref(tile))
    return Compiled("attention_bwd_keys", _named(width, tile), cubin, shared)


def compiles_for(target: str) -> bool:
    return nvcc.find_nvcc() is not None and target.startswith("sm_")


def cuda_attention_cases(op: str, target: str) -> Iterator[Case]:
    """Nothing where there is no nvcc, or for what it does not compile for."""
    if not compiles_for(target):
        return
    major = int(target.removeprefix("sm_")) // 10
    for width in _WIDTHS:
        for dtype, type_number in (DTYPES | FLOAT32).items():
            for number, kind in enumerate(_KINDS):
                if not compiled_plans().attention_is_chosen(width, number, type_number, major):
                    continue
                gated = dtype == "bfloat16" and kind == "whole"
                call = partial(_compile, width, dtype, kind)
                name = f"D={width} {dtype} {kind}"
                yield Case(op, name, call, width, gated, tensor_cores=True, compiled=True)
    yield Case(op, "splits joined", _compile_combine, compiled=True)


def cuda_attention_backward_cases(op: str, target: str) -> Iterator[Case]:
    """As cuda_attention_cases."""
    if not compiles_for(target):
        return
    most = ctypes.c_int64(SHARED_LIMIT[target])
    for width in _BACKWARD_WIDTHS:
        for dtype, type_number in (DTYPES | FLOAT32).items():
            for number, kind in enumerate(_BACKWARD_KINDS):
                if not compiled_plans().attention_backward_is_chosen(width, number, type_number, most):
                    continue
                gated = dtype == "bfloat16" and kind == "plain"
                call = partial(_compile_backward, width, dtype, kind)
                name = f"D={width} {dtype} {kind}"
                yield Case(op, name, call, width, gated, tensor_cores=True, compiled=True)
