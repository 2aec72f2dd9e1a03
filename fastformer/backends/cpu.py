"""The CPU half of fastformer._C: kernels for SSE2, AVX2 and AVX-512; the machine's best is in use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..specs import AttentionSpec, FeedForwardSpec, NormSpec

# Importing the extension registers its operators.
try:
    from .. import _C  # type: ignore[attr-defined]  # noqa: F401
except ImportError as error:
    _missing: str | None = (
        f"the extension fastformer._C cannot be imported ({error}); install from source with a C++20 compiler"
    )
else:
    _missing = None

_SERVED = ("norm_fwd", "norm_bwd", "attention_fwd", "feed_forward_fwd")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256
_NOT_YET_IN_ATTENTION = ("bias", "relative_bias", "sink")


def ready() -> str | None:
    """None where CPU tensors can be served on this machine, else the reason why not."""
    return _missing


def why_not(op: str, spec: Any, tensors: tuple[Tensor | None, ...]) -> str | None:
    """None if `op` on these tensors can be served, else the reason in one sentence."""
    if _missing is not None:
        return _missing
    if op not in _SERVED:
        return f"it has no {op} yet"
    first = tensors[0]
    assert first is not None
    if first.device.type != "cpu":
        return f"it serves CPU tensors, not {first.device.type}"
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            return f"its kernels take float32, bfloat16 and float16, not {_name(tensor.dtype)}"
    if op in ("norm_fwd", "norm_bwd"):
        return "it takes rows of at least one column" if first.shape[-1] == 0 else None
    # query, key and value; or x, w1, w_gate and w2: their biases may differ.
    places = (0, 1, 2) if op == "attention_fwd" else (0, 1, 3, 5)
    matrices = [tensors[place] for place in places]
    for tensor in matrices:
        if tensor is not None and tensor.dtype != first.dtype:
            return f"its kernels take one dtype, not {_name(first.dtype)} together with {_name(tensor.dtype)}"
    if op == "attention_fwd":
        return _attention_refusal(spec, tensors)
    if any(tensor is not None and 0 in tensor.shape[-2:] for tensor in matrices[1:]):
        return "its feed_forward takes weights of at least one row and one column"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention_refusal(spec: AttentionSpec, tensors: tuple[Tensor | None, ...]) -> str | None:
    query, _, value, _, _, _, *extras, _, cu_seqlens_q, _ = tensors
    assert query is not None and value is not None
    for name, tensor in zip(_NOT_YET_IN_ATTENTION, extras, strict=True):
        if tensor is not None:
            return f"its attention has no {name} yet"
    if spec.softcap is not None:
        return "its attention has no softcap yet"
    if spec.dropout_p > 0:
        return "its attention has no dropout yet"
    if cu_seqlens_q is not None or query.dim() != 4:
        return "its attention has no packed sequences yet"
    if spec.return_weights is not None:
        return "its attention returns no weights yet"
    for name, width in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if not 1 <= width <= _MAX_HEAD_DIM:
            return f"its attention takes head dims of 1 to {_MAX_HEAD_DIM}, and {name}'s is {width}"
    return None


def norm_fwd(
    spec: NormSpec,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, sum, mean, rstd) as the raw operator fastformer::norm_fwd_cpu returns them."""
    return torch.ops.fastformer.norm_fwd_cpu.default(
        x, residual, weight, bias, seed, spec.kind == "rms", spec.eps, spec.dropout_p
    )


def norm_bwd(
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
    """(ds, dx, dweight, dbias) as the raw operator fastformer::norm_bwd_cpu returns them."""
    return torch.ops.fastformer.norm_bwd_cpu.default(
        grad_out, grad_sum, s, weight, mean, rstd, seed,
        spec.kind == "rms", spec.dropout_p, need_dweight, need_dbias,
    )  # fmt: skip


def attention_fwd(spec: AttentionSpec, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) as the raw operator fastformer::attention_fwd_cpu returns them."""
    return torch.ops.fastformer.attention_fwd_cpu.default(
        *tensors, spec.scale, spec.left, spec.right, spec.lower_right, spec.softcap, spec.dropout_p,
        spec.max_seqlen_q, spec.max_seqlen_k,
    )  # fmt: skip


def feed_forward_fwd(
    spec: FeedForwardSpec, *tensors: Tensor | None, save_pre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, pre, pre_gate) as the raw operator fastformer::feed_forward_fwd_cpu returns them."""
    return torch.ops.fastformer.feed_forward_fwd_cpu.default(
        *tensors, spec.activation, spec.dropout_p, save_pre
    )
