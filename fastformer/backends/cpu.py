"""The CPU half of fastformer._C: kernels for SSE2, AVX2 and AVX-512; the machine's best is in use."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import raw_ops

# Importing the extension registers its operators.
try:
    from .. import _C  # type: ignore[attr-defined]  # noqa: F401
except ImportError as error:
    _missing: str | None = (
        f"the extension fastformer._C cannot be imported ({error}); install from source with a C++20 compiler"
    )
else:
    _missing = None

_SERVED = (
    "norm_fwd",
    "norm_bwd",
    "attention_fwd",
    "attention_bwd",
    "paged_attention_fwd",
    "feed_forward_fwd",
    "feed_forward_bwd",
)
_MAX_HEAD_DIM = 256


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
    refusal = raw_ops.dtype_refusal(tensors)
    if refusal is not None:
        return refusal
    if op in ("norm_fwd", "norm_bwd"):
        return "it takes rows of at least one column" if first.shape[-1] == 0 else None
    if op in ("attention_fwd", "attention_bwd", "paged_attention_fwd"):
        return _attention_refusal(tensors)
    _, w1, _, _, _, w2, *_ = tensors
    if any(matrix is not None and 0 in matrix.shape for matrix in (w1, w2)):
        return "its feed_forward takes weights of at least one row and one column"
    return None


def _attention_refusal(tensors: tuple[Tensor | None, ...]) -> str | None:
    query, _, value, *_ = tensors
    assert query is not None and value is not None
    for name, width in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if not 1 <= width <= _MAX_HEAD_DIM:
            return f"its attention takes head dims of 1 to {_MAX_HEAD_DIM}, and {name}'s is {width}"
    return None


globals().update(raw_ops.functions("cpu", (*_SERVED, "attention_weights")))
