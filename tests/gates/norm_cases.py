"""Norms: every tile of norm_configs.py, with the dtypes and dropout that change its registers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from fastformer.triton_kernels import norm_bwd, norm_configs, norm_fwd

from tests.triton.offline import TARGETS

from .case import Case

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (dtype of x and grad_out, of residual, s and grad_sum, of the parameters; dropout_p; kind).
INPUTS = {
    "bfloat16": (BF16, BF16, BF16, 0.0, "layer"),
    "bfloat16 dropout": (BF16, BF16, F32, 0.1, "layer"),
    "float32 dropout": (F32, F32, F32, 0.1, "layer"),
    "mixed dropout": (BF16, F32, F32, 0.1, "layer"),
    "float16 rms": (F16, F16, F16, 0.0, "rms"),
}
_ROWS = 100_000


def _call(op: str, C: int, align: int, inputs: str) -> None:
    x_dtype, s_dtype, param_dtype, p, kind = INPUTS[inputs]
    rms = kind == "rms"

    def matrix(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(_ROWS, C + align, dtype=dtype, device="meta")[:, :C]

    weight, bias = (torch.empty(C, dtype=param_dtype, device="meta") for _ in range(2))
    seed, statistics = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty(_ROWS, device="meta")
    if op == "norm_fwd":
        norm_fwd.norm_fwd(matrix(x_dtype), matrix(s_dtype), weight, bias, seed, rms, 1e-5, p)
    else:
        grad_out, grad_sum, s = matrix(x_dtype), matrix(s_dtype), matrix(s_dtype)
        norm_bwd.norm_bwd(grad_out, grad_sum, s, weight, statistics, statistics, seed, rms, p, True, True)


def norm_cases(op: str, target: str) -> Iterator[Case]:
    """One case for each tile that can be chosen, each alignment of the rows, and each of INPUTS."""
    for C, align, _ in norm_configs.norm_configs(TARGETS[target].backend, op):
        for inputs in INPUTS:
            yield Case(op, f"C={C} align={align} {inputs}", partial(_call, op, C, align, inputs))
