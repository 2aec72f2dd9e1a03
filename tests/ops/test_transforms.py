"""What PyTorch does to functions, done to every operator: derivatives of all orders, vmap, autocast, hooks.

Transformed results are judged by the same transform of the plain formula. Compilers are in test_compile.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastformer
from fastformer.testing import attention_inputs, feed_forward_inputs, norm_inputs, outputs_and_gradients

from .judging import assert_accurate_over_draws, assert_same_bits
from .operators import OPERATORS, as_tuple

each_operator = pytest.mark.parametrize("name", OPERATORS)
each_batched_operator = pytest.mark.parametrize("name", [n for n, op in OPERATORS.items() if op.batches])


@each_operator
def test_gradcheck(name):
    operator = OPERATORS[name]
    inputs = operator.inputs(torch.float64)
    gradcheck(operator.ours, inputs, fast_mode=True)
    gradcheck(operator.ours, inputs[:1] + tuple(t.detach() for t in inputs[1:]))


@each_operator
def test_gradcheck_in_forward_mode(name):
    operator = OPERATORS[name]
    gradcheck(operator.ours, operator.inputs(torch.float64), check_forward_ad=True, check_backward_ad=False)


@each_operator
def test_gradgradcheck(name):
    operator = OPERATORS[name]
    gradgradcheck(operator.ours, operator.inputs(torch.float64), fast_mode=True)


# --- the same transform of the plain formula is the judge, in float32 and on whatever backend serves it


def judge_transform(name, transform, batch=()):
    """`transform(fn, inputs)` -> tensors."""
    operator = OPERATORS[name]

    def run(fn, dtype, draw):
        results = transform(fn, operator.inputs(dtype, batch, seed=draw))
        return {str(index): t.detach() for index, t in enumerate(tree_leaves(results))}

    def three_results(draw):
        return (
            run(operator.ours, torch.float32, draw),
            run(operator.plain, torch.float32, draw),
            run(operator.plain, torch.float64, draw),
        )

    assert_accurate_over_draws(three_results, name)
    # float64 goes to the reference, which must give the oracle itself.
    torch.testing.assert_close(
        run(operator.ours, torch.float64, 0), run(operator.plain, torch.float64, 0), rtol=1e-9, atol=1e-10
    )


def tangents_of(inputs):
    return tuple(torch.cos(7 * t.detach()) for t in inputs)


def total(fn):
    return lambda *args: sum(out.square().sum() for out in as_tuple(fn(*args)))


def every_argument(inputs):
    return tuple(range(len(inputs)))


def grads(fn, inputs):
    return torch.func.grad(total(fn), argnums=every_argument(inputs))(*inputs)


def jvp(fn, inputs):
    return torch.func.jvp(fn, inputs, tangents_of(inputs))


def dual_tensors(fn, inputs):
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(t.detach(), tangent)
            for t, tangent in zip(inputs, tangents_of(inputs), strict=True)
        ]
        unpacked = [forward_ad.unpack_dual(out) for out in as_tuple(fn(*duals))]
        assert all(out.tangent is not None for out in unpacked)
        return [out.primal for out in unpacked], [out.tangent for out in unpacked]


def one_dual_tensor(index, fn, inputs):
    """A tangent on one input alone, so that losing it cannot be hidden by another's."""
    primals = [t.detach() for t in inputs]
    with forward_ad.dual_level():
        primals[index] = forward_ad.make_dual(primals[index], tangents_of(inputs)[index])
        unpacked = [forward_ad.unpack_dual(out) for out in as_tuple(fn(*primals))]
        return [torch.zeros_like(out.primal) if out.tangent is None else out.tangent for out in unpacked]


def vjp(fn, inputs):
    outputs, pull = torch.func.vjp(fn, *inputs)
    return pull(outputs)


def jacrev(fn, inputs):
    return torch.func.jacrev(fn, argnums=every_argument(inputs))(*inputs)


def jacfwd(fn, inputs):
    return torch.func.jacfwd(fn, argnums=(0,))(*inputs)


def hessian_vector(fn, inputs):
    """Forward over reverse."""
    gradient = torch.func.grad(total(fn), argnums=every_argument(inputs))
    return torch.func.jvp(gradient, inputs, tangents_of(inputs))[1]


