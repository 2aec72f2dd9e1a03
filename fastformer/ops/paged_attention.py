"""paged_attention: few new queries, and keys and values that lie in the pages of a cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..specs import PAGED_ATTENTION_TENSORS, PagedAttentionSpec
from .attention_checks import visibility
from .autograd import Call, Operator, Tensors, run
from .checks import check_device, check_float, check_shape
from .library import define


def _paged_attention_fwd_fake(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:-1], value_pages.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


# The corner is always the lower right one, of each batch element's own length.
define(
    "paged_attention_fwd",
    "(Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_table, Tensor lengths, Tensor? sink,"
    " float scale, int? left, int? right, float? softcap) -> (Tensor out, Tensor lse)",
    _paged_attention_fwd_fake,
)


class PagedAttention(Operator):
    name = "paged_attention"

    def composition(self, spec: PagedAttentionSpec, tensors: Tensors) -> tuple[Tensor, ...]:
        return reference.paged_attention(spec, *tensors)  # type: ignore[arg-type]

    def forward(self, call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
        return call.forward.paged_attention_fwd(call.spec, *tensors)


_PAGED_ATTENTION = PagedAttention()


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of each sequence's newest queries over a cache in pages (Kwon et al., 2023), for serving.

    Key n of batch element b is key_pages[page_table[b, n // S], n % S], its value likewise, for n below
    lengths[b]. The M queries are the last of these positions: query i is at lengths[b] - M + i, so the cache
    holds the keys of the queries too. For inference: there is no gradient.

    - query [B, H, M, D], M from 1 in decoding to a whole prompt.
    - key_pages [P, S, H_kv, D] and value_pages [P, S, H_kv, D_v]: P pages of S tokens, in query's dtype
      (float32, bfloat16, float16; float64 on the reference), H a multiple of H_kv, any strides: one layer of
      a larger cache, or pages of [P, H_kv, S, D] transposed. Sequences may share pages. Under autocast query
      is cast to the dtype of the pages, which stay as they are.
    - page_table [B, pages] int32. A sequence's entries past its last used page may hold anything.
    - lengths [B] int32 or int64: how many keys are real, the M new ones included; at most pages * S count.
      What the pages hold elsewhere, NaN too, changes no bit of the result.
    - causal: a query sees keys up to its own position; False: every real key.
    - window (left, right): how many keys before and after its own position a query sees; None leaves a side
      open. softcap c: c * tanh(score / c). sink [H]: a logit that joins the softmax's denominator only.
      scale: 1 / sqrt(D) when None.

    Returns out [B, H, M, D_v]; with return_lse (out, lse), lse [B, H, M] float32. A query that sees no key
    (lengths[b] is 0 or, causal, its position negative) gives out 0 and lse -inf (with a sink: its logit).

    Raises ValueError for shapes, values, devices and where a tensor requires grad while grad mode is on,
    TypeError for dtypes, BackendError where `backend` names one that cannot serve.
    """
    for name, tensor in (("query", query), ("key_pages", key_pages), ("value_pages", value_pages)):
        check_float(name, tensor)
    if not isinstance(causal, bool):
        raise ValueError(
            f"causal is {causal!r}; wanted True or False: the last query is at the last key in either case"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; wanted a positive number, or None for no cap")
    left, right, _ = visibility("lower_right" if causal else False, window, "lower_right", False)
    scale = 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        query = query.to(key_pages.dtype)
    _check_pages(query, key_pages, value_pages)
    _check_integers("page_table", page_table, (torch.int32,), query)
    _check_integers("lengths", lengths, (torch.int32, torch.int64), query)
    B, H = query.shape[:2]
    if page_table.dim() != 2 or page_table.shape[0] != B:
        raise ValueError(
            f"page_table has shape {tuple(page_table.shape)}; wanted [{B}, pages], as query has batch {B}"
        )
    check_shape("lengths", lengths, (B,), "[B]")
    if sink is not None:
        check_float("sink", sink)
        check_device("sink", sink, query, "query")
        check_shape("sink", sink, (H,), "[H]")
    tensors = (query, key_pages, value_pages, page_table, lengths, sink)
    _check_no_gradient(tensors)
    spec = PagedAttentionSpec(scale, left, right, softcap)
    outputs = run(_PAGED_ATTENTION, spec, tensors, backend)
    return outputs if return_lse else outputs[0]


def _check_pages(query: Tensor, key_pages: Tensor, value_pages: Tensor) -> None:
    layouts = (
        ("query", query, "[B, H, M, D]"),
        ("key_pages", key_pages, "[P, S, H_kv, D]"),
        ("value_pages", value_pages, "[P, S, H_kv, D_v]"),
    )
    for name, tensor, layout in layouts:
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; wanted 4 dimensions, {layout}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; wanted {query.dtype}, which query has")
        check_device(name, tensor, query, "query")
    P, S, H_kv, D = key_pages.shape
    if tuple(value_pages.shape[:3]) != (P, S, H_kv):
        raise ValueError(
            f"value_pages has shape {tuple(value_pages.shape)}; wanted ({P}, {S}, {H_kv}, D_v), which begins "
            "as key_pages does"
        )
    if query.shape[-1] != D or D == 0:
        raise ValueError(
            f"query has head dimension {query.shape[-1]} and key_pages {D}; wanted one, of at least 1"
        )
    if P == 0 or S == 0:
        raise ValueError(f"key_pages has {P} pages of {S} tokens; wanted at least one of each")
    H = query.shape[1]
    if H_kv != H and (H_kv == 0 or H % H_kv):
        raise ValueError(f"query has {H} heads and key_pages {H_kv}; wanted a multiple of key_pages'")


def _check_integers(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; wanted a torch.Tensor")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {tensor.dtype}; wanted {wanted}")
    check_device(name, tensor, query, "query")


def _check_no_gradient(tensors: Tensors) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in zip(PAGED_ATTENTION_TENSORS, tensors, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, and paged_attention has no gradient: call it under torch.no_grad(), "
                "or detach() what it gets; attention on keys that lie together has one"
            )
