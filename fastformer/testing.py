"""How fastformer decides that a result is right, for its own tests and for whoever adds a kernel.

The rule needs three results of one call: the `actual` one, a `baseline` (what torch's own composition gives
in the same dtype) and an `oracle` (the reference backend on float64 copies). See `assert_as_accurate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastformer import use_backend

# How `laid_out` can place a tensor in memory; "broadcast" is the one that also changes its values.
LAYOUTS = ("contiguous", "transposed", "sliced", "unaligned", "last_strided", "broadcast")


def assert_as_accurate(actual: Any, baseline: Any, oracle: Any, what: str = "") -> None:
    """Raise AssertionError unless `actual` is about as accurate as `baseline`, both judged by `oracle`.

    `actual` must have the baseline's dtype and the oracle's shape; must be NaN, +inf or -inf exactly where
    the oracle is; and over the remaining elements maximum and mean of the absolute error must stay within
    `2 * baseline_error + eps(dtype) * max|oracle|`.

    Args:
        actual, baseline: tensors, None, or equally built dicts or sequences of them.
        oracle: the same, in float64.
        what: what is compared, for the message.
    """
    if isinstance(actual, dict):
        assert actual.keys() == baseline.keys() == oracle.keys(), (
            f"{what}: entries differ: actual {list(actual)}, baseline {list(baseline)}, oracle {list(oracle)}"
        )
        for name in actual:
            assert_as_accurate(actual[name], baseline[name], oracle[name], f"{what} {name}".strip())
        return
    if isinstance(actual, (tuple, list)):
        assert len(actual) == len(baseline) == len(oracle), (
            f"{what}: lengths differ: actual {len(actual)}, baseline {len(baseline)}, oracle {len(oracle)}"
        )
        for index, triple in enumerate(zip(actual, baseline, oracle, strict=True)):
            assert_as_accurate(*triple, f"{what}[{index}]")
        return
    if actual is None or oracle is None:
        assert actual is None and baseline is None and oracle is None, (
            f"{what}: actual, baseline and oracle are not all None"
        )
        return
    assert actual.dtype == baseline.dtype, f"{what}: dtype {actual.dtype}, the baseline has {baseline.dtype}"
    assert actual.shape == oracle.shape, f"{what}: shape {list(actual.shape)}, expected {list(oracle.shape)}"
    assert baseline.shape == oracle.shape, (
        f"{what}: baseline has shape {list(baseline.shape)}, oracle {list(oracle.shape)}"
    )
    eps = torch.finfo(actual.dtype).eps
    actual, baseline, oracle = (t.detach().to("cpu", torch.float64) for t in (actual, baseline, oracle))
    _assert_same_nonfinite(actual, oracle, what)

    finite = oracle.isfinite()
    if not finite.any():
        return
    error = (actual - oracle)[finite].abs()
    # Where the baseline itself is not finite it sets no standard.
    baseline_error = (baseline - oracle)[finite & baseline.isfinite()].abs()
    floor = eps * oracle[finite].abs().max().item()
    for measure in (torch.amax, torch.mean):
        found = measure(error).item()
        standard = measure(baseline_error).item() if baseline_error.numel() else 0.0
        allowed = 2 * standard + floor
        if found <= allowed:
            continue
        distance = torch.where(finite, (actual - oracle).abs(), -1.0)
        worst = [int(i) for i in torch.unravel_index(distance.argmax(), distance.shape)]
        raise AssertionError(
            f"{what or 'result'}: {measure.__name__} absolute error {found:.3g} exceeds {allowed:.3g} = "
            f"2 * {standard:.3g} (baseline) + {floor:.3g} (eps * max|oracle|); shape {list(oracle.shape)}, "
            f"worst at {worst}: {actual[tuple(worst)].item():.9g}, oracle {oracle[tuple(worst)].item():.9g}, "
            f"baseline {baseline[tuple(worst)].item():.9g}"
        )


def _assert_same_nonfinite(actual: Tensor, oracle: Tensor, what: str) -> None:
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(actual) != test(oracle)
        if differs.any():
            first = [int(i) for i in differs.nonzero()[0]]
            raise AssertionError(
                f"{what or 'result'}: {name} must be exactly where the oracle has it; differs in "
                f"{int(differs.sum())} of {differs.numel()} elements, first at {first}: "
                f"{actual[tuple(first)].item()}, oracle {oracle[tuple(first)].item()}"
            )


def in_float64(value: Any) -> Any:
    """`value` with every floating tensor in it as a detached float64 copy that requires grad where it did."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().to(torch.float64).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: in_float64(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(in_float64(item) for item in value)
    return value


