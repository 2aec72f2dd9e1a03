"""What `patch` did to a model, and what it left alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Replaced:
    """`path` (a key of `named_modules`) is a module of class `module`, which now runs `runs`.

    `inside` names the submodules, relative to `path`, whose work that includes: they keep their parameters
    and are no longer called.
    """

    path: str
    module: str
    runs: tuple[str, ...]
    inside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """`path` is a module of class `module` that runs as before, for the one-sentence `reason`."""

    path: str
    module: str
    reason: str


@dataclass(frozen=True)
class PatchReport:
    """The patched model, which modules run fastformer's operators now, and which do not and why.

    `replaced` and `left` follow the order of `model.named_modules()`. `str(report)` is for people: layers
    that differ only in their number share a line.
    """

    model: nn.Module
    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        title = f"{type(self.model).__name__}: {len(self.replaced)} modules replaced, {len(self.left)} left"
        if not self.replaced and not self.left:
            title += " (it holds no model that fastformer knows)"
        lines = [title]
        now = ((r.path, r.module, f"{' + '.join(r.runs)}{_listed(r.inside)}") for r in self.replaced)
        lines += _grouped("now", now)
        lines += _grouped("left", ((item.path, item.module, item.reason) for item in self.left))
        return "\n".join(lines)


def _listed(names: tuple[str, ...]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _grouped(label: str, rows: Iterable[tuple[str, str, str]]) -> list[str]:
    counts: dict[tuple[str, str, str], int] = {}
    for path, module, text in rows:
        key = (re.sub(r"\b\d+\b", "*", path) or "(the model)", module, text)
        counts[key] = counts.get(key, 0) + 1
    return [
        f"  {label:4} {count:3} x {path} [{module}]: {text}" for (path, module, text), count in counts.items()
    ]
