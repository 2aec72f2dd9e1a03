"""The raw operators' library. Each backend with kernels implements its own copy of one schema:
`norm_fwd_cpu`, `norm_fwd_cuda` and `norm_fwd_triton` differ in who runs them and in nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.library import Library, register_fake

_library = Library("fastformer", "DEF")

KERNEL_BACKENDS = ("cpu", "cuda", "triton")


def define(name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Define `name`_`backend` for every backend with kernels; `fake` gives the outputs' shapes and dtypes."""
    for backend in KERNEL_BACKENDS:
        _library.define(f"{name}_{backend}{schema}")
        register_fake(f"fastformer::{name}_{backend}", fake, lib=_library)
