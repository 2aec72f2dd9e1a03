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

WHOLE, PADDED, GENERAL, FEW = range(4)
_FOLDERS = f"-I{CSRC}", f"-I{CSRC / 'cuda'}"


def kernel_name(dtype, plan):
    """A part of the mangled name."""
    return (
        f"attention_fwd_kernelILNS_5DTypeE{DTYPES[dtype]}ELi{plan.block_d}ELNS0_13AttentionKindE{plan.kind}EE"
    )


def kernel(dtype, plan, arch):
    """The instantiation of a plan, by itself, for ptxvm."""
    flags = (f"-DTYPE={DTYPES[dtype]}", f"-DWIDTH={plan.block_d}", f"-DKIND={plan.kind}")
    module = nvcc.compile_module(HERE / "instances" / "attention_fwd.cu", arch, *_FOLDERS, *flags)
    return module.kernel(kernel_name(dtype, plan))


def combine_kernel(arch):
    """What joins the splits of every call."""
    module = nvcc.compile_module(HERE / "instances" / "attention_combine.cu", arch, *_FOLDERS)
    return module.kernel("attention_combine_kernel")


def contiguous_rows(tensor):
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strides_of(tensor):
    """0 where a dimension has one element."""
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


@dataclass
class AttentionEmulator:
    """Runs the raw operators. `launched` gathers (kernel, counters) of everything that ran."""

    arch: str = "80"
    multiprocessors: int = 4
    few_queries: int = -1  # how many of a head go to their own kernel; -1: as the plan says
    splits: int | None = None  # of the keys of few queries; None: as the plan chooses
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
        self._set_lengths(lengths)

    def _set_lengths(self, lengths):
        if lengths is not None:
            self._set_pointer("key_lengths", lengths.contiguous())
            self.params.wide_lengths = lengths.dtype == torch.int64

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

    def paged_attention_fwd(
        self, query, key_pages, value_pages, page_table, lengths, sink, scale, left, right, softcap
    ):
        p = self.params = AttentionFwdParams()
        self.tensors = {}
        out = poisoned((*query.shape[:-1], value_pages.shape[-1]), query.dtype)
        lse = poisoned(query.shape[:-1], torch.float32)
        if lse.numel() == 0:
            return out, lse
        p.pages, p.page_size, H_kv, _ = key_pages.shape
        self._set_sizes(query, value_pages, H_kv, query.shape[0], query.shape[2])
        self._set_keys(page_table.shape[1] * p.page_size, left, right, True)
        self._set_rows("query", contiguous_rows(query))
        for name, pages in {"key": key_pages, "value": value_pages}.items():
            self._set_rows(name, contiguous_rows(pages).transpose(1, 2))
        page_table = page_table.contiguous()
        self._set_pointer("page_table", page_table)
        p.page_table_stride = page_table.shape[1]
        self._set_lengths(lengths)
        self._set_vectors(None, sink)
        p.scale, p.softcap, p.dropout_scale = scale, softcap or 0.0, 1.0
        self._set_results(False, out, lse, None, None)
        self._launch(query.dtype)
        return out, lse

    def _set_results(self, packed, out, lse, row_max, row_sum):
        self._set_rows("out", contiguous_rows(out))
        for name, tensor in {"lse": lse, "row_max": row_max, "row_sum": row_sum}.items():
            self._set_pointer(name, tensor)
        strides = (0, lse.stride(0)) if packed else lse.stride()[:2]
        self.params.stats_stride_b, self.params.stats_stride_h = strides
        self.params.rows = lse.numel()

    def _set_sizes(self, query, value, H_kv, B, M):
        p = self.params
        p.B, p.H, p.M, p.D, p.D_v = B, query.shape[1], M, query.shape[-1], value.shape[-1]
        p.group = p.H // max(H_kv, 1)
        p.dtype = DTYPES[query.dtype]

    def _set_keys(self, N, left, right, lower_right):
        p = self.params
        p.N = N
        open_side = p.M + p.N
        p.left, p.right = (open_side if side is None else min(side, open_side) for side in (left, right))
        p.lower_right = lower_right

    def _set_call(
        self, query, key, value, mask, padding, lengths, bias, relative_bias, sink, seed, starts_q, starts_k,
        scale, left, right, lower_right, softcap, dropout_p, longest_q, longest_k,
    ):  # fmt: skip
        """What every kernel of a call is told, into `params` and `tensors`."""
        p = self.params
        self.tensors = {}
        packed = starts_q is not None
        B = starts_q.shape[0] - 1 if packed else query.shape[0]
        M, N = (longest_q, longest_k) if packed else (query.shape[2], key.shape[2])
        self._set_sizes(query, value, key.shape[1], B, M)
        self._set_keys(N, left, right, lower_right)
        for name, tensor in {"query": query, "key": key, "value": value}.items():
            self._set_rows(name, contiguous_rows(tensor))
        self._set_masks(mask, padding, lengths, bias)
        self._set_vectors(relative_bias, sink)
        if packed:
            self._set_pointer("starts_q", starts_q.contiguous())
            self._set_pointer("starts_k", starts_k.contiguous())
        p.scale, p.softcap = scale, softcap or 0.0
        p.threshold = round(dropout_p * 65536)
        p.dropout_scale = 1.0
        if p.threshold > 0:
            p.dropout_scale = 65536 / (65536 - p.threshold) if p.threshold < 65536 else 0.0
            self._set_pointer("seed", seed)

    def _launch(self, dtype):
        p, plan = self.params, AttentionPlan()
        device = int(self.arch) // 10, self.multiprocessors
        plans().plan_attention(ctypes.byref(p), *device, self.few_queries, ctypes.byref(plan))
        if self.splits is not None and plan.kind == FEW:
            plans().divide_attention_keys(ctypes.byref(p), ctypes.byref(plan), self.splits)
        if plan.partial_rows:
            for name, columns in (("partial_out", p.partial_stride), ("partial_stats", 2)):
                self._set_pointer(name, poisoned((plan.partial_rows, columns), torch.float32))
        self._run_kernel(kernel(dtype, plan, self.arch), plan.grid, plan.threads, plan.shared_bytes)
        if plan.combine_grid:
            threads = plans().attention_combine_threads()
            self._run_kernel(combine_kernel(self.arch), plan.combine_grid, threads, 0)

    def _run_kernel(self, instance, grid, threads, shared_bytes):
        arguments = [struct_argument(self.params, self.tensors)]
        counters = instance.launch(grid, threads, arguments, shared_bytes=shared_bytes, checks=self.checks)
        self.launched.append((instance.name, counters))
