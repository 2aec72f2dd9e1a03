"""feed_forward: two products with an activation, a gate and dropout between them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..specs import FEED_FORWARD_TENSORS, FeedForwardSpec
from .autograd import Call, Operator, Tensors, run
from .checks import check_device, check_float, check_shape, resolve_seed
from .library import define

_PLAIN = ("relu", "gelu", "gelu_tanh", "silu", "relu2")
_GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def _feed_forward_fwd_fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = x.new_empty((*x.shape[:-1], w2.shape[0]))
    hidden = (*x.shape[:-1], w1.shape[0])
    pre = x.new_empty(hidden if save_pre else 0)
    return out, pre, x.new_empty(hidden if save_pre and w_gate is not None else 0)


define(
    "feed_forward_fwd",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor? w_gate, Tensor? b_gate, Tensor w2, Tensor? b2, Tensor? seed,"
    " str activation, float dropout_p, bool save_pre) -> (Tensor out, Tensor pre, Tensor pre_gate)",
    _feed_forward_fwd_fake,
)


def _feed_forward_bwd_fake(
    grad_out: Tensor, pre: Tensor, pre_gate: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, ...]:
    tensors, needs = arguments[:7], arguments[-7:]
    return tuple(
        grad_out.new_empty(tensor.shape if tensor is not None and need else (0,))
        for tensor, need in zip(tensors, needs, strict=True)
    )


# pre and pre_gate are empty where they are to be computed again. Gradients that are not needed are empty.
define(
    "feed_forward_bwd",
    "(Tensor grad_out, Tensor pre, Tensor pre_gate, Tensor x, Tensor w1, Tensor? b1, Tensor? w_gate,"
    " Tensor? b_gate, Tensor w2, Tensor? b2, Tensor? seed, str activation, float dropout_p, bool need_x,"
    " bool need_w1, bool need_b1, bool need_w_gate, bool need_b_gate, bool need_w2, bool need_b2)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _feed_forward_bwd_fake,
)


class FeedForward(Operator):
    name = "feed_forward"

    def composition(self, spec: FeedForwardSpec, tensors: Tensors) -> tuple[Tensor, ...]:
        return (reference.feed_forward(spec, *tensors),)  # type: ignore[arg-type]

    def forward(self, call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
        # The reference's backward recomputes from x, so that nothing needs to be kept for it.
        save_pre = call.backward not in (None, reference) and not call.spec.recompute
        return call.forward.feed_forward_fwd(call.spec, *tensors, save_pre=save_pre)

    def differentiable(self, spec: FeedForwardSpec, tensors: Tensors) -> int:
        return 1

    def saved(self, tensors: Tensors, outputs: tuple[Tensor, ...]) -> Tensors:
        return *outputs[1:], *tensors

    def backward(
        self,
        backend: ModuleType,
        spec: FeedForwardSpec,
        needs: tuple[bool, ...],
        grads: Tensors,
        saved: Tensors,
    ) -> Tensors:
        return *backend.feed_forward_bwd(spec, needs[:-1], grads[0], *saved), None


_FEED_FORWARD = FeedForward()


def _check(activation: str, named: dict[str, Tensor | None]) -> None:
    x, w1, w2, w_gate = named["x"], named["w1"], named["w2"], named["w_gate"]
    assert x is not None and w1 is not None and w2 is not None
    if activation not in _PLAIN and activation not in _GATED:
        raise ValueError(f"activation is {activation!r}; wanted {', '.join(map(repr, (*_PLAIN, *_GATED)))}")
    if activation in _GATED and w_gate is None:
        raise ValueError(f"w_gate is missing; activation {activation!r} is gated and needs one [F, E]")
    if activation in _PLAIN and w_gate is not None:
        raise ValueError(
            f"w_gate came with activation {activation!r}; wanted a gated one, {', '.join(map(repr, _GATED))}"
        )
    if named["b_gate"] is not None and w_gate is None:
        raise ValueError("b_gate came without w_gate")
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; wanted {x.dtype}, which x has")
        check_device(name, tensor, x, "x")
    if x.dim() == 0:
        raise ValueError("x has no dimensions; wanted [..., E]")
    for name, tensor in (("w1", w1), ("w2", w2)):
        if tensor.dim() != 2:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; wanted two dimensions, as torch.nn.Linear has"
            )
    E, F, E_out = x.shape[-1], w1.shape[0], w2.shape[0]
    wanted = {"w1": (F, E), "w_gate": (F, E), "b1": (F,), "b_gate": (F,), "w2": (E_out, F), "b2": (E_out,)}
    meanings = {
        "w1": "[F, E]",
        "w_gate": "[F, E]",
        "b1": "[F]",
        "b_gate": "[F]",
        "w2": "[E_out, F]",
        "b2": "[E_out]",
    }
    for name, shape in wanted.items():
        tensor = named[name]
        if tensor is not None:
            check_shape(name, tensor, shape, meanings[name])


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The Transformer's feed-forward block: dropout(activation(x w1ᵀ + b1)) w2ᵀ + b2.

    x [..., E], w1 [F, E], b1 [F], w2 [E_out, F], b2 [E_out] as torch.nn.Linear holds them, one float dtype.
    activation: "relu", "gelu" (erf), "gelu_tanh", "silu", "relu2" (So et al., 2021); or gated (Shazeer,
    2020): "swiglu", "geglu", "geglu_tanh", "reglu", which need w_gate [F, E] and take b_gate [F]:
    act(x w_gateᵀ + b_gate) * (x w1ᵀ + b1).
    dropout_p drops hidden elements wherever it is above 0: pass 0 in evaluation; seed as in `add_norm`.
    Backward reads x and what w1 and w_gate gave; with recompute=True, x alone. Under autocast it runs in the
    autocast dtype. Returns [..., E_out] in x's dtype. Raises ValueError for shapes, values and devices,
    TypeError for dtypes, BackendError where `backend` names one that cannot serve.
    """
    for name, tensor in (("x", x), ("w1", w1), ("w2", w2)):
        check_float(name, tensor)
    tensors: tuple[Tensor | None, ...] = (x, w1, b1, w_gate, b_gate, w2, b2)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors)
    _check(activation, dict(zip(FEED_FORWARD_TENSORS, tensors)))  # noqa: B905 (the seed comes after)
    spec = FeedForwardSpec(_GATED.get(activation, activation), w_gate is not None, dropout_p, recompute)
    return run(_FEED_FORWARD, spec, (*tensors, resolve_seed(seed, dropout_p, x.device)), backend)[0]
