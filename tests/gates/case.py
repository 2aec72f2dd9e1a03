"""One call of a launcher: what the gates compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    op: str  # one direction of an operator: "norm_fwd"
    name: str  # unique among the operator's
    call: Callable[[], Any]  # runs the launcher on tensors without memory; of CUDA C++, see `compiled`
    dim: int | None = None  # the head dim, where the hot loop's figures are always told
    gated: bool = False  # whether limits.py binds them; where not, only the spill gate does
    tensor_cores: bool = False  # whether its products belong there
    compiled: bool = False  # `call` takes the target and gives a Compiled: nothing is launched


class Compiled(NamedTuple):
    """A kernel that nvcc compiled."""

    kernel: str
    tile: str
    cubin: bytes
    dynamic_shared: int  # bytes a block, beside those that the cubin tells of
    function: str = ""  # of the cubin's kernels, where it has several; no hot loop is read then
    bytes_per_slot: float | None = None  # of DRAM, to all that a block issues
