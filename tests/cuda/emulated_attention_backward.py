"""CUDA attention with gradients on CPU tensors: as emulated_attention.py, which runs forward."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from tests.ptxvm import nvcc

from .emulated_attention import AttentionEmulator, contiguous_rows, strides_of
from .structures import CSRC, DTYPES, HERE, plans, poisoned, struct_argument, structure

AttentionBwdParams = structure("cuda/attention_bwd_plan.h", "AttentionBwdParams")
AttentionBwdPlan = structure("cuda/attention_bwd_plan.h", "AttentionBwdPlan")
BackwardTile = structure("cuda/attention_bwd_plan.h", "BackwardTile")
# Bytes of shared memory that a block may have.
A100, ADA = 163 * 1024, 99 * 1024
WARPS = 8


def backward_module(dtype, plan, arch):
    flags = (f"-DTYPE={DTYPES[dtype]}", f"-DWIDTH={plan.block_d}", f"-DPLAIN={plan.plain}")
    folders = (f"-I{CSRC}", f"-I{CSRC / 'cuda'}")
    return nvcc.compile_module(HERE / "instances" / "attention_bwd.cu", arch, *folders, *flags)


def _instance(name, dtype, plan):
    """A part of the mangled name."""
    if name in ("rows", "sink"):  # of which there is one
        return f"attention_bwd_{name}_kernel"
    return f"attention_bwd_{name}_kernelILNS_5DTypeE{DTYPES[dtype]}ELi{plan.block_d}ELb{plan.plain}E"


@dataclass
class AttentionBackwardEmulator(AttentionEmulator):
    """Runs both raw operators."""

    most_shared: int = A100

    def attention_bwd(self, grad_out, grad_lse, grad_weights, out, row_max, row_sum, *arguments):
        *arguments, need_bias, need_relative_bias, need_sink = arguments
        query, key, value, bias, sink = (arguments[place] for place in (0, 1, 2, 6, 8))
        packed = arguments[10] is not None
        assert grad_weights is None and not need_relative_bias
        grads = [poisoned(t.shape, t.dtype) for t in (query, key, value)]
        grad_bias = torch.zeros(bias.shape if need_bias else (0,), dtype=bias.dtype if need_bias else None)
        grad_sink = poisoned(sink.shape if need_sink else (0,), torch.float32)
        results = *grads, grad_bias, torch.zeros(0), grad_sink
        if query.numel() == 0:
            return tuple(result.zero_() for result in results)
        bwd = AttentionBwdParams()
        self.params = bwd.call
        self._set_call(*arguments)
        self._set_results(packed, out, row_max, row_max, row_sum)
        tensors = {f"call.{name}": tensor for name, tensor in self.tensors.items() if name != "lse"}
        self.params, self.tensors = bwd, tensors
        grad_out = torch.zeros_like(out) if grad_out is None else contiguous_rows(grad_out)
        for name, tensor in zip(("out", "query", "key", "value"), (grad_out, *grads), strict=True):
            self._set_rows(f"grad_{name}", tensor)
        self._set_pointer("grad_lse", None if grad_lse is None else grad_lse.contiguous())
        if need_bias:
            assert bias.shape == (bwd.call.B, bwd.call.H, bwd.call.M, bwd.call.N)
            self._set_scores("grad_bias", grad_bias, strides_of(grad_bias))
        self._set_pointer("grad_sink", grad_sink if need_sink else None)
        self._run(query.dtype, query.shape[0] if packed else 0)
        return results

    def _run(self, dtype, total):
        plan = AttentionBwdPlan()
        planned = ctypes.c_int64(total), ctypes.c_int64(self.most_shared)
        plans().plan_attention_backward(ctypes.byref(self.params), *planned, ctypes.byref(plan))
        p = self.params
        workspace = {
            "pivots": plan.rows * 2,
            "zeros": plan.block_m * plan.block_d // WARPS,
            "factors": plan.rows,
            "sums": plan.rows * plan.block_d,
            "sink_shares": p.call.H * p.call.B * p.call.tiles if p.grad_sink else 0,
        }
        for name, size in workspace.items():
            self._set_pointer(name, poisoned((size,), torch.float32) if size else None)
        garbage = lambda size: torch.full((size,), 1 << 30, dtype=torch.int32)
        self._set_pointer("turns", garbage(plan.rows // plan.block_m * WARPS))
        self._set_pointer("ticket", garbage(1))
        module = backward_module(dtype, plan, self.arch)

        def launch(name, grid, shared_bytes, *more):
            if grid:
                instance = module.kernel(_instance(name, dtype, plan))
                given = [struct_argument(p, self.tensors), *more]
                how = {"shared_bytes": shared_bytes, "checks": self.checks}
                self.launched.append((instance.name, instance.launch(grid, plan.threads, given, **how)))

        launch("rows", plan.query_grid, 0, plan.block_m, plan.block_m * plan.block_d // WARPS)
        launch("sink", p.call.H if p.grad_sink else 0, 0)
        launch("keys", plan.key_grid, plan.shared_bytes)
        launch("queries", plan.query_grid, plan.query_shared_bytes)
