"""CUDA attention with gradients on CPU tensors: as emulated_attention.py, which runs forward."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from tests.ptxvm import nvcc

from .emulated_attention import contiguous_rows, strides_of
from .emulated_attention_sums import (
    DELTAS,
    DIAGONALS,
    MATRIX,
    ROW,
    AttentionBwdParams,
    AttentionSumsEmulator,
    AttentionSumsParams,
)
from .structures import CSRC, DTYPES, HERE, plans, poisoned, struct_argument, structure

AttentionBwdPlan = structure("cuda/attention_bwd_plan.h", "AttentionBwdPlan")
BackwardTile = structure("cuda/attention_bwd_plan.h", "BackwardTile")
RowSums = structure("cuda/attention_bwd_plan.h", "RowSums")
# Bytes of shared memory that a block may have.
A100, ADA = 163 * 1024, 99 * 1024
WARPS = 8


def backward_module(dtype, plan, arch):
    flags = (f"-DTYPE={DTYPES[dtype]}", f"-DWIDTH={plan.block_d}", f"-DKIND={plan.kind}")
    folders = (f"-I{CSRC}", f"-I{CSRC / 'cuda'}")
    return nvcc.compile_module(HERE / "instances" / "attention_bwd.cu", arch, *folders, *flags)


def _instance(name, dtype, plan):
    """A part of the mangled name."""
    if name in ("rows", "row_sums"):  # of which there is one
        return f"attention_bwd_{name}_kernel"
    of_type = f"ILNS_5DTypeE{DTYPES[dtype]}ELi{plan.block_d}ELNS0_12BackwardKindE{plan.kind}E"
    return f"attention_bwd_{name}_kernel{of_type}"


@dataclass
class AttentionBackwardEmulator(AttentionSumsEmulator):
    """Runs all raw operators."""

    most_shared: int = A100
    plan: AttentionBwdPlan = None  # of the last call

    def attention_bwd(self, grad_out, grad_lse, grad_weights, out, row_max, row_sum, *arguments):
        *arguments, need_bias, need_relative_bias, need_sink = arguments
        query, key, value, bias, relative_bias, sink = (arguments[place] for place in (0, 1, 2, 6, 7, 8))
        packed = arguments[10] is not None
        grads = [poisoned(t.shape, t.dtype) for t in (query, key, value)]
        grad_bias = poisoned(bias.shape, bias.dtype) if need_bias else torch.zeros(0)
        grad_relative_bias = poisoned(relative_bias.shape if need_relative_bias else (0,), torch.float32)
        grad_sink = poisoned(sink.shape if need_sink else (0,), torch.float32)
        results = *grads, grad_bias, grad_relative_bias, grad_sink
        if query.numel() == 0:
            return tuple(result.zero_() for result in results)
        bwd = AttentionBwdParams()
        self.params = bwd.call
        self._set_call(*arguments)
        self._set_rows("out", out)
        self._set_statistics(packed, row_max, row_sum)
        tensors = {f"call.{name}": tensor for name, tensor in self.tensors.items()}
        self.params, self.tensors = bwd, tensors
        grad_out = torch.zeros_like(out) if grad_out is None else contiguous_rows(grad_out)
        for name, tensor in zip(("out", "query", "key", "value"), (grad_out, *grads), strict=True):
            self._set_rows(f"grad_{name}", tensor)
        self._set_pointer("grad_lse", None if grad_lse is None else grad_lse.contiguous())
        if grad_weights is not None and grad_weights.numel():
            self._set_grad_weights(grad_weights)
        if need_bias and bias.shape == (bwd.call.B, bwd.call.H, bwd.call.M, bwd.call.N):
            self._set_scores("grad_bias", grad_bias.zero_(), strides_of(grad_bias))
        self._set_pointer("grad_sink", grad_sink if need_sink else None)
        column = self._rows_for(grad_bias)
        block_m = self._run(query.dtype, query.shape[0] if packed else 0, row_max)
        self._sum_bias(grad_bias, column, query.dtype, block_m)
        if need_relative_bias and bwd.call.N > 0:
            self._sum_scores(DIAGONALS, grad_relative_bias, 1, relative_bias.shape[0], block_m)
        else:
            grad_relative_bias.zero_()
        return results

    def _set_grad_weights(self, grad_weights):
        B, *H, M, N = grad_weights.stride()
        self._set_scores("grad_weights", grad_weights, (B, H[0] if H else 0, M, N))
        self.params.grad_weights_scale = 1.0 if H else 1 / self.params.call.H

    def _rows_for(self, grad_bias):
        """float32 [B, H, M] for what rows give a bias of one column; None where it is something else, or
        where rows give nothing."""
        call = self.params.call
        if grad_bias.numel() == 0 or self.params.grad_bias.data or grad_bias.shape[-1] > 1:
            return None
        if not call.sink and not self.params.grad_lse:
            return None
        rows = torch.zeros(call.B, call.H, call.M)
        self._set_pointer("row_grads", rows)
        return rows

    def _run(self, dtype, total, row_max):
        """Returns the queries of a tile."""
        plan = AttentionBwdPlan()
        planned = ctypes.c_int64(total), ctypes.c_int64(self.most_shared)
        plans().plan_attention_backward(ctypes.byref(self.params), *planned, ctypes.byref(plan))
        p = self.params
        if p.grad_weights.data:
            self._set_pointer("deltas", poisoned(row_max.shape, torch.float32))
            self._sum_scores(DELTAS, None, p.call.B, p.call.H, 0)
        workspace = {
            "pivots": plan.rows * 2,
            "zeros": plan.block_m * plan.block_d // (plan.threads // 32),
            "factors": plan.rows,
            "sums": plan.rows * plan.block_d,
            "sink_shares": p.call.H * p.call.B * p.call.tiles if p.grad_sink else 0,
        }
        for name, size in workspace.items():
            self._set_pointer(name, poisoned((size,), torch.float32) if size else None)
        garbage = lambda size: torch.full((size,), 1 << 30, dtype=torch.int32)
        self._set_pointer("turns", garbage(plan.rows // plan.block_m * WARPS))
        self._set_pointer("ticket", garbage(1))
        self._set_pointer("ranges", garbage(2 * p.call.B * p.call.H))

        given = [struct_argument(p, self.tensors)]
        zeros = self.tensors["zeros"].numel()
        self._launch_backward("rows", dtype, plan, plan.query_grid, [*given, plan.block_m, zeros])
        if p.grad_sink:
            sizes = p.call.B, p.call.H, p.call.tiles
            shares, target = self.tensors["sink_shares"], self.tensors["grad_sink"]
            self._sum_rows(dtype, plan, shares, target, sizes, (1, p.call.H, 1))
        self._launch_backward("keys", dtype, plan, plan.key_grid, given, plan.shared_bytes)
        self._launch_backward("queries", dtype, plan, plan.query_grid, given, plan.query_shared_bytes)
        self.plan = plan
        return plan.block_m

    def _launch_backward(self, name, dtype, plan, grid, given, shared_bytes=0):
        if grid:
            instance = backward_module(dtype, plan, self.arch).kernel(_instance(name, dtype, plan))
            how = {"shared_bytes": shared_bytes, "checks": self.checks}
            threads = 32 * WARPS if name == "rows" else plan.threads
            self.launched.append((instance.name, instance.launch(grid, threads, given, **how)))

    def _sum_rows(self, dtype, plan, rows, target, sizes, target_sizes):
        B, H, M = sizes
        target_B, target_H, target_M = target_sizes
        sums = RowSums(B=B, H=H, M=M, target_B=target_B, target_H=target_H, target_M=target_M)
        sums.dtype = DTYPES[target.dtype]
        given = [struct_argument(sums, {"from": rows, "target": target})]
        self._launch_backward("row_sums", dtype, plan, target_B * target_H * target_M, given)

    def _sum_bias(self, grad_bias, rows, dtype, block_m):
        call = self.params.call
        if grad_bias.numel() == 0 or self.params.grad_bias.data:
            return
        sizes = tuple(grad_bias.shape[:3])
        if rows is not None:
            self._sum_rows(dtype, self.plan, rows, grad_bias, (call.B, call.H, call.M), sizes)
        elif grad_bias.shape[-1] == 1:
            grad_bias.zero_()
        else:
            self._sum_scores(MATRIX if sizes[2] == call.M else ROW, grad_bias, *sizes[:2], block_m)

    def _sum_scores(self, kind, target, target_B, target_H, block_m):
        sums = AttentionSumsParams(kind=kind, factor=1.0, block_m=block_m, bwd=self.params)
        tensors = {f"bwd.{name}": tensor for name, tensor in self.tensors.items()}
        self._sum(sums, tensors, target, target_B, target_H)
