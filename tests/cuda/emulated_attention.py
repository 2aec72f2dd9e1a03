"""CUDA attention on CPU tensors: the launcher's part in Python, the plan from attention_plan.h, the PTX on
ptxvm."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch

from tests import ptxvm
from tests.ptxvm import nvcc

from .structures import CSRC, DTYPES, HERE, plans, poisoned, struct_argument, structure

HeadRows = structure("shapes.h", "HeadRows")
ScoreMatrix = structure("shapes.h", "ScoreMatrix")
AttentionFwdParams = structure("cuda/attention_plan.h", "AttentionFwdParams")
AttentionTile = structure("cuda/attention_plan.h", "AttentionTile")
AttentionPlan = structure("cuda/attention_plan.h", "AttentionPlan")


def kernel_name(dtype, plan):
    """A part of the mangled name."""
    return (
        f"attention_fwd_kernelILNS_5DTypeE{DTYPES[dtype]}ELi{plan.block_d}ELNS0_13AttentionKindE{plan.kind}EE"
    )


def kernel(dtype, plan, arch):
    """The instantiation of a plan, by itself, for ptxvm."""
    flags = (f"-DTYPE={DTYPES[dtype]}", f"-DWIDTH={plan.block_d}", f"-DKIND={plan.kind}")
    folders = (f"-I{CSRC}", f"-I{CSRC / 'cuda'}")
    module = nvcc.compile_module(HERE / "instances" / "attention_fwd.cu", arch, *folders, *flags)
    return module.kernel(kernel_name(dtype, plan))


def contiguous_rows(tensor):
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strides_of(tensor):
    """0 where a dimension has one element."""
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


@dataclass
class AttentionEmulator:
    """Runs the raw operator. `launched` gathers (kernel, counters) of everything that ran."""

    arch: str = "80"
    checks: ptxvm.Checks | None = None
    launched: list = field(default_factory=list)
    params: AttentionFwdParams = None
    tensors: dict = None  # {path of a pointer in the parameters: tensor}

    def _set_rows(self, name, tensor):
        strides = strides_of(tensor)[:-1]
        if tensor.dim() == 3:
            strides = [0, strides[1], strides[0]]
        self.tensors[f"{name}.data"] = tensor
        setattr(self.params, name, HeadRows(tensor.data_ptr(), *strides))

    def _set_scores(self, name, tensor, strides):
        if tensor is not None:
            self.tensors[f"{name}.data"] = tensor
            dtype = DTYPES.get(tensor.dtype, 0)
            setattr(self.params, name, ScoreMatrix(tensor.data_ptr(), dtype, *strides))

    def _set_pointer(self, name, tensor):
        if tensor is not None:
            self.tensors[name] = tensor
            setattr(self.params, name, tensor.data_ptr())

    def _set_masks(self, mask, padding, lengths, bias):
        if mask is not None and mask.shape[2] == 1:
            self._set_scores("key_mask", mask, strides_of(mask))
        else:
            self._set_scores("mask", mask, mask is not None and strides_of(mask))
        if padding is not None:
            self._set_scores("padding", padding, (padding.stride(0), 0, 0, padding.stride(1)))
        self._set_scores("bias", bias, bias is not None and strides_of(bias))
        if lengths is not None:
            lengths = lengths.contiguous()
            self.params.wide_lengths = lengths.dtype == torch.int64
        self._set_pointer("key_lengths", lengths)

    def _set_vectors(self, relative_bias, sink):
        p = self.params
        if relative_bias is not None:
            relative_bias = contiguous_rows(relative_bias)
            p.relative_bias_stride_h = strides_of(relative_bias)[0]
            p.relative_bias_dtype = DTYPES[relative_bias.dtype]
        self._set_pointer("relative_bias", relative_bias)
        if sink is not None:
            sink = sink.contiguous()
            p.sink_dtype = DTYPES[sink.dtype]
        self._set_pointer("sink", sink)

    def attention_fwd(self, query, key, value, *arguments):
        """`arguments` as the schema has them."""
        self.params = AttentionFwdParams()
        packed = arguments[7] is not None
        out = poisoned((*query.shape[:-1], value.shape[-1]), query.dtype)
        rows = (query.shape[1], query.shape[0]) if packed else query.shape[:-1]
        lse, row_max, row_sum = (poisoned(rows, torch.float32) for _ in range(3))
        results = out, lse, row_max, row_sum
        if lse.numel() == 0:
            return results
        self._set_call(query, key, value, *arguments)
        self._set_results(packed, *results)
        self._launch(query.dtype)
        return results

    def _set_results(self, packed, out, lse, row_max, row_sum):
        self._set_rows("out", contiguous_rows(out))
        for name, tensor in {"lse": lse, "row_max": row_max, "row_sum": row_sum}.items():
            self._set_pointer(name, tensor)
        strides = (0, row_max.stride(0)) if packed else row_max.stride()[:2]
        self.params.stats_stride_b, self.params.stats_stride_h = strides

    def _set_call(
        self, query, key, value, mask, padding, lengths, bias, relative_bias, sink, seed, starts_q, starts_k,
        scale, left, right, lower_right, softcap, dropout_p, longest_q, longest_k,
    ):  # fmt: skip
        """What every kernel of a call is told, into `params` and `tensors`."""
        p = self.params
        self.tensors = {}
        packed = starts_q is not None
        p.B = starts_q.shape[0] - 1 if packed else query.shape[0]
        p.M, p.N = (longest_q, longest_k) if packed else (query.shape[2], key.shape[2])
        p.H, p.D, p.D_v = query.shape[1], query.shape[-1], value.shape[-1]
        p.group = p.H // max(key.shape[1], 1)
        for name, tensor in {"query": query, "key": key, "value": value}.items():
            self._set_rows(name, contiguous_rows(tensor))
        self._set_masks(mask, padding, lengths, bias)
        self._set_vectors(relative_bias, sink)
        if packed:
            self._set_pointer("starts_q", starts_q.contiguous())
            self._set_pointer("starts_k", starts_k.contiguous())
        open_side = p.M + p.N
        p.left, p.right = (open_side if side is None else min(side, open_side) for side in (left, right))
        p.lower_right, p.scale, p.softcap = lower_right, scale, softcap or 0.0
        p.dtype = DTYPES[query.dtype]
        p.threshold = round(dropout_p * 65536)
        p.dropout_scale = 1.0
        if p.threshold > 0:
            p.dropout_scale = 65536 / (65536 - p.threshold) if p.threshold < 65536 else 0.0
            self._set_pointer("seed", seed)

    def _launch(self, dtype):
        plan = AttentionPlan()
        plans().plan_attention(ctypes.byref(self.params), int(self.arch) // 10, ctypes.byref(plan))
        instance = kernel(dtype, plan, self.arch)
        counters = instance.launch(
            plan.grid,
            plan.threads,
            [struct_argument(self.params, self.tensors)],
            shared_bytes=plan.shared_bytes,
            checks=self.checks,
        )
        self.launched.append((instance.name, counters))
