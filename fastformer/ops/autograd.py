"""How every operator meets autograd: three Functions that know nothing of any one operator.

- `_Eager` and `_Transformable` share one forward and one backward. The second is the form that torch.func
  wants; it costs four times as much a call, so eager code does not pay for it. torch.compile takes the first:
  Dynamo binds the second's arguments wrongly where no gradient is wanted.
- Backward runs a backend's `<op>_bwd`. Where that must be differentiable in turn it runs inside `_Backward`,
  whose own backward is the derivative of the reference's composition.
- Forward mode and a call that falls to the reference do not come here: they run the composition itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import reference
from ..dispatch import choose, requested
from ..specs import WITHOUT_GRADIENT

Tensors = tuple[Tensor | None, ...]


class Operator:
    """What the Functions need to know of an operator. Tensors come in the order of specs.py."""

    name: str

    def composition(self, spec: Any, tensors: Tensors) -> tuple[Tensor, ...]:
        """The reference's differentiable outputs, in the order of `forward`'s."""
        raise NotImplementedError

    def forward(self, call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
        """Run the kernels; the differentiable outputs come first."""
        raise NotImplementedError

    def differentiable(self, spec: Any, tensors: Tensors) -> int:
        """How many of forward's outputs have a gradient."""
        raise NotImplementedError

    def saved(self, tensors: Tensors, outputs: tuple[Tensor, ...]) -> Tensors:
        """What backward reads."""
        raise NotImplementedError

    def backward(
        self, backend: ModuleType, spec: Any, needs: tuple[bool, ...], grads: Tensors, saved: Tensors
    ) -> Tensors:
        """One gradient, or None, for each of `tensors`; with the reference as backend, differentiably."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Call:
    operator: Operator
    spec: Any
    forward: ModuleType
    # None where no gradient is wanted.
    backward: ModuleType | None


def run(operator: Operator, spec: Any, tensors: Tensors, backend: str | None) -> tuple[Tensor, ...]:
    """Choose the backends of both directions and run. The tensors have been cast as autocast asks."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return run(operator, spec, tensors, backend)
    name = requested(backend)
    forward = choose(operator.name + "_fwd", spec, tensors, name)
    transformed = torch._C._are_functorch_transforms_active()
    # Dynamo can trace neither Function under vmap of grad, and kernels alone know nothing of transforms.
    composed = transformed and (torch.compiler.is_compiling() or operator.name in WITHOUT_GRADIENT)
    if forward is reference or _forward_mode() or composed:
        return operator.composition(spec, tensors)
    wants_grad = _wants_grad(tensors)
    if not transformed and not wants_grad:
        return operator.forward(Call(operator, spec, forward, None), tensors)
    # Whether a transform will differentiate cannot be told from the tensors: do not refuse for its sake.
    backward = choose(operator.name + "_bwd", spec, tensors, name if wants_grad else "auto")
    call = Call(operator, spec, forward, backward)
    function = _Transformable if transformed else _Eager
    return function.apply(call, *tensors)


def _forward_mode() -> bool:
    """A dual tensor that reached a kernel would get zero tangents, silently."""
    return forward_ad._current_level >= 0


def _wants_grad(tensors: Tensors) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _setup(ctx: Any, call: Call, tensors: Tensors, outputs: tuple[Tensor, ...]) -> None:
    ctx.call = call
    ctx.device = tensors[0].device.type  # type: ignore[union-attr]
    ctx.input_dtypes = [None if t is None else t.dtype for t in tensors]
    ctx.differentiable = call.operator.differentiable(call.spec, tensors)
    ctx.save_for_backward(*call.operator.saved(tensors, outputs))
    ctx.mark_non_differentiable(*outputs[ctx.differentiable :])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    call = ctx.call
    nothing = (None,) * (1 + len(ctx.input_dtypes))
    if torch.is_autocast_enabled(ctx.device):
        with torch.autocast(ctx.device, enabled=False):
            return _backward(ctx, *grads)
    # What torch.compile passes for an output without gradient is zeros, not None.
    grads = grads[: ctx.differentiable]
    if all(grad is None for grad in grads):
        return nothing
    needs, saved = ctx.needs_input_grad[1:], ctx.saved_tensors
    arguments = (call.operator, call.backward, call.spec, needs, len(grads))
    if torch.is_grad_enabled():
        results = _Backward.apply(*arguments, *grads, *saved)
    else:
        results = call.operator.backward(call.backward, call.spec, needs, grads, saved)
    return None, *(
        result.to(dtype) if need and result is not None else None
        for result, dtype, need in zip(results, ctx.input_dtypes, needs, strict=True)
    )


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Any:
        outputs = call.operator.forward(call, tensors)
        _setup(ctx, call, tensors, outputs)
        return outputs

    backward = staticmethod(_backward)


class _Transformable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, *tensors: Tensor | None) -> Any:
        return call.operator.forward(call, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _setup(ctx, inputs[0], inputs[1:], output)

    backward = staticmethod(_backward)


class _Backward(torch.autograd.Function):
    """An operator's backward as a function of the incoming gradients and the saved tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        operator: Operator,
        backend: ModuleType,
        spec: Any,
        needs: tuple[bool, ...],
        grad_count: int,
        *arguments: Tensor | None,
    ) -> Any:
        results = operator.backward(backend, spec, needs, arguments[:grad_count], arguments[grad_count:])
        # A gradient may be an incoming one itself (of b2, with one row), which a Function must not return.
        return tuple(
            r.clone() if r is not None and any(r is argument for argument in arguments) else r
            for r in results
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.operator, _, ctx.spec, ctx.needs, ctx.grad_count = inputs[:5]
        ctx.save_for_backward(*inputs[5:])
        ctx.given = tuple(result is not None for result in output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = ctx.saved_tensors
        places = [
            place
            for place, (tensor, need) in enumerate(zip(arguments, ctx.needs_input_grad[5:], strict=True))
            if tensor is not None and need
        ]

        def given_results(*arguments: Tensor | None) -> tuple[Tensor | None, ...]:
            grads, saved = arguments[: ctx.grad_count], arguments[ctx.grad_count :]
            results = ctx.operator.backward(reference, ctx.spec, ctx.needs, grads, saved)
            return tuple(result for result, given in zip(results, ctx.given, strict=True) if given)

        primals, pull = reference.vjp_at(given_results, arguments, places)
        cotangents = [grad for grad, given in zip(grads, ctx.given, strict=True) if given]
        second = pull(
            tuple(
                torch.zeros_like(primal) if grad is None else grad
                for primal, grad in zip(primals, cotangents, strict=True)
            )
        )
        return (None,) * 5 + second