def cotangents(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """One random gradient for each output, in its dtype.

    Values are multiples of 1/16 below 8, which every floating dtype holds exactly, so that runs in different
    dtypes backpropagate the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(out.shape, generator=generator).clamp(-7, 7) for out in outputs)
    return [
        ((draw * 16).round() / 16).to(out.device, out.dtype) for draw, out in zip(draws, outputs, strict=True)
    ]


def outputs_and_gradients(
    fn: Callable[..., Any], *args: Any, grad_outputs: Sequence[Tensor] | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Run `fn(*args, **kwargs)`, backpropagate, and return everything by name.

    Args:
        fn: returns a tensor or a sequence of tensors.
        args, kwargs: its arguments; gradients are taken for those tensors among them that require grad. They
            are detached first (strides kept), so that the caller's own `.grad` stays as it was.
        grad_outputs: one tensor for each output; `cotangents(outputs)` when None.

    Returns:
        `out0`, `out1`, ... and, for each tensor that requires grad, `d_<parameter name>`. A tensor that no
        output depends on has a gradient of zeros.
    """
    arguments = {**inspect.signature(fn).bind_partial(*args).arguments, **kwargs}
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.requires_grad
    }
    result = fn(**{**arguments, **leaves})
    outputs = [result] if isinstance(result, Tensor) else list(result)
    named = {f"out{index}": out.detach() for index, out in enumerate(outputs)}
    if not leaves:
        return named
    if grad_outputs is None:
        grad_outputs = cotangents(outputs)
    tracked = [
        (out, grad.to(out.dtype))
        for out, grad in zip(outputs, grad_outputs, strict=True)
        if out.requires_grad
    ]
    assert tracked, "inputs require grad, and no output does"
    grads = torch.autograd.grad(
        [out for out, _ in tracked], list(leaves.values()), [grad for _, grad in tracked], allow_unused=True
    )
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        named[f"d_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return named


def oracle(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """`outputs_and_gradients` of `fn` on float64 copies of its tensors, by the reference backend."""
    kwargs.pop("backend", None)
    with use_backend("reference"):
        return outputs_and_gradients(fn, *in_float64(args), **in_float64(kwargs))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """`tensor` with other strides: one of LAYOUTS.

    - `transposed`: dimensions 1 and 2 swapped in memory (0 and 1 of a matrix), as [B, M, H, D] projections
      give.
    - `sliced`: the last dimension is part of a wider one whose other columns hold NaN, so that a read beyond
      the tensor shows.
    - `unaligned`: the first element lies one element past an aligned address, after a NaN.
    - `last_strided`: the last dimension has stride 2, with NaN between.
    - `broadcast`: the first dimension has stride 0 and repeats its first entry.
    """
    tensor, requires_grad = tensor.detach(), tensor.requires_grad
    if layout == "contiguous" or tensor.dim() == 0:
        view = tensor.contiguous()
    elif layout == "transposed":
        dims = (1, 2) if tensor.dim() > 2 else (0, tensor.dim() - 1)
        view = tensor.transpose(*dims).contiguous().transpose(*dims)
    elif layout == "sliced":
        wide = (
            torch.full_like(tensor[..., :1], torch.nan)
            .expand(*tensor.shape[:-1], tensor.shape[-1] + 5)
            .clone()
        )
        view = wide[..., 2 : 2 + tensor.shape[-1]]
        view.copy_(tensor)
    elif layout == "unaligned":
        flat = torch.full([tensor.numel() + 1], torch.nan, dtype=tensor.dtype, device=tensor.device)
        view = flat[1:].view(tensor.shape)
        view.copy_(tensor)
    elif layout == "last_strided":
        view = torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
    elif layout == "broadcast":
        view = tensor[:1].clone().expand(tensor.shape)
    else:
        raise ValueError(f"layout is {layout!r}; expected one of {LAYOUTS}")
    return view.requires_grad_(requires_grad)


def _draw(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def attention_inputs(
    B: int = 2,
    H: int = 4,
    M: int = 33,
    N: int | None = None,
    D: int = 16,
    *,
    D_v: int | None = None,
    H_kv: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
    requires_grad: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """`query` [B, H, M, D], `key` [B, H_kv, N, D] and `value` [B, H_kv, N, D_v], drawn in `dtype`.

    N, D_v and H_kv default to M, D and H. `layout` is one of LAYOUTS.
    """
    generator = torch.Generator().manual_seed(seed)
    N, D_v, H_kv = M if N is None else N, D if D_v is None else D_v, H if H_kv is None else H_kv
    shapes = {"query": (B, H, M, D), "key": (B, H_kv, N, D), "value": (B, H_kv, N, D_v)}
    return {
        name: laid_out(_draw(shape, dtype, generator).to(device), layout).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    }


def poison_keys(
    key: Tensor, value: Tensor, key_padding_mask: Tensor, with_: float = torch.nan
) -> tuple[Tensor, Tensor]:
    """Copies of `key`, `value` [B, H_kv, N, D] that hold `with_` where `key_padding_mask` [B, N] is False."""
    hidden = ~key_padding_mask[:, None, :, None]
    poisoned_key, poisoned_value = (
        tensor.detach().masked_fill(hidden, with_).requires_grad_(tensor.requires_grad)
        for tensor in (key, value)
    )
    return poisoned_key, poisoned_value


def norm_inputs(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype | None = None,
    param_dtype: torch.dtype | None = None,
    device: str = "cpu",
    layout: str = "contiguous",
    offset: float = 0.0,
    requires_grad: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """`x` and `residual` of `shape` [..., C], `weight` and `bias` [C].

    `residual_dtype` and `param_dtype` default to `dtype`; `offset` moves every row's mean away from 0.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_dtype, param_dtype = residual_dtype or dtype, param_dtype or dtype
    inputs = {
        "x": _draw(shape, torch.float32, generator).add_(offset).to(dtype),
        "residual": _draw(shape, residual_dtype, generator),
        "weight": _draw(shape[-1:], param_dtype, generator),
        "bias": _draw(shape[-1:], param_dtype, generator),
    }
    for name in ("x", "residual"):
        inputs[name] = laid_out(inputs[name], layout)
    return {name: tensor.to(device).requires_grad_(requires_grad) for name, tensor in inputs.items()}


def feed_forward_inputs(
    *rows: int,
    E: int = 24,
    F: int = 40,
    E_out: int | None = None,
    gated: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
    requires_grad: bool = False,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """`x` [*rows, E], `w1` [F, E], `b1` [F], `w2` [E_out, F], `b2` [E_out]; if gated `w_gate`, `b_gate` too.

    E_out defaults to E; the biases are None unless `bias`. Weights are scaled so that every product keeps the
    size of its input.
    """
    generator = torch.Generator().manual_seed(seed)
    E_out = E if E_out is None else E_out
    shapes = {"x": (*rows, E), "w1": (F, E), "b1": (F,), "w2": (E_out, F), "b2": (E_out,)}
    scales = {"w1": max(E, 1) ** -0.5, "w_gate": max(E, 1) ** -0.5, "w2": max(F, 1) ** -0.5}
    if gated:
        shapes |= {"w_gate": (F, E), "b_gate": (F,)}
    inputs: dict[str, Tensor | None] = {}
    for name, shape in shapes.items():
        tensor = _draw(shape, dtype, generator, scales.get(name, 1.0)).to(device)
        if name in ("x", "w1", "w2", "w_gate"):
            tensor = laid_out(tensor, layout)
        inputs[name] = tensor.requires_grad_(requires_grad) if bias or not name.startswith("b") else None
    return inputs
