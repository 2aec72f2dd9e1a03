"""The CUDA C++ norms: every kernel that norm_plan.h can choose, followed through calls that fill the chip."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from tests.cuda.emulated import NormBwdParams, NormBwdPlan, NormFwdParams, NormPlan, instance_name
from tests.cuda.structures import CSRC, DTYPES

from . import sass
from .case import Case, Compiled
from .cuda_cases import compiled_plans, compiles_for, cubin_of
from .issued import Launch, issued

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Call(NamedTuple):
    x: torch.dtype  # of s and grad_out too
    residual: torch.dtype | None = None  # of grad_sum too
    parameters: torch.dtype = BF16
    kind: str = "layer"
    dropout_p: float = 0.0


# Those with dropout are not held to a count of bytes.
CALLS = {
    "bfloat16": Call(BF16),
    "bfloat16 rms": Call(BF16, kind="rms"),
    "bfloat16 add": Call(BF16, BF16),
    "bfloat16, parameters float32": Call(BF16, parameters=F32),
    "float16": Call(F16, parameters=F16),
    "float32": Call(F32, parameters=F32),
    "bfloat16 dropout": Call(BF16, BF16, dropout_p=0.1),
    "float32 dropout": Call(F32, F32, parameters=F32, dropout_p=0.1),
    "mixed dropout": Call(BF16, F32, parameters=F32, dropout_p=0.1),
}
WIDTHS = (64, 768, 1024, 1280, 1536, 2048, 8192)
# Rows that no kernel keeps in registers, but for 16-bit ones backward, as words.
WIDEST = {"norm_fwd_cuda": 65536, "norm_bwd_cuda": 16384}
_ELEMENTS = 1 << 24
_MULTIPROCESSORS = 132  # of an H100
_FAR = 1 << 32  # apart: addresses that are never read


def _cubin(target: str) -> bytes:
    return cubin_of(CSRC / "cuda" / "launch_norm.cu", target)


@cache
def _kernels(cubin: bytes) -> dict[str, tuple[int, list[sass.Instruction]]]:
    return sass.parse_all(sass.disassemble(cubin))


def _named(cubin: bytes, name: str) -> str:
    """The kernel's full name."""
    (found,) = (function for function in _kernels(cubin) if name in function)
    return found


def _fill(params: Any, call: Call, C: int, tensors: dict[str, torch.dtype | None]) -> None:
    """`tensors`: {field: dtype}, of a pointer without one None."""
    for place, (name, dtype) in enumerate(tensors.items(), 1):
        setattr(params, name, place * _FAR)
        for suffix, value in (("dtype", dtype and DTYPES[dtype]), ("stride", C)):
            if hasattr(params, f"{name}_{suffix}"):
                setattr(params, f"{name}_{suffix}", value)
    params.rms, params.scale = call.kind == "rms", 1.0
    params.rows, params.columns = _ELEMENTS // C, C
    params.threshold = round(call.dropout_p * 65536)


def _forward(call: Call, C: int) -> tuple[NormFwdParams, NormPlan, int]:
    """The kernel's arguments, its plan, and the bytes that a row moves."""
    out = call.x if call.residual is None else torch.promote_types(call.x, call.residual)
    tensors = {"x": call.x, "weight": call.parameters, "out": out, "rstd": None, "seed": None}
    if call.kind == "layer":
        tensors |= {"mean": None, "bias": call.parameters}
    if call.residual is not None:
        tensors |= {"residual": call.residual, "sum": out}
    params, plan = NormFwdParams(), NormPlan()
    _fill(params, call, C, tensors)
    params.out_dtype = DTYPES[out]
    compiled_plans().plan_fwd(ctypes.byref(params), ctypes.byref(plan))
    moved = [tensors[name] for name in ("x", "residual", "out", "sum") if name in tensors]
    return params, plan, C * sum(dtype.itemsize for dtype in moved if dtype is not None)


def _backward(call: Call, C: int) -> tuple[NormBwdParams, NormPlan, int]:
    s = call.x if call.residual is None else torch.promote_types(call.x, call.residual)
    tensors = {"s": s, "grad_out": s, "weight": call.parameters, "rstd": None, "seed": None, "ds": s}
    tensors |= {"partial": None, "dweight": None}
    if call.kind == "layer":
        tensors |= {"mean": None, "dbias": None}
    if call.residual is not None:
        tensors["grad_sum"] = s
    if call.dropout_p:
        tensors["dx"] = s
    params, plan = NormBwdParams(), NormBwdPlan()
    _fill(params, call, C, tensors)
    compiled_plans().plan_bwd(ctypes.byref(params), _MULTIPROCESSORS, True, ctypes.byref(plan))
    moved = [tensors[name] for name in ("s", "grad_out", "grad_sum", "ds", "dx") if name in tensors]
    return params, plan.ds, C * sum(dtype.itemsize for dtype in moved if dtype is not None)


def _compile(op: str, call: Call, C: int, target: str) -> Compiled:
    params, plan, row_bytes = (_forward if op == "norm_fwd_cuda" else _backward)(call, C)
    kernel = compiled_plans().kernel_name(plan.kernel).decode()
    cubin = _cubin(target)
    function = _named(cubin, instance_name(plan, params))
    architecture, code = _kernels(cubin)[function]
    grid, block = (plan.grid_x, plan.grid_y), (plan.block_x, plan.block_y)
    bytes_per_slot = None
    if "kept" in kernel:
        launches = (
            Launch(grid, block, bytes(params), warp=warp) for warp in range(block[0] * block[1] // 32)
        )
        slots = sum(1 for launch in launches for _ in issued(architecture, code, launch))
        bytes_per_slot = row_bytes * params.rows / grid[0] / slots
    tile = f"threads={block[0]}x{block[1]}"
    shared = plan.shared_bytes
    return Compiled(kernel.removesuffix("_kernel"), tile, cubin, shared, function, bytes_per_slot)


def _compile_small(kernel: str, target: str) -> Compiled:
    """One that is little beside the kernel before it."""
    cubin = _cubin(target)
    return Compiled(kernel, "", cubin, 0, _named(cubin, kernel))


def cuda_norm_cases(op: str, target: str) -> Iterator[Case]:
    """Nothing where there is no nvcc, or for what it does not compile for."""
    if not compiles_for(target):
        return
    for name, call in CALLS.items():
        for C in (*WIDTHS, WIDEST[op]):
            run = partial(_compile, op, call, C)
            yield Case(op, f"C={C} {name}", run, None, not call.dropout_p, compiled=True)
    if op == "norm_bwd_cuda":
        for kernel in ("norm_bwd_columns", "norm_bwd_reduce"):
            yield Case(op, kernel, partial(_compile_small, kernel), compiled=True)