def weighted_sum(gradients):
    """Of weights that do not depend on the gradients, whose rounding they would multiply."""
    return sum((g * torch.arange(g.numel()).view(g.shape).cos()).sum() for g in gradients)


def double_backward(fn, inputs):
    first = torch.autograd.grad(total(fn)(*inputs), inputs, create_graph=True)
    weighted = weighted_sum(first)
    return torch.autograd.grad(weighted, inputs, allow_unused=True, materialize_grads=True)


def double_backward_through_func(fn, inputs):
    def penalty(*args):
        return weighted_sum(torch.func.grad(total(fn), argnums=every_argument(inputs))(*args))

    return torch.func.grad(penalty, argnums=every_argument(inputs))(*inputs)


TRANSFORMS = (
    grads,
    jvp,
    dual_tensors,
    vjp,
    jacrev,
    jacfwd,
    hessian_vector,
    double_backward,
    double_backward_through_func,
)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
@each_operator
def test_derivatives(name, transform):
    judge_transform(name, transform)


@each_operator
def test_a_tangent_on_any_one_input_is_not_lost(name):
    for index in range(len(OPERATORS[name].shapes)):
        judge_transform(name, functools.partial(one_dual_tensor, index))


def vmapped(fn, inputs):
    return torch.func.vmap(fn)(*inputs)


def vmapped_gradients(fn, inputs):
    return torch.func.vmap(lambda *args: grads(fn, args))(*inputs)


def gradients_through_vmap(fn, inputs):
    return torch.autograd.grad(total(torch.func.vmap(fn))(*inputs), inputs)


def vmapped_jvp(fn, inputs):
    return torch.func.vmap(lambda *args: jvp(fn, args))(*inputs)


@pytest.mark.parametrize(
    "transform", (vmapped, vmapped_gradients, gradients_through_vmap, vmapped_jvp), ids=lambda f: f.__name__
)
@each_batched_operator
def test_vmap(name, transform):
    judge_transform(name, transform, batch=(3,))


@each_batched_operator
def test_vmap_over_one_input_and_over_an_inner_dimension(name):
    def over_the_first(fn, inputs):
        stacked = torch.stack([inputs[0], 2 * inputs[0]], -1)
        return torch.func.vmap(fn, in_dims=(-1,) + (None,) * (len(inputs) - 1), out_dims=1)(
            stacked, *inputs[1:]
        )

    def over_the_others(fn, inputs):
        stacked = [torch.stack([t, 2 * t]) for t in inputs[1:]]
        return torch.func.vmap(fn, in_dims=(None,) + (0,) * len(stacked))(inputs[0], *stacked)

    judge_transform(name, over_the_first)
    judge_transform(name, over_the_others)


@each_batched_operator
def test_nested_vmap(name):
    judge_transform(name, lambda fn, inputs: torch.func.vmap(torch.func.vmap(fn))(*inputs), batch=(2, 3))


def test_gradients_for_each_sample():
    inputs = feed_forward_inputs(6)
    x = inputs.pop("x")
    loss = lambda w1, row: fastformer.feed_forward(row, **{**inputs, "w1": w1}).square().sum()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(inputs["w1"], x)
    for row, found in zip(x, each, strict=True):
        torch.testing.assert_close(found, torch.func.grad(loss)(inputs["w1"], row))


# --- in-place changes, modes, checkpoints, autocast


def test_a_changed_input_is_noticed_by_backward():
    inputs = attention_inputs(requires_grad=True)
    query = inputs["query"] * 1
    out = fastformer.attention(query, inputs["key"], inputs["value"])
    query.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_changed_sum_is_noticed_by_backward_or_harmless():
    """Pre-norm code adds in place to the residual stream, which add_norm returned and backward reads."""
    inputs = norm_inputs(4, 16, requires_grad=True)
    wanted = outputs_and_gradients(fastformer.add_norm, **inputs, grad_outputs=[torch.ones(4, 16)] * 2)
    out, s = fastformer.add_norm(**inputs)
    changed = s.add_(1)
    try:
        found = torch.autograd.grad(out.sum() + changed.sum(), list(inputs.values()))
    except RuntimeError as error:
        assert "inplace" in str(error)
        return
    for (name, _), grad in zip(inputs.items(), found, strict=True):
        torch.testing.assert_close(grad, wanted[f"d_{name}"])


