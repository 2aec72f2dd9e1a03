"""The CUDA norms on CPU tensors: the launcher's part in Python, the plan from norm_plan.h, the PTX on ptxvm.

Parameters have the layout that norm_plan.h declares, read from its text; which kernel runs, and on which
grid, its own functions say, compiled for the host.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests import ptxvm
from tests.ptxvm import nvcc

CSRC = Path(__file__).parents[2] / "csrc"
HERE = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALARS = {"int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32, "float": ctypes.c_float}


def _structure(name):
    """A ctypes.Structure with the fields of a struct of norm_plan.h."""
    text = (CSRC / "cuda" / "norm_plan.h").read_text()
    body = re.search(rf"struct {name} {{\n(.*?)\n}};", text, re.DOTALL)[1]
    fields = []
    for declaration in re.findall(r"^\s*([^/\n]+);", body, re.MULTILINE):
        type_name, names = re.fullmatch(r"(.*?[ *]) *([\w, ]+)", declaration.strip()).groups()
        kind = ctypes.c_void_p if "*" in type_name else SCALARS.get(type_name.strip(), ctypes.c_int32)
        if type_name.strip() in _structures:
            kind = _structures[type_name.strip()]
        fields += [(each.strip(), kind) for each in names.split(",")]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_structures = {}
for _name in ("NormFwdParams", "NormBwdParams", "NormPlan", "NormBwdPlan"):
    _structures[_name] = _structure(_name)
NormFwdParams, NormBwdParams, NormPlan, NormBwdPlan = _structures.values()


@functools.cache
def plans():
    """norm_plan.h as a shared library."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler was found (g++, c++, clang++, CXX)")
    sources = [HERE / "plan.cpp", CSRC / "cuda" / "norm_plan.h", CSRC / "shapes.h"]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:32]
    library = Path(nvcc.cache_folder, f"plan-{key}.so")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=nvcc.cache_folder) as scratch:
            fresh = Path(scratch, "plan.so")
            command = [*compiler.split(), "-std=c++20", "-shared", "-fPIC", f"-I{CSRC}"]
            subprocess.run([*command, str(sources[0]), "-o", str(fresh)], check=True)
            fresh.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.kernel_name.restype = ctypes.c_char_p
    assert ctypes.sizeof(NormFwdParams) == loaded.size_of_fwd()
    assert ctypes.sizeof(NormBwdParams) == loaded.size_of_bwd()
    return loaded


def kernels(arch):
    """Every instantiation that the launcher can launch, as a module of ptxvm."""
    return nvcc.compile_module(CSRC / "cuda" / "launch_norm.cu", arch, f"-I{CSRC}")


def _rows(tensor):
    """`tensor` where its rows have one stride and contiguous columns, else a copy; and that stride."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    if tensor.shape[-1] > 1 and rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _poisoned(shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype)


@dataclass
class Emulator:
    """Runs the raw operators. `launched` gathers (kernel, counters) of everything that ran."""

    arch: str = "80"
    multiprocessors: int = 2
    checks: ptxvm.Checks | None = None
    launched: list = field(default_factory=list)

    def _launch(self, plan, params, tensors):
        if plan.grid_x == 0 or plan.grid_y == 0:
            return
        name = plans().kernel_name(plan.kernel).decode()
        if name == "norm_fwd_kept_kernel":
            name += f"ILNS_5DTypeE{params.x_dtype}ELi{16 if plan.kernel == 0 else 32}E"
        elif name == "norm_bwd_kept_kernel":
            name += f"ILNS_5DTypeE{params.s_dtype}E"
        kernel = kernels(self.arch).kernel(name)
        codes = {ctypes.c_void_p: "Q", ctypes.c_int64: "q", ctypes.c_uint32: "I", ctypes.c_float: "f"}
        layout = "".join(codes.get(kind, "i") for _, kind in params._fields_) + "0q"
        values = [tensors.get(name, getattr(params, name)) for name, _ in params._fields_]
        values = [0 if value is None else value for value in values]
        counters = kernel.launch(
            (plan.grid_x, plan.grid_y),
            (plan.block_x, plan.block_y),
            [ptxvm.StructArg(layout, *values)],
            checks=self.checks,
        )
        self.launched.append((kernel.name, counters))

    def _params(self, kind, tensors, rows, dropout_p, rms):
        """Pointers and dtypes of `tensors`, strides of those in `rows`, and what every norm is told."""
        p = kind(rms=rms, scale=1.0)
        for name, tensor in tensors.items():
            setattr(p, name, tensor.data_ptr())
            if f"{name}_dtype" in dict(p._fields_):
                setattr(p, f"{name}_dtype", DTYPES[tensor.dtype])
        for name, stride in rows.items():
            setattr(p, f"{name}_stride", stride)
        p.threshold = round(dropout_p * 65536)
        if p.threshold > 0:
            p.scale = 65536 / (65536 - p.threshold) if p.threshold < 65536 else 0.0
        return p

    def norm_fwd(self, x, residual, weight, bias, seed, rms, eps, dropout_p):
        given = {"x": x, "residual": residual, "weight": weight, "bias": bias, "seed": seed}
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        strides = {}
        for name in {"x", "residual"} & tensors.keys():
            tensors[name], strides[name] = _rows(tensors[name])
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        tensors["out"] = out = _poisoned(x.shape, dtype)
        s = _poisoned(x.shape if residual is not None else (0,), dtype)
        mean, rstd = (
            _poisoned((0,) if rms else x.shape[:-1], torch.float32),
            _poisoned(x.shape[:-1], torch.float32),
        )
        tensors |= {"sum": s, "mean": mean, "rstd": rstd}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
        p = self._params(NormFwdParams, tensors, strides, dropout_p, rms)
        p.rows, p.columns, p.eps = math.prod(x.shape[:-1]), x.shape[-1], eps
        p.out_dtype = DTYPES[dtype]
        plan = NormPlan()
        plans().plan_fwd(ctypes.byref(p), ctypes.byref(plan))
        self._launch(plan, p, tensors)
        return out, s, mean, rstd

    def norm_bwd(
        self, grad_out, grad_sum, s, weight, mean, rstd, seed, rms, dropout_p, need_dweight, need_dbias
    ):
        given = {"grad_out": grad_out, "grad_sum": grad_sum, "s": s, "weight": weight, "seed": seed}
        given |= {"mean": mean, "rstd": rstd}
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        strides = {}
        for name in {"grad_out", "grad_sum", "s"} & tensors.keys():
            tensors[name], strides[name] = _rows(tensors[name])
        columns = s.shape[-1]
        ds = _poisoned(s.shape, s.dtype)
        dx = _poisoned(s.shape if dropout_p > 0 else (0,), s.dtype)
        dweight = _poisoned((columns if need_dweight else 0,), torch.float32)
        dbias = _poisoned((columns if need_dbias else 0,), torch.float32)
        tensors |= {"ds": ds, "dx": dx, "dweight": dweight, "dbias": dbias}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
        p = self._params(NormBwdParams, tensors, strides, dropout_p, rms)
        p.rows, p.columns = math.prod(s.shape[:-1]), columns
        plan = NormBwdPlan()
        needed = need_dweight or need_dbias
        plans().plan_bwd(ctypes.byref(p), self.multiprocessors, needed, ctypes.byref(plan))
        if p.partial_rows:
            tensors["partial"] = _poisoned((p.partial_rows, 2, p.partial_stride), torch.float32)
        for stage in (plan.ds, plan.columns, plan.reduce):
            self._launch(stage, p, tensors)
        return ds, dx, dweight, dbias
