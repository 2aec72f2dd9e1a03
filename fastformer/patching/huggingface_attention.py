"""fastformer's attention behind transformers' attention and mask interfaces, under the name "fastformer"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from fastformer.ops.attention import attention

NAME = "fastformer"


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = False,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """One attention as transformers' models ask for it.

    Args:
        module: the asking attention module; its `is_causal` counts when the argument is None.
        query: [B, H, M, D]; key and value: [B, H_kv, N, D].
        attention_mask: bool (True = may attend) or float (added to the scores), broadcastable to
            [B, H, M, N].
        position_bias: float, added to the scores, broadcastable to [B, H, M, N].
        s_aux: [H] sink logits.

    Returns:
        out [B, M, H, D], contiguous, and the weights [B, H, M, N] (after dropout) if `output_attentions`.
    """
    if cache is not None:
        raise NotImplementedError('attn_implementation="fastformer" does not serve paged caches')
    mask, bias, key_padding_mask = None, position_bias, None
    if attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    else:
        # transformers means `is_causal` for calls without a mask; a mask already holds the causal part.
        is_causal = False
        if attention_mask.dtype != torch.bool:
            bias = attention_mask if bias is None else bias + attention_mask
        elif attention_mask.shape == (query.shape[0], 1, 1, key.shape[2]):
            key_padding_mask = attention_mask[:, 0, 0]
        else:
            mask = attention_mask
    result = attention(
        query,
        key,
        value,
        mask=mask,
        key_padding_mask=key_padding_mask,
        # A single query is the newest position and sees every key. With more keys than queries (prefill of a
        # static cache), those beyond the diagonal are still empty.
        causal="upper_left" if query.shape[2] > 1 and is_causal else False,
        bias=bias,
        softcap=softcap,
        sink=s_aux,
        scale=scaling,
        dropout_p=dropout,
        return_weights="per_head" if output_attentions else False,
    )
    out, weights = result if output_attentions else (result, None)
    return out.transpose(1, 2).contiguous(), weights


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `attention_forward` takes: padding alone as [B, 1, 1, N], the rest as for sdpa.

    Padding is passed on without a look at its values, which would make a GPU wait for itself.
    """
    padding_alone = mask_function is bidirectional_mask_function and allow_is_bidirectional_skip
    if padding_alone and attention_mask is None:
        return None
    if (
        padding_alone
        and attention_mask is not None
        and attention_mask.dtype == torch.bool
        and attention_mask.shape == (batch_size, kv_length)
        and isinstance(kv_offset, int)
        and kv_offset == 0
    ):
        return attention_mask[:, None, None, :]
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **kwargs,
    )


AttentionInterface.register(NAME, attention_forward)
# Without a mask function of this name transformers would pass no mask at all, padding included.
AttentionMaskInterface.register(NAME, make_mask)
