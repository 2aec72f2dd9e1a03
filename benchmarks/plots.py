"""The report's pictures, as SVG: times of all contenders by operator, and one overview of the ratios."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.case import CONTENDERS
from benchmarks.results import CaseKey, by_case, speedup

COLOURS = {"naive": "#b9b9b9", "torch": "#ee854a", "compile": "#8c70c4", "fastformer": "#2a78b8"}
LONGEST_BAR = 4.0
# A picture with more lines than this is no longer seen at once: it is drawn by kinds.
MOST_LINES = 30
# Of these operators the overview shows these kinds, each in a line of its own; of all others, every kind
# together in one line.
OVERVIEW_KINDS = {
    "attention": ("full", "causal", "padded"),
    "attention_training": ("full", "causal", "dropout", "bias"),
}
# The same data give the same file, so that a committed picture changes only with its figures.
matplotlib.rcParams["svg.hashsalt"] = "fastformer"
matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["font.family"] = "sans-serif"


def draw(results: dict, directory: Path) -> dict[str, list[str]]:
    """SVGs of each operator, and `overview.svg`; returns name -> file names.

    Of a run with several thread counts they show the largest: the tables have all.
    """
    most = max(results["run"]["threads"])
    cases = {key: rows for key, rows in by_case(results["rows"]).items() if key.threads == most}
    drawn = {}
    for operator in dict.fromkeys(key.operator for key in cases):
        chosen = {key: rows for key, rows in cases.items() if key.operator == operator}
        drawn[operator] = [
            _save(_times(part), directory / f"{name}.svg")
            for name, part in _pictures(operator, chosen).items()
        ]
    groups = _ratios_by_group(cases)
    if groups:
        drawn["overview"] = [_save(_overview(groups, results["run"]), directory / "overview.svg")]
    return drawn


def _pictures(operator: str, cases: dict[CaseKey, dict]) -> dict[str, dict[CaseKey, dict]]:
    """An operator's cases by the picture that they are drawn in."""
    if len(cases) <= MOST_LINES:
        return {operator: cases}
    found: dict[str, dict[CaseKey, dict]] = {}
    for key, rows in cases.items():
        found.setdefault(f"{operator}_{key.kind}", {})[key] = rows
    return found


def _times(cases: dict) -> Figure:
    """Bars of each contender's time over torch's, so that short and long cases share one axis."""
    figure = Figure(figsize=(9, 1.0 + 0.62 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for index, contender in enumerate(CONTENDERS):
        ratios = [speedup(contenders, over=contender, of="torch") for contenders in cases.values()]
        _bars(axes, index, len(CONTENDERS), ratios, left=0.0, colour=COLOURS[contender], label=contender)
    axes.set_xlim(0, LONGEST_BAR * 1.08)
    axes.set_xlabel(f"time, torch = 1 (shorter is better; cut at {LONGEST_BAR:.0f})")
    _finish(axes, [f"{key.case} {key.dtype}" for key in cases])
    return figure


def _ratios_by_group(cases: dict[CaseKey, dict]) -> dict[str, dict[str, float]]:
    """ "operator kind dtype" -> rival -> geometric mean over its cases of how much faster fastformer is."""
    found: dict[str, dict[str, list[float]]] = {}
    for key, contenders in cases.items():
        kinds = OVERVIEW_KINDS.get(key.operator)
        if kinds and key.kind not in kinds:
            continue
        group = " ".join((key.operator, *([key.kind] if kinds else []), key.dtype))
        for rival in CONTENDERS[:-1]:
            ratio = speedup(contenders, over=rival)
            if ratio is not None:
                found.setdefault(group, {}).setdefault(rival, []).append(ratio)
    return {
        group: {rival: statistics.geometric_mean(ratios) for rival, ratios in rivals.items()}
        for group, rivals in found.items()
    }


def _overview(groups: dict[str, dict[str, float]], run: dict) -> Figure:
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(groups)), layout="constrained")
    axes = figure.subplots()
    rivals = CONTENDERS[:-1]
    for index, rival in enumerate(rivals):
        ratios = [found.get(rival) for found in groups.values()]
        _bars(axes, index, len(rivals), ratios, left=1.0, colour=COLOURS[rival], label=f"over {rival}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axes.margins(x=0.1)
    axes.set_xlabel(
        "how many times faster fastformer is (geometric mean over the cases; left of the line: slower)"
    )
    title = f"{run['device']}, {max(run['threads'])} threads, torch {run['versions']['torch']}"
    axes.set_title(title, fontsize=9, pad=22)
    _finish(axes, list(groups))
    return figure


def _bars(
    axes: Axes, index: int, count: int, ratios: list[float | None], *, left: float, colour: str, label: str
) -> None:
    """The `index`th of `count` bars in each line of the plot, with its figure; None leaves a gap."""
    height = 0.8 / count
    for line, ratio in enumerate(ratios):
        if ratio is None:
            continue
        place, end = (
            line + (index - (count - 1) / 2) * height,
            min(ratio, LONGEST_BAR) if left == 0 else ratio,
        )
        axes.barh(place, end - left, left=left, height=height, color=colour, label=label)
        beyond = end >= left
        axes.annotate(
            f"{ratio:.2f}",
            (end, place),
            xytext=(2 if beyond else -2, 0),
            textcoords="offset points",
            ha="left" if beyond else "right",
            va="center",
            fontsize=7,
        )
        label = "_"  # the legend names each colour once


def _finish(axes: Axes, lines: list[str]) -> None:
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.invert_yaxis()
    axes.legend(
        fontsize=8, ncols=len(CONTENDERS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False
    )
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, metadata={"Date": None})
    return path.name
