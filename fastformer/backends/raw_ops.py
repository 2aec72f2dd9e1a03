"""What the backends with kernels share: how their raw operators are called, and the dtypes that they take.

fastformer::norm_fwd_cpu, norm_fwd_cuda and norm_fwd_triton have one schema, so that a spec is spread over its
arguments here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..specs import AttentionSpec, FeedForwardSpec, NormSpec, PagedAttentionSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_in_graphs(function: _Function) -> _Function:
    """Have torch.compile call `function` and keep its result: it can trace nothing of what devices, drivers
    and the extension are asked. (torch.compiler.assume_constant_result imports all of Dynamo here.)"""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def dtype_refusal(tensors: tuple[Tensor | None, ...]) -> str | None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in _DTYPES and tensor.is_floating_point():
            given = str(tensor.dtype).removeprefix("torch.")
            return f"its kernels take float32, bfloat16 and float16, not {given}"
    return None


def functions(backend: str, ops: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """{name: the function of this module with that name, bound to the backend's raw operator}."""
    return {op: partial(globals()[op], backend) for op in ops}


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


def _spread(spec: AttentionSpec) -> tuple[Any, ...]:
    visibility = (spec.left, spec.right, spec.lower_right)
    return spec.scale, *visibility, spec.softcap, spec.dropout_p, spec.max_seqlen_q, spec.max_seqlen_k


def attention_fwd(backend: str, spec: AttentionSpec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """out, lse, row_max, row_sum."""
    return _raw("attention_fwd", backend)(*tensors, *_spread(spec))


def attention_weights(
    backend: str, spec: AttentionSpec, row_max: Tensor, row_sum: Tensor, *tensors: Tensor | None
) -> Tensor:
    """[B, H, M, N], or averaged over heads [B, M, N], as spec.return_weights says."""
    mean = spec.return_weights == "mean"
    return _raw("attention_weights", backend)(row_max, row_sum, *tensors, *_spread(spec), mean)


def attention_bwd(
    backend: str,
    spec: AttentionSpec,
    needs: tuple[bool, ...],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    *saved: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, bias, relative_bias and sink, None where there is no need of one.

    `saved`: out, row_max, row_sum, and the tensors of the call."""
    grads = _raw("attention_bwd", backend)(
        grad_out, grad_lse, grad_weights, *saved, *_spread(spec), *needs[3:]
    )
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def paged_attention_fwd(
    backend: str, spec: PagedAttentionSpec, *tensors: Tensor | None
) -> tuple[Tensor, ...]:
    """out, lse."""
    return _raw("paged_attention_fwd", backend)(*tensors, spec.scale, spec.left, spec.right, spec.softcap)


def feed_forward_fwd(
    backend: str, spec: FeedForwardSpec, *tensors: Tensor | None, save_pre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out, pre, pre_gate (empty unless save_pre)."""
    return _raw("feed_forward_fwd", backend)(*tensors, spec.activation, spec.dropout_p, save_pre)


def feed_forward_bwd(
    backend: str, spec: FeedForwardSpec, needs: tuple[bool, ...], *saved: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, b1, w_gate, b_gate, w2 and b2, None where there is no need of one.

    `saved`: grad_out, pre and pre_gate (empty: computed again), and the tensors of the call."""
    grads = _raw("feed_forward_bwd", backend)(*saved, spec.activation, spec.dropout_p, *needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
