"""attention and scaled_dot_product_attention."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..specs import ATTENTION_TENSORS, AttentionSpec
from .attention_checks import check_attention, visibility
from .autograd import Call, Operator, Tensors, run
from .checks import FLOATS, check_float, resolve_seed
from .library import define

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? key_padding_mask, Tensor? key_lengths,"
    " Tensor? bias, Tensor? relative_bias, Tensor? sink, Tensor? seed, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k"
)
_SPEC = (
    "float scale, int? left, int? right, bool lower_right, float? softcap, float dropout_p,"
    " int? max_seqlen_q, int? max_seqlen_k"
)


def _attention_fwd_fake(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    packed = query.dim() == 3
    rows = (query.shape[1], query.shape[0]) if packed else query.shape[:-1]
    lse, row_max, row_sum = (query.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return out, lse, row_max, row_sum


# row_max is a row's largest score, row_sum its sum of exp(score - row_max); -inf and 0 where none
# is visible. exp(score - row_max) / row_sum is a weight to full precision, which exp(score - lse) is not.
define(
    "attention_fwd",
    f"({_TENSORS}, {_SPEC}) -> (Tensor out, Tensor lse, Tensor row_max, Tensor row_sum)",
    _attention_fwd_fake,
)


def _attention_weights_fake(row_max: Tensor, row_sum: Tensor, *arguments: Any, **named: Any) -> Tensor:
    query, key, cu_seqlens_q = arguments[0], arguments[1], arguments[10]
    max_seqlen_q, max_seqlen_k, mean = arguments[-3:]
    if cu_seqlens_q is None:
        (B, H, M, _), N = query.shape, key.shape[2]
    else:
        B, H, M, N = cu_seqlens_q.shape[0] - 1, query.shape[1], max_seqlen_q, max_seqlen_k
    return query.new_empty((B, M, N) if mean else (B, H, M, N))


define(
    "attention_weights",
    f"(Tensor row_max, Tensor row_sum, {_TENSORS}, {_SPEC}, bool mean) -> Tensor",
    _attention_weights_fake,
)


def _attention_bwd_fake(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    *arguments: Any,
    **named: Any,
) -> tuple[Tensor, ...]:
    query, key, value, _, _, _, bias, relative_bias, sink = arguments[:9]
    need_bias, need_relative_bias, need_sink = arguments[-3:]

    def given(tensor: Tensor | None, need: bool, dtype: torch.dtype | None) -> Tensor:
        shape = tensor.shape if tensor is not None and need else (0,)
        return query.new_empty(shape, dtype=dtype)

    return (
        *(tensor.new_empty(tensor.shape) for tensor in (query, key, value)),
        given(bias, need_bias, None if bias is None else bias.dtype),
        given(relative_bias, need_relative_bias, torch.float32),
        given(sink, need_sink, torch.float32),
    )


# Of the gradients of bias, relative_bias and sink those that are not needed are empty.
define(
    "attention_bwd",
    "(Tensor? grad_out, Tensor? grad_lse, Tensor? grad_weights, Tensor out, Tensor row_max, Tensor row_sum,"
    f" {_TENSORS}, {_SPEC}, bool need_bias, bool need_relative_bias, bool need_sink)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_bwd_fake,
)

# Places in ATTENTION_TENSORS of what has a gradient, in the order in which backward gives them.
_DIFFERENTIABLE = tuple(
    ATTENTION_TENSORS.index(name) for name in ("query", "key", "value", "bias", "relative_bias", "sink")
)


class Attention(Operator):
    name = "attention"

    def composition(self, spec: AttentionSpec, tensors: Tensors) -> tuple[Tensor, ...]:
        out, lse, weights = reference.attention(spec, *tensors)  # type: ignore[arg-type]
        return (out, lse) if weights is None else (out, lse, weights)

    def forward(self, call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
        out, lse, *row_stats = call.forward.attention_fwd(call.spec, *tensors)
        if call.spec.return_weights is None:
            return out, lse, *row_stats
        return out, lse, call.forward.attention_weights(call.spec, *row_stats, *tensors), *row_stats

    def differentiable(self, spec: AttentionSpec, tensors: Tensors) -> int:
        return 2 if spec.return_weights is None else 3

    def saved(self, tensors: Tensors, outputs: tuple[Tensor, ...]) -> Tensors:
        return outputs[0], *outputs[-2:], *tensors

    def backward(
        self,
        backend: ModuleType,
        spec: AttentionSpec,
        needs: tuple[bool, ...],
        grads: Tensors,
        saved: Tensors,
    ) -> Tensors:
        grad_out, grad_lse, grad_weights = (*grads, None)[:3]
        wanted = tuple(needs[place] for place in _DIFFERENTIABLE)
        results = backend.attention_bwd(spec, wanted, grad_out, grad_lse, grad_weights, *saved)
        by_place = dict(zip(_DIFFERENTIABLE, results, strict=True))
        return tuple(by_place.get(place) for place in range(len(ATTENTION_TENSORS)))


_ATTENTION = Attention()


def _autocast(tensors: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """Under autocast attention runs in the autocast dtype, float masks and biases too."""
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.dtype in FLOATS and t.dtype != torch.float64 else t
        for t in tensors
    )


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0


def _lengths(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[bool, int | None, int | None]:
    """Whether M = N is known, and the longest packed lengths, None where nothing is packed."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        if cu_seqlens_q is None and cu_seqlens_k is None and (max_seqlen_q, max_seqlen_k) != (None, None):
            raise ValueError(
                "max_seqlen_q or max_seqlen_k came without cu_seqlens_q and cu_seqlens_k: leave it out"
            )
        square = query.dim() == 4 and key.dim() == 4 and query.shape[2] == key.shape[2]
        return square, None, None
    square = cu_seqlens_q is cu_seqlens_k
    longest_q = _longest(cu_seqlens_q) if max_seqlen_q is None else max_seqlen_q
    if max_seqlen_k is None:
        max_seqlen_k = longest_q if square else _longest(cu_seqlens_k)
    return square, longest_q, max_seqlen_k


