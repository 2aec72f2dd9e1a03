"""CUDA's returned weights, and the sums that backward runs, on CPU tensors: as emulated_attention.py."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from tests.ptxvm import nvcc

from .emulated_attention import AttentionEmulator
from .structures import CSRC, DTYPES, HERE, plans, poisoned, struct_argument, structure

AttentionBwdParams = structure("cuda/attention_bwd_plan.h", "AttentionBwdParams")
AttentionSumsParams = structure("cuda/attention_sums_plan.h", "AttentionSumsParams")
AttentionSumsPlan = structure("cuda/attention_sums_plan.h", "AttentionSumsPlan")
WEIGHTS, MATRIX, ROW, DIAGONALS, DELTAS = range(5)
THREADS, ADDING_THREADS = 128, 256


def sums_module(arch, float32):
    flags = (f"-I{CSRC}", f"-I{CSRC / 'cuda'}", f"-DFLOAT32={float32:d}")
    return nvcc.compile_module(HERE / "instances" / "attention_sums.cu", arch, *flags)


@dataclass
class AttentionSumsEmulator(AttentionEmulator):
    """Runs forward and the returned weights."""

    def attention_weights(self, row_max, row_sum, *arguments):
        """`arguments` as the schema has them."""
        *arguments, mean = arguments
        sums = AttentionSumsParams(kind=WEIGHTS)
        self.params = sums.bwd.call
        self._set_call(*arguments)
        call = self.params
        shape = (call.B, call.M, call.N) if mean else (call.B, call.H, call.M, call.N)
        weights = poisoned(shape, arguments[0].dtype)
        if weights.numel() == 0 or call.H == 0:
            return weights.zero_()
        self._set_statistics(arguments[10] is not None, row_max, row_sum)
        plans().describe_attention(ctypes.byref(call))
        sums.factor = 1 / call.H if mean else 1.0
        tensors = {f"bwd.call.{name}": tensor for name, tensor in self.tensors.items()}
        self._sum(sums, tensors, weights, call.B, 1 if mean else call.H)
        return weights

    def _set_statistics(self, packed, row_max, row_sum):
        assert row_max.is_contiguous() and row_sum.is_contiguous()
        self._set_pointer("row_max", row_max)
        self._set_pointer("row_sum", row_sum)
        strides = (0, row_max.stride(0)) if packed else row_max.stride()[:2]
        self.params.stats_stride_b, self.params.stats_stride_h = strides

    def _sum(self, sums, tensors, target, target_B, target_H):
        """Fills target, or with DELTAS, which has none, what the parameters name."""
        module = sums_module(self.arch, sums.bwd.call.dtype == DTYPES[torch.float32])
        plan = AttentionSumsPlan()
        plans().plan_score_sums(ctypes.byref(sums), target_B, target_H, ctypes.byref(plan))
        shares = poisoned((plan.shares * sums.share_stride,), torch.float32)
        if sums.kind == DIAGONALS:
            shares.zero_()
        if target is not None:
            written = shares if plan.shares else target
            tensors = tensors | {"target.data": written}
            sums.target.dtype = DTYPES[written.dtype]

        def launch(name, grid, threads, given):
            instance = module.kernel(name)
            self.launched.append((instance.name, instance.launch(grid, threads, given, checks=self.checks)))

        launch("attention_sums_kernel", plan.grid, THREADS, [struct_argument(sums, tensors)])
        if plan.shares:
            elements = sums.share_stride
            given = [shares, plan.shares, elements, target, DTYPES[target.dtype]]
            launch("attention_add_shares_kernel", -(-elements // ADDING_THREADS), ADDING_THREADS, given)