@each_operator
def test_backward_twice_with_retained_graph(name):
    operator = OPERATORS[name]
    inputs = operator.inputs(torch.float32)
    loss = total(operator.ours)(*inputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        torch.autograd.grad(loss, inputs)


@each_operator
def test_modes_without_gradient(name):
    operator = OPERATORS[name]
    inputs = operator.inputs(torch.float32, requires_grad=False)
    wanted = as_tuple(operator.ours(*inputs))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = as_tuple(operator.ours(*inputs))
        assert not any(t.requires_grad for t in found)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
@each_operator
def test_activation_checkpointing(name, reentrant):
    operator = OPERATORS[name]
    inputs = operator.inputs(torch.float32)
    wanted = torch.autograd.grad(total(operator.ours)(*inputs), inputs)
    loss = total(lambda *args: checkpoint(operator.ours, *args, use_reentrant=reentrant))(*inputs)
    if reentrant:
        loss.backward()
        found = [t.grad for t in inputs]
    else:
        found = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
def test_checkpointing_draws_the_same_seed_again(reentrant):
    q = attention_inputs(requires_grad=True)
    n = norm_inputs(2, 4, 33, 16, requires_grad=True)

    def block(query, key, value, residual, weight, bias):
        out = fastformer.attention(query, key, value, dropout_p=0.3)
        return fastformer.add_norm(out, residual, weight, bias, dropout_p=0.3)[0]

    inputs = {**q, **{name: n[name] for name in ("residual", "weight", "bias")}}
    torch.manual_seed(0)
    wanted = outputs_and_gradients(block, **inputs)
    torch.manual_seed(0)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out = checkpoint(block, *leaves.values(), use_reentrant=reentrant)
    assert torch.equal(out, wanted["out0"])
    loss_grad = torch.ones_like(out)
    out.backward(loss_grad)
    torch.manual_seed(0)
    plain_run = outputs_and_gradients(block, **inputs, grad_outputs=[loss_grad])
    assert_same_bits(
        {f"d_{name}": t.grad for name, t in leaves.items()},
        {name: t for name, t in plain_run.items() if name.startswith("d_")},
    )


def test_autocast_runs_attention_and_feed_forward_in_its_dtype():
    q = attention_inputs(requires_grad=True)
    more = {"bias": torch.randn(4, 33, 33, requires_grad=True), "sink": torch.zeros(4), "return_lse": True}
    narrow = lambda tensors: {
        name: t.to(torch.bfloat16) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()
    }
    wanted = fastformer.attention(**narrow(q | more))
    with torch.autocast("cpu", torch.bfloat16):
        found = fastformer.attention(**q, **more)
        sdpa = fastformer.scaled_dot_product_attention(**q, attn_mask=more["bias"])
    assert found[0].dtype == sdpa.dtype == torch.bfloat16
    assert torch.equal(found[0], wanted[0])
    found[0].float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (*q.values(), more["bias"]))

    ff = feed_forward_inputs(3, 7, gated=True, requires_grad=True)
    wanted = fastformer.feed_forward(**narrow(ff), activation="swiglu")
    with torch.autocast("cpu", torch.bfloat16):
        found = fastformer.feed_forward(**ff, activation="swiglu")
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    found.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in ff.values())


def test_autocast_treats_norms_as_torch_does_on_cpu():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = norm_inputs(3, 16, dtype=dtype, residual_dtype=torch.float32, param_dtype=torch.float32)
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        with torch.autocast("cpu", torch.bfloat16):
            for name, arguments in (("layer_norm", (weight, bias)), ("rms_norm", (weight,))):
                found = getattr(fastformer, name)(x, (16,), *arguments)
                wanted = getattr(torch.nn.functional, name)(x, (16,), *arguments)
                assert found.dtype == wanted.dtype == dtype
            normed, s = fastformer.add_norm(**inputs)
        assert normed.dtype == s.dtype == torch.float32


def test_autocast_that_is_off_changes_nothing():
    q = attention_inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert fastformer.attention(**q).dtype == torch.float32
