"""The CUDA norms on CPU tensors: the launcher's part in Python, the plan from norm_plan.h, the PTX on ptxvm.

Parameters have the layout that the headers of csrc declare, read from their text (see structures.py); which
kernel runs, and on which grid, the plan's own functions say, compiled for the host.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field

import torch

from tests import ptxvm
from tests.ptxvm import nvcc

from .structures import CSRC, DTYPES, plans, poisoned, struct_argument, structure

NormFwdParams, NormBwdParams, NormPlan, NormBwdPlan = (
    structure("cuda/norm_plan.h", name)
    for name in ("NormFwdParams", "NormBwdParams", "NormPlan", "NormBwdPlan")
)


def kernels(arch):
    """Every instantiation that the launcher can launch, as a module of ptxvm."""
    return nvcc.compile_module(CSRC / "cuda" / "launch_norm.cu", arch, f"-I{CSRC}")


def instance_name(plan, params):
    """A part of the mangled name, which no other instantiation has."""
    name = plans().kernel_name(plan.kernel).decode()
    if "kept" not in name:
        return name
    if "fwd" in name:
        return f"{name}ILNS_5DTypeE{params.x_dtype}ELi{plan.thread_columns}E"
    return f"{name}ILNS_5DTypeE{params.s_dtype}E"


def _rows(tensor):
    """`tensor` where its rows have one stride and contiguous columns, else a copy; and that stride."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    if tensor.shape[-1] > 1 and rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


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
        kernel = kernels(self.arch).kernel(instance_name(plan, params))
        counters = kernel.launch(
            (plan.grid_x, plan.grid_y),
            (plan.block_x, plan.block_y),
            [struct_argument(params, tensors)],
            shared_bytes=plan.shared_bytes,
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
        tensors["out"] = out = poisoned(x.shape, dtype)
        s = poisoned(x.shape if residual is not None else (0,), dtype)
        mean, rstd = (
            poisoned((0,) if rms else x.shape[:-1], torch.float32),
            poisoned(x.shape[:-1], torch.float32),
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
        ds = poisoned(s.shape, s.dtype)
        dx = poisoned(s.shape if dropout_p > 0 else (0,), s.dtype)
        dweight = poisoned((columns if need_dweight else 0,), torch.float32)
        dbias = poisoned((columns if need_dbias else 0,), torch.float32)
        tensors |= {"ds": ds, "dx": dx, "dweight": dweight, "dbias": dbias}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
        p = self._params(NormBwdParams, tensors, strides, dropout_p, rms)
        p.rows, p.columns = math.prod(s.shape[:-1]), columns
        plan = NormBwdPlan()
        needed = need_dweight or need_dbias
        plans().plan_bwd(ctypes.byref(p), self.multiprocessors, needed, ctypes.byref(plan))
        if p.partial_rows:
            tensors["partial"] = poisoned((p.partial_rows, 2, p.partial_stride), torch.float32)
        for stage in (plan.ds, plan.columns, plan.reduce):
            self._launch(stage, p, tensors)
        return ds, dx, dweight, dbias
