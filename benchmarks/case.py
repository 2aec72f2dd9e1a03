"""One row of the benchmark: an operator on one shape, the contenders for it, and what each must return."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastformer.testing import assert_as_accurate, in_float64

# The columns of every table, in order. `torch` is the fused operator that a PyTorch user would call,
# `compile` is torch.compile with static shapes.
CONTENDERS = ("naive", "torch", "compile", "fastformer")


@dataclass(frozen=True)
class Grid:
    """Where and how much to measure."""

    device: str
    quick: bool

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,) if self.quick else (torch.float32, torch.bfloat16)

    @property
    def contenders(self) -> tuple[str, ...]:
        # Compiling takes longer than all else together.
        return tuple(name for name in CONTENDERS if not (self.quick and name == "compile"))

    @property
    def passes(self) -> int:
        return 3 if self.quick else 5

    def scaled(self, count: int, on_cuda: int) -> int:
        """`count` on a CPU, `count * on_cuda` on a GPU: what keeps two cores busy leaves a GPU idle."""
        return count * on_cuda if self.device == "cuda" else count


class Rivals(NamedTuple):
    """One operator, written four ways over the same positional inputs; `backend` names what serves ours."""

    naive: Callable
    torch: Callable
    fastformer: Callable
    backend: Callable[..., str]


def compiled(function: Callable) -> Callable:
    """torch.compile at its best for one shape: whole graph, static shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)


@dataclass(frozen=True)
class Case:
    """`draw()` gives the inputs that every contender is called with.

    Outputs are tensors or tuples of tensors; a contender is right when its outputs are as accurate as
    those of `contenders[baseline]`, both measured against the oracle: `naive` on float64 copies of the
    inputs, or what `oracle()` gives.
    """

    operator: str
    name: str
    dtype: torch.dtype
    contenders: dict[str, Callable]
    draw: Callable[[], tuple]
    oracle: Callable[[], torch.Tensor] | None = None
    baseline: str = "naive"
    # Floating-point operations that the result needs; 0 where arithmetic is not the limit.
    flops: float = 0.0
    needs_grad: bool = False
    # Names the fastformer backend that serves these inputs.
    backend: Callable[..., str] | None = None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def key(self) -> str:
        return f"{self.operator} {self.name} {self.dtype_name}"


@dataclass
class Verdict:
    """What was found out about a contender before it was timed: "right", "wrong" or "failed"."""

    status: str
    detail: str = ""
    backend: str = ""
    # Calls in one timed round, and rounds in one pass.
    iterations: int = 1
    rounds: int = 1
    peak_bytes: int | None = None


def clock() -> float:
    """Seconds, after everything that was sent to the GPU has run."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Contest:
    """A case while its turns last: its inputs, its oracle and the verdicts so far."""

    def __init__(self, case: Case, quick: bool) -> None:
        self.case = case
        self.verdicts: dict[str, Verdict] = {}
        self.round_seconds = 0.002 if quick else 0.005
        self.pass_seconds = 0.02 if quick else 0.05
        self.inputs: tuple = ()
        self._baseline = self._oracle = None

    def run(self, contender: str):
        return self.case.contenders[contender](*self.inputs)

    def verdict(self, contender: str) -> Verdict:
        if contender not in self.verdicts:
            self.verdicts[contender] = self._judge(contender)
        return self.verdicts[contender]

    def _judge(self, contender: str) -> Verdict:
        case = self.case
        try:
            if self._oracle is None:
                self._prepare()
            actual = self.run(contender)
            backend = case.backend(*self.inputs) if contender == "fastformer" and case.backend else ""
        except Exception as error:  # a contender that cannot run is a result, not the end of the run
            return Verdict("failed", f"{type(error).__name__}: {_first_line(error)}")
        try:
            assert_as_accurate(actual, self._baseline, self._oracle, contender)
        except AssertionError as error:
            return Verdict("wrong", _first_line(error), backend)
        return self._size(contender, Verdict("right", backend=backend))

    def _prepare(self) -> None:
        self.inputs = self.case.draw()
        self._baseline = self.run(self.case.baseline)
        naive = self.case.contenders["naive"]
        self._oracle = self.case.oracle() if self.case.oracle else naive(*in_float64(self.inputs))

    def _size(self, contender: str, verdict: Verdict) -> Verdict:
        """Fit rounds and passes to how long a call takes, and note what it allocates on a GPU."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.run(contender)
            torch.cuda.synchronize()
            verdict.peak_bytes = torch.cuda.max_memory_allocated() - before
        calls, elapsed = 1, 0.0
        while elapsed < self.round_seconds:
            start = clock()
            for _ in range(calls):
                self.run(contender)
            elapsed = clock() - start
            verdict.iterations = calls
            calls = math.ceil(calls * min(10.0, 1.2 * self.round_seconds / elapsed))
        verdict.rounds = max(1, min(10, int(self.pass_seconds / elapsed)))
        return verdict


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