def _four_dims(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.dim() >= 4:
        return tensor
    return tensor[(None,) * (4 - tensor.dim())]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    corner: str | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    return_weights: bool | str = False,
    backend: str | None = None,
) -> Any:
    """Scaled dot-product attention (Vaswani et al., 2017) with everything that models add to it.

    score = scale * q·k → softcap → + bias → + relative bias → mask → softmax (with sink) → dropout → · v

    query [B, H, M, D], key [B, H_kv, N, D] and value [B, H_kv, N, D_v], H a multiple of H_kv, one dtype
    (float32, bfloat16, float16; float64 on the reference), any strides with a contiguous last dimension.
    Statistics are float32. Gradients: query, key, value, bias, relative_bias and sink.

    - mask: bool, broadcastable to [B, H, M, N]; True = may attend. Never expanded.
    - key_padding_mask [B, N] bool, True = real token; or key_lengths [B], the real keys of each row.
    - causal: True (M = N only), "upper_left" or "lower_right": which corner of the scores the diagonal meets.
    - window (left, right): how many keys before and after the diagonal are visible; None leaves a side open.
      The diagonal is causal's, or else `corner`'s, "upper_left" by default.
    - bias: float, broadcastable to [B, H, M, N]; its gradient is reduced to its own shape.
    - relative_bias [H or 1, M + N - 1]: entry j - i + M - 1 is added to score (i, j).
    - softcap c: c * tanh(score / c). sink [H]: a logit that joins the softmax's denominator only.
    - dropout_p drops weights wherever it is above 0 (pass 0 in evaluation); seed int64 [1] on the device,
      drawn from the device's default generator when None. The same seed drops the same on every backend.
    - cu_seqlens_q and cu_seqlens_k, both [S + 1] int32: packed sequences, query [total, H, D] and so on; b is
      then the sequence, i and j count within it, and relative_bias has max M + max N - 1 entries.
      max_seqlen_q and max_seqlen_k are the longest lengths, read from the device when None. Nested tensors
      of torch's jagged layout [B, H, j, D] are taken too.

    Returns out [B, H, M, D_v]; with return_lse or return_weights a tuple (out[, lse][, weights]). lse
    [B, H, M] (packed: [H, total]) is float32 and differentiable. weights are [B, H, M, N] (True or
    "per_head") or averaged over heads [B, M, N] ("mean"), after dropout. A query row that may attend to
    nothing gives out 0, lse -inf (with a sink: the sink's logit), weights 0, and no gradient.

    Raises ValueError for shapes, values and devices, TypeError for dtypes, BackendError where `backend`
    names one that cannot serve.
    """
    offsets = None
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_float(name, tensor)
    if query.is_nested:
        if cu_seqlens_q is not None or cu_seqlens_k is not None or return_weights:
            raise ValueError(
                "cu_seqlens or return_weights came with nested tensors, which carry their own offsets and "
                "have no form for weights: pass .values() and cu_seqlens instead"
            )
        query, key, value, offsets, cu_seqlens_q, cu_seqlens_k = _from_nested(query, key, value)
    square, longest_q, longest_k = _lengths(
        query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    )
    if return_weights not in (False, True, "per_head", "mean"):
        raise ValueError(f"return_weights is {return_weights!r}; wanted False, True, 'per_head' or 'mean'")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; wanted a positive number, or None for no cap")
    left, right, lower_right = visibility(causal, window, corner, square)
    spec = AttentionSpec(
        scale=1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale,
        left=left,
        right=right,
        lower_right=lower_right,
        softcap=softcap,
        dropout_p=dropout_p,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        return_weights="per_head" if return_weights is True else (return_weights or None),
    )
    floats = _autocast((query, key, value, bias, relative_bias, sink), query.device.type)
    query, key, value, bias, relative_bias, sink = floats
    masks = (_four_dims(mask), key_padding_mask, key_lengths)
    biases = (_four_dims(bias), relative_bias, sink)
    seed = resolve_seed(seed, dropout_p, query.device)
    tensors = (query, key, value, *masks, *biases, seed, cu_seqlens_q, cu_seqlens_k)
    check_attention(spec, tensors)
    outputs = run(_ATTENTION, spec, tensors, backend)
    if offsets is not None:
        lse = outputs[1].transpose(0, 1).contiguous()
        outputs = (_to_nested(outputs[0], offsets), _to_nested(lse, offsets))
    if not return_lse and not return_weights:
        return outputs[0]
    return outputs[:1] + (outputs[1:2] if return_lse else ()) + (outputs[2:3] if return_weights else ())


