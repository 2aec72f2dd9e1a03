"""layer_norm, rms_norm and add_norm: one operator, `norm`, with or without a residual."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..backends import reference
from ..specs import NormSpec
from .autograd import Call, Operator, Tensors, run
from .checks import check_device, check_float, check_shape, resolve_seed
from .library import define


def _norm_fwd_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    rms: bool,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = x.new_empty(x.shape, dtype=dtype)
    s = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return out, s, x.new_empty(0 if rms else x.shape[:-1], dtype=torch.float32), rstd


def _norm_bwd_fake(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    rms: bool,
    dropout_p: float,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = s.shape[-1]
    return (
        s.new_empty(s.shape),
        s.new_empty(s.shape if dropout_p > 0 else 0),
        s.new_empty(columns if need_dweight else 0, dtype=torch.float32),
        s.new_empty(columns if need_dbias else 0, dtype=torch.float32),
    )


define(
    "norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, bool rms, float eps,"
    " float dropout_p) -> (Tensor out, Tensor sum, Tensor mean, Tensor rstd)",
    _norm_fwd_fake,
)
define(
    "norm_bwd",
    "(Tensor grad_out, Tensor? grad_sum, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, Tensor? seed,"
    " bool rms, float dropout_p, bool need_dweight, bool need_dbias)"
    " -> (Tensor ds, Tensor dx, Tensor dweight, Tensor dbias)",
    _norm_bwd_fake,
)


class Norm(Operator):
    name = "norm"

    def composition(self, spec: NormSpec, tensors: Tensors) -> tuple[Tensor, ...]:
        return reference.norm(spec, *tensors)  # type: ignore[arg-type]

    def forward(self, call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
        return call.forward.norm_fwd(call.spec, *tensors)

    def differentiable(self, spec: NormSpec, tensors: Tensors) -> int:
        return 1 if tensors[1] is None else 2

    def saved(self, tensors: Tensors, outputs: tuple[Tensor, ...]) -> Tensors:
        x, residual, weight, _, seed = tensors
        _, s, mean, rstd = outputs
        return x if residual is None else s, weight, mean, rstd, seed

    def backward(
        self, backend: ModuleType, spec: NormSpec, needs: tuple[bool, ...], grads: Tensors, saved: Tensors
    ) -> Tensors:
        s, weight, mean, rstd, seed = saved
        grad_out, grad_sum = grads if len(grads) == 2 else (grads[0], None)
        assert s is not None
        if grad_out is None:
            grad_out = torch.zeros_like(s)
        _, need_dresidual, need_dweight, need_dbias, _ = needs
        ds, dx, dweight, dbias = backend.norm_bwd(
            spec, grad_out, grad_sum, s, weight, mean, rstd, seed, need_dweight, need_dbias
        )
        return (
            dx if spec.dropout_p > 0 else ds,
            ds if need_dresidual else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            None,
        )


_NORM = Norm()


def _check_row_parameter(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None:
        return
    check_float(name, tensor)
    check_device(name, tensor, x, "the input")


def _autocast(x: Tensor) -> Tensor:
    """Under autocast torch normalises in float32, but on the CPU it leaves the dtype alone."""
    device = x.device.type
    if device != "cpu" and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return x.to(torch.float32)
    return x


def _norm_over(
    kind: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[NormSpec, Tensors]:
    check_float("input", input)
    shape = tuple(normalized_shape)
    dims = len(shape)
    if dims == 0 or tuple(input.shape[-dims:]) != shape:
        raise ValueError(
            f"normalized_shape is {shape}; wanted the last dimensions of input, {tuple(input.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        _check_row_parameter(name, parameter, input)
        if parameter is not None and tuple(parameter.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}; wanted normalized_shape, {shape}")
    if dims > 1:
        input = input.flatten(-dims)
        weight = None if weight is None else weight.flatten()
        bias = None if bias is None else bias.flatten()
    return NormSpec(kind, eps), (_autocast(input), None, weight, bias, None)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.layer_norm (Ba et al., 2016): (x - mean) / sqrt(variance + eps) * weight + bias.

    `input` [..., *normalized_shape] of any strides; `weight` and `bias` [*normalized_shape] in any float
    dtype, or None. The statistics are float32 whatever the dtype (float64 for float64). Returns input's
    shape and dtype. Deterministic, weight and bias gradients included. Raises ValueError for shapes and
    devices, TypeError for dtypes, BackendError where `backend` names one that cannot serve.
    """
    spec, tensors = _norm_over("layer", input, normalized_shape, weight, bias, eps)
    out = run(_NORM, spec, tensors, backend)[0]
    return out.view(input.shape) if len(normalized_shape) > 1 else out


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.rms_norm (Zhang & Sennrich, 2019): x / sqrt(mean(x²) + eps) * weight.

    Arguments, dtypes and errors as in `layer_norm`; `eps` None is the epsilon of the dtype computed in,
    float32 for 16-bit inputs, as in torch.
    """
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    spec, tensors = _norm_over("rms", input, normalized_shape, weight, None, eps)
    out = run(_NORM, spec, tensors, backend)[0]
    return out.view(input.shape) if len(normalized_shape) > 1 else out


def _add_norm_call(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    dropout_p: float,
    seed: Tensor | int | None,
) -> tuple[NormSpec, Tensors]:
    check_float("x", x)
    check_float("residual", residual)
    check_device("residual", residual, x, "x")
    if residual.shape != x.shape or x.dim() == 0:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; wanted x's, {tuple(x.shape)}, at least [C]"
        )
    if kind not in ("layer", "rms"):
        raise ValueError(f"kind is {kind!r}; wanted 'layer' or 'rms'")
    for name, parameter in (("weight", weight), ("bias", bias)):
        _check_row_parameter(name, parameter, x)
        if parameter is not None:
            check_shape(name, parameter, (x.shape[-1],), "x's last dimension")
    seed = resolve_seed(seed, dropout_p, x.device)
    return NormSpec(kind, eps, dropout_p), (_autocast(x), _autocast(residual), weight, bias, seed)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm(residual + dropout(x)), residual + dropout(x)) in one pass over memory.

    Post-norm layers use the first result, pre-norm layers both. `x` and `residual` [..., C]; `weight` and
    `bias` [C] or None; `kind` is "layer" or "rms". Both results have promote_types(x, residual).
    `dropout_p` drops x's elements wherever it is above 0: pass 0 in evaluation. `seed` is an int64 tensor
    of one element on x's device; None draws one from the device's default generator, so that
    torch.manual_seed reproduces it. The same seed drops the same elements on every backend and device.
    Raises ValueError for shapes, values and devices, TypeError for dtypes, BackendError where `backend`
    names one that cannot serve.
    """
    spec, tensors = _add_norm_call(x, residual, weight, bias, kind, eps, dropout_p, seed)
    out, s = run(_NORM, spec, tensors, backend)[:2]
    return out, s
