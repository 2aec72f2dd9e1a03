"""One row of the benchmark: an operator on one shape, the contenders for it, and what each must return."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import fastformer
from fastformer.testing import assert_as_accurate, in_float64

# The columns of every table, in order. `torch` is the fused operator that a PyTorch user would call,
# `compile` is torch.compile with static shapes.
CONTENDERS = ("naive", "torch", "compile", "fastformer")


@dataclass(frozen=True)
class Grid:
    """Where and how much to measure; `full` is every kind at every length."""

    device: str
    quick: bool = False
    full: bool = False
    # CPU threads: every case is timed with each of these counts.
    threads: tuple[int, ...] = (1,)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,) if self.quick else (torch.float32, torch.bfloat16)

    @property
    def contenders(self) -> tuple[str, ...]:
        # Compiling takes longer than all else together.
        return tuple(name for name in CONTENDERS if not (self.quick and name == "compile"))

    @property
    def passes(self) -> int:
        return 3 if self.quick or self.full else 5

    def scaled(self, count: int, on_cuda: int) -> int:
        """`count` on a CPU, `count * on_cuda` on a GPU: what keeps two cores busy leaves a GPU idle."""
        return count * on_cuda if self.device == "cuda" else count


def thread_counts(text: str) -> tuple[int, ...]:
    """ "1,all" -> (1, what torch takes by default); each count once, in the order given."""
    words = text.split(",")
    if not all(word == "all" or (word.isdecimal() and int(word) > 0) for word in words):
        raise ValueError(f"threads are {text!r}; wanted counts or 'all', parted by commas, such as 1,all")
    every = torch.get_num_threads()
    return tuple(dict.fromkeys(every if word == "all" else int(word) for word in words))


class Rivals(NamedTuple):
    """One operator, written three ways over the same positional inputs."""

    naive: Callable
    torch: Callable
    fastformer: Callable

    def contenders(self, compile: Callable, wrap: Callable[[Callable], Callable]) -> dict[str, Callable]:
        """All four by name, each in `wrap`; `compile` is which of them the compiler gets."""
        four = (self.naive, self.torch, compiled(compile), self.fastformer)
        return {name: wrap(function) for name, function in zip(CONTENDERS, four, strict=True)}


def compiled(function: Callable) -> Callable:
    """torch.compile at its best for one shape: whole graph, static shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def forward(function: Callable) -> Callable:
    return function


def forward_and_backward(function: Callable) -> Callable:
    """Takes one input more, the gradient that comes in, and returns the output and all gradients.

    Gradients are taken for the inputs that require one.
    """

    def run(*inputs_and_grad):
        *inputs, grad_out = inputs_and_grad
        out = function(*inputs)
        differentiable = [tensor for tensor in inputs if tensor.requires_grad]
        return out.detach(), *torch.autograd.grad(out, differentiable, grad_out)

    return run


def serving(function: Callable, *, backward: bool = False) -> Callable[..., str]:
    """Names the backend that serves a call of `function`; with `backward`, those of both directions.

    With `backward` it takes what `forward_and_backward(function)` takes.
    """

    def name(*inputs):
        found = fastformer.explain(function, *(inputs[:-1] if backward else inputs))
        return "+".join(dict.fromkeys(found.backends.values())) if backward else found.backend

    return name


class Inaccurate(AssertionError):
    """A rival's result is not wrong, and yet less accurate than the rule lets fastformer be."""


# How many times naive's error the rule counts with, when it is to tell whether a rival is wrong.
RIVALS_SLACK = 4


def by_the_rule(case: Case, inputs: tuple) -> Callable[[str, Any], None]:
    """A contender is right when its outputs are as accurate as those of `contenders[baseline]`.

    Both are measured against the oracle: `naive` on float64 copies of the inputs, or what `oracle()` gives.
    A rival that misses that by little is Inaccurate: leaving its time out would flatter fastformer.
    """
    baseline = case.contenders[case.baseline](*inputs)
    oracle = case.oracle() if case.oracle else case.contenders["naive"](*in_float64(inputs))

    def judge(contender: str, actual: Any) -> None:
        try:
            assert_as_accurate(actual, baseline, oracle, contender)
        except AssertionError as error:
            if contender == "fastformer":
                raise
            assert_as_accurate(actual, _with_slack(baseline, oracle), oracle, contender)
            raise Inaccurate(_first_line(error)) from None

    return judge


def _with_slack(baseline: Any, oracle: Any) -> Any:
    """The baseline with its errors RIVALS_SLACK times as large."""
    if isinstance(baseline, (tuple, list)):
        return [_with_slack(*pair) for pair in zip(baseline, oracle, strict=True)]
    exact = oracle.to(baseline.device)
    return (exact + RIVALS_SLACK * (baseline - exact)).to(baseline.dtype)


@dataclass(frozen=True)
class Case:
    """`draw()` gives the inputs that every contender is called with.

    Outputs are tensors or tuples of tensors. `judge(case, inputs)` returns what raises AssertionError on a
    contender's wrong outputs.
    """

    operator: str
    name: str
    dtype: torch.dtype
    contenders: dict[str, Callable]
    draw: Callable[[], tuple]
    oracle: Callable[[], torch.Tensor] | None = None
    baseline: str = "naive"
    judge: Callable[[Case, tuple], Callable[[str, Any], None]] = by_the_rule
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
    """What was found out about a contender before it was timed.

    `status` is "right", "inaccurate" (a rival that is timed all the same), "wrong" or "failed".
    """

    status: str
    detail: str = ""
    backend: str = ""
    # Calls in one timed round, and rounds in one pass.
    iterations: int = 1
    rounds: int = 1
    peak_bytes: int | None = None

    @property
    def timed(self) -> bool:
        return self.status in ("right", "inaccurate")


def clock() -> float:
    """Seconds, after everything that was sent to the GPU has run."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Contest:
    """A case while its turns last: its inputs, its judge and the verdicts so far."""

    def __init__(self, case: Case, quick: bool) -> None:
        self.case = case
        # By threads and contender: the compiler writes other code for another number of threads.
        self.verdicts: dict[tuple[int, str], Verdict] = {}
        self.round_seconds = 0.002 if quick else 0.005
        self.pass_seconds = 0.02 if quick else 0.05
        self.inputs: tuple = ()
        self._judge: Callable[[str, Any], None] | None = None

    def run(self, contender: str):
        return self.case.contenders[contender](*self.inputs)

    def verdict(self, contender: str) -> Verdict:
        """What is known about it with as many threads as torch has now."""
        key = torch.get_num_threads(), contender
        if key not in self.verdicts:
            self.verdicts[key] = self._examine(contender)
        return self.verdicts[key]

    def _examine(self, contender: str) -> Verdict:
        case = self.case
        try:
            if self._judge is None:
                self.inputs = case.draw()
                self._judge = case.judge(case, self.inputs)
            actual = self.run(contender)
            backend = case.backend(*self.inputs) if contender == "fastformer" and case.backend else ""
        except Exception as error:  # a contender that cannot run is a result, not the end of the run
            return Verdict("failed", f"{type(error).__name__}: {_first_line(error)}")
        verdict = Verdict("right", backend=backend)
        try:
            self._judge(contender, actual)
        except Inaccurate as error:
            verdict = Verdict("inaccurate", _first_line(error))
        except AssertionError as error:
            return Verdict("wrong", _first_line(error), backend)
        return self._size(contender, verdict)

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
