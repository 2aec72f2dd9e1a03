"""CUDA feed_forward on CPU tensors: the launcher's part in Python, the plans from feed_forward_plan.h, the
PTX on ptxvm."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field

import torch

from tests import ptxvm
from tests.ptxvm import nvcc

from .structures import CSRC, DTYPES, HERE, plans, poisoned, struct_argument, structure

GemmOperand, GemmParams, GemmPlan, ColumnSumsParams, ColumnSumsPlan = (
    structure("cuda/feed_forward_plan.h", name)
    for name in ("GemmOperand", "GemmParams", "GemmPlan", "ColumnSumsParams", "ColumnSumsPlan")
)
# In the order of GemmKernel and of Activation.
KERNELS = ("hidden", "linear", "hidden_gradient", "input_gradient", "weight_gradient")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "relu2")
FLAGS = f"-I{CSRC}", f"-I{CSRC / 'cuda'}"


def kernels(dtype, arch):
    """Those of one type, as a module of ptxvm."""
    source = HERE / "instances" / "feed_forward.cu"
    return nvcc.compile_module(source, arch, *FLAGS, f"-DTYPE={DTYPES[dtype]}")


def rows_of(tensor):
    """[..., C] as [rows, C] with contiguous columns, in place where strides allow it."""
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


@dataclass
class FeedForwardEmulator:
    """Runs both raw operators. `launched` gathers (kernel, parameters, counters) of everything that ran."""

    arch: str = "80"
    multiprocessors: int = 1
    checks: ptxvm.Checks | None = None
    launched: list = field(default_factory=list)

    def _launch(self, name, kernel, grid, block, params, tensors, shared_bytes=0):
        counters = kernel.launch(
            grid, block, [struct_argument(params, tensors)], shared_bytes=shared_bytes, checks=self.checks
        )
        self.launched.append((name, kernel.name, params, counters))

    def _multiply(self, kernel, call, sizes, operands, tensors):
        """`operands` are matrices, and None like `tensors` where there is none."""
        p = GemmParams(**call)
        p.M, p.N, p.K = sizes
        given = {name: t for name, t in tensors.items() if t is not None and t.numel()}
        for name, tensor in given.items():
            setattr(p, name, tensor.data_ptr())
        for name, matrix in operands.items():
            if matrix is not None and matrix.numel():
                setattr(p, name, GemmOperand(matrix.data_ptr(), matrix.stride(0)))
                given[f"{name}.data"] = matrix
        plan = GemmPlan()
        number = KERNELS.index(kernel)
        plans().plan_product(number, ctypes.byref(p), self.multiprocessors, ctypes.byref(plan))
        if plan.grid == 0:
            return
        if plan.parts > 1:
            given["parts"] = poisoned((plan.parts, p.M * p.N), torch.float32)
            p.parts = given["parts"].data_ptr()
        dtype = next(torch_type for torch_type, code in DTYPES.items() if code == p.dtype)
        instance = kernels(dtype, self.arch).kernel(
            f"feed_forward_kernelILNS_5DTypeE{p.dtype}ELNS0_10GemmKernelE{number}EE"
        )
        self._launch(kernel, instance, plan.grid, plan.threads, p, given, plan.shared_bytes)
        if plan.parts > 1:
            self._add_rows(given["parts"], given["out"], dtype)

    def _add_rows(self, matrix, out, call_dtype):
        """out = the sums of the matrix's columns, by the kernel of a call's module."""
        if out.numel() == 0:
            return
        p = ColumnSumsParams(stride=matrix.stride(0), rows=matrix.shape[0], columns=matrix.shape[1])
        plan = ColumnSumsPlan()
        plans().plan_sums(ctypes.byref(p), ctypes.byref(plan))
        sums = out
        if plan.grid_y > 1:
            sums = poisoned((plan.grid_y, p.columns), torch.float32)
        p.dtype, p.out_dtype = DTYPES[matrix.dtype], DTYPES[sums.dtype]
        tensors = {"matrix": matrix, "out": sums} if matrix.numel() else {"out": sums}
        kernel = kernels(call_dtype, self.arch).kernel("column_sums_kernel")
        grid, block = (plan.grid_x, plan.grid_y), (plan.block_x, plan.block_y)
        self._launch("sums", kernel, grid, block, p, tensors)
        if plan.grid_y > 1:
            self._add_rows(sums, out, call_dtype)

    def _call(self, x, w_gate, seed, activation, dropout_p):
        """What every product of a call is told, and the tensors of that."""
        call = {"dtype": DTYPES[x.dtype], "activation": ACTIVATIONS.index(activation), "scale": 1.0}
        call["threshold"] = threshold = round(dropout_p * 65536)
        if threshold:
            call["scale"] = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
        return call, {"seed": seed if threshold else None}

    def _hidden(self, call, given, x, w1, b1, w_gate, b_gate, **results):
        """The first product, from rows of x."""
        operands = {"a": x, "b": rows_of(w1), "gate": None if w_gate is None else rows_of(w_gate)}
        vectors = {"bias": b1, "gate_bias": b_gate}
        vectors = {name: None if t is None else t.contiguous() for name, t in vectors.items()}
        sizes = x.shape[0], w1.shape[0], x.shape[1]
        call = call | {"gated": w_gate is not None}
        self._multiply("hidden", call, sizes, operands, given | vectors | results)

    def feed_forward_fwd(self, x, w1, b1, w_gate, b_gate, w2, b2, seed, activation, dropout_p, save_pre):
        call, given = self._call(x, w_gate, seed, activation, dropout_p)
        rows, (E_out, F), lead = rows_of(x), w2.shape, x.shape[:-1]
        out, hidden = poisoned((*lead, E_out), x.dtype), poisoned((rows.shape[0], F), x.dtype)
        pre = poisoned((*lead, F) if save_pre else (0,), x.dtype)
        pre_gate = poisoned((*lead, F) if save_pre and w_gate is not None else (0,), x.dtype)
        results = {"out": hidden, "pre": pre, "pre_gate": pre_gate}
        self._hidden(call, given, rows, w1, b1, w_gate, b_gate, **results)
        last = given | {"bias": None if b2 is None else b2.contiguous(), "out": out}
        self._multiply("linear", call, (rows.shape[0], E_out, F), {"a": hidden, "b": rows_of(w2)}, last)
        return out, pre, pre_gate

    def feed_forward_bwd(
        self, grad_out, pre, pre_gate, x, w1, b1, w_gate, b_gate, w2, b2, seed, activation, dropout_p, *needs
    ):
        call, given = self._call(x, w_gate, seed, activation, dropout_p)
        tensors = x, w1, b1, w_gate, b_gate, w2, b2
        grads = [
            poisoned(t.shape if t is not None and need else (0,), x.dtype)
            for t, need in zip(tensors, needs, strict=True)
        ]
        dx, dw1, db1, dw_gate, db_gate, dw2, db2 = grads
        need_x, need_w1, _, need_w_gate, _, need_w2, _ = needs
        x_rows, grad, gated = rows_of(x), rows_of(grad_out), w_gate is not None
        rows, F = x_rows.shape[0], w1.shape[0]
        results = {"out": need_w2, "dpre": need_x or need_w1, "dgate": gated and (need_x or need_w_gate)}
        made = {name: poisoned((rows, F) if want else (0,), x.dtype) for name, want in results.items()}
        for name, of in {"dpre_sums": db1, "dgate_sums": db_gate}.items():
            made[name] = poisoned((-(-rows // 128) if of.numel() else 0, F), torch.float32)
            results[name] = of.numel() > 0
        if any(results.values()):
            if pre.numel() == 0:
                pre = poisoned((rows, F), x.dtype)
                pre_gate = poisoned((rows, F) if gated else (0,), x.dtype)
                self._hidden(call, given, x_rows, w1, b1, w_gate, b_gate, pre=pre, pre_gate=pre_gate)
            sizes = rows, F, grad.shape[1] if any(list(results.values())[1:]) else 0
            saved = {"pre": pre.contiguous(), "pre_gate": pre_gate.contiguous()}
            operands = {"a": grad, "b": rows_of(w2)}
            self._multiply("hidden_gradient", call, sizes, operands, given | saved | made)
        if need_x:
            operands = {"a": made["dpre"], "b": rows_of(w1)}
            if gated:
                operands |= {"a2": made["dgate"], "b2": rows_of(w_gate)}
            self._multiply("input_gradient", call, (rows, x_rows.shape[1], F), operands, {"out": dx})
        for of, a, b in (
            (dw1, made["dpre"], x_rows),
            (dw_gate, made["dgate"], x_rows),
            (dw2, grad, made["out"]),
        ):
            if of.dim() == 2:
                self._multiply("weight_gradient", call, (*of.shape, rows), {"a": a, "b": b}, {"out": of})
        for of, sums in ((db1, made["dpre_sums"]), (db_gate, made["dgate_sums"]), (db2, grad)):
            self._add_rows(sums, of, x.dtype)
        return tuple(grads)