def _from_nested(query: Any, key: Any, value: Any) -> tuple[Tensor, ...]:
    """Packed query, key, value, query's offsets, cu_seqlens_q and cu_seqlens_k.

    Jagged [B, H, j, D] is [B, j, H, D] transposed: its values are the packed form, its offsets cu_seqlens."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_nested or tensor.layout != torch.jagged or tensor.dim() != 4:
            raise ValueError(
                f"{name} must be a nested tensor of layout torch.jagged, [B, H, j, D], as query is nested"
            )
    rows = [tensor.transpose(1, 2) for tensor in (query, key, value)]  # [B, j, H, D]
    offsets_q, offsets_k = rows[0].offsets(), rows[1].offsets()
    cu_seqlens_q = offsets_q.to(torch.int32)
    cu_seqlens_k = cu_seqlens_q if offsets_q is offsets_k else offsets_k.to(torch.int32)
    return *(row.values() for row in rows), offsets_q, cu_seqlens_q, cu_seqlens_k


def _to_nested(packed: Tensor, offsets: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(packed, offsets).transpose(1, 2)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: its signature, inputs and meaning.

    query [..., H, M, D], key [..., H, N, D], value [..., H, N, D_v], of 2 to 5 dimensions whose leading ones
    broadcast; attn_mask bool (True = may attend) or float (added), broadcastable to [..., H, M, N]. is_causal
    counts from the upper left corner and excludes attn_mask. dropout_p applies whenever it is above 0. A row
    that may attend to nothing gives 0. Raises as `attention` does.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_float(name, tensor)
    if is_causal and attn_mask is not None:
        raise ValueError(
            "is_causal came with attn_mask; wanted one of them: put the causal triangle into attn_mask"
        )
    if (
        attn_mask is not None
        and attn_mask.dtype != torch.bool
        and attn_mask.dtype not in (query.dtype, torch.float32)
    ):
        raise TypeError(
            f"attn_mask has dtype {attn_mask.dtype}; wanted bool, float32 or query's, {query.dtype}"
        )
    extra: dict[str, Any] = {
        "dropout_p": dropout_p,
        "scale": scale,
        "causal": "upper_left" if is_causal else False,
    }
    if query.is_nested:
        if attn_mask is not None:
            raise ValueError("attn_mask came with nested tensors; wanted none, as in torch")
        return attention(query, key, value, **extra)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; wanted [..., H, M, D] with at least 2 dimensions"
            )
    try:
        lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        heads = () if enable_gqa else torch.broadcast_shapes(*(t.shape[-3:-2] for t in (query, key, value)))
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ValueError(
            f"query, key and value have shapes {shapes}; wanted leading dimensions that broadcast "
            "(enable_gqa=True shares fewer key and value heads among query's)"
        ) from error
    if attn_mask is not None:
        if attn_mask.dim() > 3 and len(lead) > 1:
            # The dimensions that are folded into B must be whole.
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, len(lead) - 1)
        extra["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask
    out = attention(*(_fold(t, lead, heads) for t in (query, key, value)), **extra)
    all_matrices = max(query.dim(), key.dim(), value.dim()) == 2
    return out.reshape(*lead, *(() if all_matrices else out.shape[1:2]), *out.shape[2:])


def _fold(tensor: Tensor, lead: tuple[int, ...], heads: tuple[int, ...]) -> Tensor:
    """[prod(lead), H, M, D] of a tensor that broadcasts to [*lead, H, M, D]; `heads` () keeps its own H."""
    H = heads[0] if heads else (tensor.shape[-3] if tensor.dim() > 2 else 1)
    if tensor.dim() == 4 and tuple(tensor.shape[:2]) == (*lead, H):
        return tensor
    return tensor.expand(*lead, H, *tensor.shape[-2:]).reshape(math.prod(lead), H, *tensor.shape[-2:])
