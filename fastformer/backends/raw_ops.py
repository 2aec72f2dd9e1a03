"""What the backends with kernels share: how their raw operators are called, and the dtypes that they take.

fastformer::norm_fwd_cpu, norm_fwd_cuda and norm_fwd_triton have one schema, so that a spec is spread over its
arguments here and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..specs import AttentionSpec, FeedForwardSpec, NormSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_refusal(tensors: tuple[Tensor | None, ...]) -> str | None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in _DTYPES and tensor.is_floating_point():
            given = str(tensor.dtype).removeprefix("torch.")
            return f"its kernels take float32, bfloat16 and float16, not {given}"
    return None


def _raw(op: str, backend: str) -> Any:
    return getattr(torch.ops.fastformer, f"{op}_{backend}").default


def norm_fwd(
    backend: str,
    spec: NormSpec,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, sum (empty without a residual), mean (empty for rms), rstd."""
    return _raw("norm_fwd", backend)(
        x, residual, weight, bias, seed, spec.kind == "rms", spec.eps, spec.dropout_p
    )


def norm_bwd(
    backend: str,
    spec: NormSpec,
    grad_out: Tensor,
    grad_sum: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ds, dx (empty without dropout), dweight, dbias (float32, empty where not needed)."""
    rms, p = spec.kind == "rms", spec.dropout_p
    return _raw("norm_bwd", backend)(
        grad_out, grad_sum, s, weight, mean, rstd, seed, rms, p, need_dweight, need_dbias
    )


def attention_fwd(backend: str, spec: AttentionSpec, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """out, lse."""
    visibility = (spec.left, spec.right, spec.lower_right)
    longest = (spec.max_seqlen_q, spec.max_seqlen_k)
    return _raw("attention_fwd", backend)(
        *tensors, spec.scale, *visibility, spec.softcap, spec.dropout_p, *longest
    )


def feed_forward_fwd(
    backend: str, spec: FeedForwardSpec, *tensors: Tensor | None, save_pre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out, pre, pre_gate (empty unless save_pre)."""
    return _raw("feed_forward_fwd", backend)(*tensors, spec.activation, spec.dropout_p, save_pre)
