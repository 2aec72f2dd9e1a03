"""What attention accepts: shapes, dtypes, devices, and the one normal form of who may see whom."""

from __future__ import annotations

import torch
from torch import Tensor

from ..specs import ATTENTION_TENSORS, AttentionSpec
from .checks import check_device, check_float, check_shape

CORNERS = ("upper_left", "lower_right")


def visibility(
    causal: bool | str, window: tuple[int | None, int | None] | None, corner: str | None, square: bool
) -> tuple[int | None, int | None, bool]:
    """AttentionSpec's left, right and lower_right. `square` says that M = N, where the corners coincide."""
    if causal not in (False, True, *CORNERS):
        raise ValueError(f"causal is {causal!r}; wanted False, True, 'upper_left' or 'lower_right'")
    if corner is not None and corner not in CORNERS:
        raise ValueError(f"corner is {corner!r}; wanted 'upper_left' or 'lower_right'")
    if causal is True and corner is None and not square:
        raise ValueError(
            "causal is True where M and N differ, which leaves the diagonal's place open; wanted "
            "causal='upper_left' (query 0 sees key 0) or causal='lower_right' (the last query sees every key)"
        )
    if isinstance(causal, str) and corner is not None and corner != causal:
        raise ValueError(f"corner is {corner!r} and causal {causal!r}; wanted one corner: leave `corner` out")
    left = right = None
    if window is not None:
        if len(window) != 2:
            raise ValueError(f"window is {window!r}; wanted (left, right)")
        for side in window:
            if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0):
                raise ValueError(f"window is {window!r}; wanted two ints ≥ 0, or None for an open side")
        left, right = window
    if causal is not False:
        right = 0
    place = causal if isinstance(causal, str) else (corner or "upper_left")
    return left, right, place == "lower_right" and (left is not None or right is not None)


def check_attention(spec: AttentionSpec, tensors: tuple[Tensor | None, ...]) -> None:
    named = dict(zip(ATTENTION_TENSORS, tensors, strict=True))
    query, key, value = tensors[:3]
    assert query is not None and key is not None and value is not None
    packed = named["cu_seqlens_q"] is not None or named["cu_seqlens_k"] is not None
    if packed:
        _check_packed(named)
    dims, layout = (3, "[total, H, D]") if packed else (4, "[B, H, M, D]")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != dims:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; wanted {dims} dimensions, {layout}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; wanted {query.dtype}, which query has")
        check_device(name, tensor, query, "query")
    head_axis, length_axis = (1, 0) if packed else (1, 2)
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has head dimension {key.shape[-1]}; wanted {query.shape[-1]}, which query has")
    if query.shape[-1] == 0:
        raise ValueError("query has head dimension 0; wanted at least 1")
    for axis, what in ((0, "batch"), (head_axis, "heads"), (length_axis, "length")):
        if key.shape[axis] != value.shape[axis]:
            raise ValueError(f"value has {what} {value.shape[axis]}; wanted {key.shape[axis]}, which key has")
    if not packed and key.shape[0] != query.shape[0]:
        raise ValueError(f"key has batch {key.shape[0]}; wanted {query.shape[0]}, which query has")
    H, H_kv = query.shape[head_axis], key.shape[head_axis]
    if H_kv != H and (H_kv == 0 or H % H_kv):
        raise ValueError(f"query has {H} heads and key {H_kv}; wanted a multiple of key's")
    B = query.shape[0] if not packed else named["cu_seqlens_q"].shape[0] - 1  # type: ignore[union-attr]
    M = spec.max_seqlen_q if packed else query.shape[2]
    N = spec.max_seqlen_k if packed else key.shape[2]
    assert M is not None and N is not None
    _check_masks(named, (B, H, M, N), query)
    _check_biases(named, (B, H, M, N), query)


def _check_packed(named: dict[str, Tensor | None]) -> None:
    for name in ("key_padding_mask", "key_lengths"):
        if named[name] is not None:
            raise ValueError(
                f"{name} came with packed sequences, whose lengths cu_seqlens already gives: leave it out"
            )
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        bounds = named[name]
        if bounds is None:
            raise ValueError(f"{name} is missing; packed sequences need both cu_seqlens_q and cu_seqlens_k")
        if bounds.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {bounds.dtype}; wanted int32")
        if bounds.dim() != 1 or bounds.shape[0] == 0:
            raise ValueError(f"{name} has shape {tuple(bounds.shape)}; wanted [S + 1], from 0 to the total")
        check_device(name, bounds, named["query"], "query")  # type: ignore[arg-type]
    q, k = named["cu_seqlens_q"], named["cu_seqlens_k"]
    assert q is not None and k is not None
    if q.shape != k.shape:
        raise ValueError(
            f"cu_seqlens_k has shape {tuple(k.shape)}; wanted {tuple(q.shape)}, which cu_seqlens_q has"
        )


def _broadcastable(tensor: Tensor, shape: tuple[int, int, int, int]) -> bool:
    return tensor.dim() == 4 and all(
        size in (1, want) for size, want in zip(tensor.shape, shape, strict=True)
    )


def _check_masks(named: dict[str, Tensor | None], shape: tuple[int, int, int, int], query: Tensor) -> None:
    B, _, _, N = shape
    mask, padding, lengths = named["mask"], named["key_padding_mask"], named["key_lengths"]
    for name, tensor in (("mask", mask), ("key_padding_mask", padding)):
        if tensor is None:
            continue
        if tensor.dtype != torch.bool:
            hint = (
                "; a float mask is added to the scores: pass it as bias" if tensor.is_floating_point() else ""
            )
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; wanted bool, True where a query may attend{hint}"
            )
        check_device(name, tensor, query, "query")
    if mask is not None and not _broadcastable(mask, shape):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; wanted one that broadcasts to {shape}, [B, H, M, N]"
        )
    if padding is not None:
        check_shape("key_padding_mask", padding, (B, N), "[B, N]")
    if lengths is not None:
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"key_lengths has dtype {lengths.dtype}; wanted int32 or int64")
        check_shape("key_lengths", lengths, (B,), "[B]")
        check_device("key_lengths", lengths, query, "query")


def _check_biases(named: dict[str, Tensor | None], shape: tuple[int, int, int, int], query: Tensor) -> None:
    _, H, M, N = shape
    bias, relative, sink = named["bias"], named["relative_bias"], named["sink"]
    for name, tensor in (("bias", bias), ("relative_bias", relative), ("sink", sink)):
        if tensor is None:
            continue
        if tensor.dtype == torch.bool:
            raise TypeError(f"{name} has dtype torch.bool; wanted a float dtype: pass a bool mask as mask")
        check_float(name, tensor)
        check_device(name, tensor, query, "query")
    if bias is not None and not _broadcastable(bias, shape):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; wanted one that broadcasts to {shape}, [B, H, M, N]"
        )
    if relative is not None:
        wanted = max(M + N - 1, 0)
        if relative.dim() != 2 or relative.shape[0] not in (1, H) or relative.shape[1] != wanted:
            raise ValueError(
                f"relative_bias has shape {tuple(relative.shape)}; wanted [{H} or 1, {wanted}], "
                "which is [H or 1, M + N - 1]"
            )
    if sink is not None:
        check_shape("sink", sink, (H,), "[H]")
