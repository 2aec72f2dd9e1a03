"""Which backend runs a call: the first of the device's backends that does not say why not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from .backends import cpu, cuda, reference, triton
from .errors import BackendError
from .specs import TENSORS, WITHOUT_GRADIENT

# In the order in which "auto" asks.
BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}

# Of the backends that can tell: which of its configurations serves a call.
_CONFIGURATION = {"triton": triton.configuration}

# Triton's interpreter serves CPU tensors too, but only a caller who names it wants that.
_ON_CPU = (cpu, reference)
_ELSEWHERE = (cuda, triton, reference)


class _Chosen(threading.local):
    backend = "auto"
    explaining = False


class _Asked(Exception):
    """Carries a call from `choose` back to `explain`, before anything ran."""

    def __init__(self, op: str, spec: Any, tensors: tuple[Tensor | None, ...], backend: str) -> None:
        self.call = (op, spec, tensors, backend)


_chosen = _Chosen()


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, operators of this thread whose `backend` is not given use this one.

    `backend` is "auto", "cuda", "triton", "cpu" or "reference". A named backend serves the call or raises
    BackendError; it never falls back.
    """
    check_backend_name(backend)
    before = _chosen.backend
    _chosen.backend = backend
    try:
        yield
    finally:
        _chosen.backend = before


def check_backend_name(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; wanted 'auto', {', '.join(map(repr, BACKENDS))}")


def requested(backend: str | None) -> str:
    """The backend that the call, or else the surrounding `use_backend`, asks for."""
    if backend is None:
        return _chosen.backend
    check_backend_name(backend)
    return backend


def explaining() -> bool:
    """Whether this call will end in `choose`, so that nothing may be spent on it: no random number, say."""
    return _chosen.explaining


def choose(op: str, spec: Any, tensors: tuple[Tensor | None, ...], backend: str) -> ModuleType:
    """The backend module for `op`, the name of one direction of one operator ("norm_fwd").

    Raises BackendError where `backend` names one that cannot serve the call.
    """
    if _chosen.explaining:
        raise _Asked(op, spec, tensors, backend)
    if backend == "auto":
        on_cpu = tensors[0].device.type == "cpu"  # type: ignore[union-attr]
        for candidate in _ON_CPU if on_cpu else _ELSEWHERE:
            if candidate.why_not(op, spec, tensors) is None:
                return triton if candidate is cuda and _triton_first(op, spec, tensors) else candidate
        raise AssertionError("reference serves everything")
    module = BACKENDS[backend]
    reason = module.why_not(op, spec, tensors)
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot run {op}: {reason}")
    return module


def _triton_first(op: str, spec: Any, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call that cuda serves is better left to Triton, which serves it too."""
    return cuda.gives_way(op, tensors) and triton.why_not(op, spec, tensors) is None


def backend_name(module: ModuleType) -> str:
    return next(name for name, candidate in BACKENDS.items() if candidate is module)


@dataclass(frozen=True)
class Explanation:
    """What would run a call: per direction ("norm_fwd"), the backend, and each refusal with its reason.

    configurations: Per direction, the tiles that the backend chooses, where it can tell.
    """

    backends: dict[str, str]
    refusals: dict[str, dict[str, str]]
    notes: tuple[str, ...] = ()
    configurations: dict[str, str] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """The forward direction's backend."""
        return next(iter(self.backends.values()))

    def __str__(self) -> str:
        lines = []
        for op, backend in self.backends.items():
            chosen = self.configurations.get(op)
            lines.append(f"{op}: {backend}" if chosen is None else f"{op}: {backend} ({chosen})")
            lines += [f"  not {name}: {reason}" for name, reason in self.refusals[op].items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What `function(*args, **kwargs)`, a call of one of this package's operators, would run on, and why.

    Runs the call's validation, hence raises what the call would, and no kernel. A named backend that refuses
    is reported, not raised.
    """
    _chosen.explaining = True
    try:
        function(*args, **kwargs)
    except _Asked as asked:
        op, spec, tensors, backend = asked.call
    else:
        raise TypeError(
            f"{function!r} called no operator; wanted one of fastformer's, such as fastformer.attention"
        )
    finally:
        _chosen.explaining = False
    operator = op.removesuffix("_fwd")
    backends, refusals = {}, {}
    for direction in (op,) if operator in WITHOUT_GRADIENT else (op, operator + "_bwd"):
        reasons = {name: module.why_not(direction, spec, tensors) for name, module in BACKENDS.items()}
        refused = {name: reason for name, reason in reasons.items() if reason is not None}
        if backend == "auto":
            backends[direction] = backend_name(choose(direction, spec, tensors, "auto"))
        else:
            backends[direction] = f"none ({backend} refuses)" if backend in refused else backend
        refusals[direction] = refused
    notes = tuple(
        f"{name}'s last dimension is not contiguous: it is copied once"
        for name, tensor in zip(TENSORS[operator], tensors, strict=True)
        if tensor is not None
        and tensor.dim() > 1
        and tensor.shape[-1] > 1
        and tensor.stride(-1) not in (0, 1)
    )
    if backend == "auto":
        notes += tuple(
            f"cuda serves {direction} too, and gives way to triton here"
            for direction, name in backends.items()
            if name == "triton" and "cuda" not in refusals[direction]
        )
    configurations = {
        direction: chosen
        for direction, name in backends.items()
        if name in _CONFIGURATION and (chosen := _CONFIGURATION[name](direction, spec, tensors)) is not None
    }
    return Explanation(backends, refusals, notes, configurations)
