"""The report's pictures, as SVG: times of all contenders by operator, and one overview of the ratios."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.case import CONTENDERS
from benchmarks.results import by_case, speedup

COLOURS = {"naive": "#b9b9b9", "torch": "#ee854a", "compile": "#8c70c4", "fastformer": "#2a78b8"}
# The same data give the same file, so that a committed picture changes only with its figures.
matplotlib.rcParams["svg.hashsalt"] = "fastformer"
matplotlib.rcParams["svg.fonttype"] = "none"
matplotlib.rcParams["font.family"] = "sans-serif"


def draw(results: dict, directory: Path) -> dict[str, str]:
    """One SVG for each operator and `overview.svg`; returns name -> file name."""
    cases = by_case(results["rows"])
    drawn = {}
    for operator in dict.fromkeys(key[0] for key in cases):
        chosen = {key: value for key, value in cases.items() if key[0] == operator}
        drawn[operator] = _save(_times(chosen), directory / f"{operator}.svg")
    groups = _ratios_by_group(cases)
    if groups:
        drawn["overview"] = _save(_overview(groups, results["run"]), directory / "overview.svg")
    return drawn


def _times(cases: dict) -> Figure:
    """Bars of each contender's time over torch's, so that short and long cases share one axis."""
    figure = Figure(figsize=(9, 1.0 + 0.62 * len(cases)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(CONTENDERS)
    for index, contender in enumerate(CONTENDERS):
        places, lengths = [], []
        for place, contenders in enumerate(cases.values()):
            ratio = speedup(contenders, over=contender, of="torch")
            if ratio is not None:
                places.append(place + (index - 1.5) * height)
                lengths.append(ratio)
        bars = axes.barh(places, lengths, height=height, color=COLOURS[contender], label=contender)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), [f"{case} {dtype}" for _, case, dtype in cases], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time, torch = 1 (shorter is better)")
    axes.legend(
        fontsize=8, ncols=len(CONTENDERS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _ratios_by_group(cases: dict) -> dict[str, dict[str, float]]:
    """ "operator dtype" -> rival -> geometric mean over its cases of how much faster fastformer is."""
    found: dict[str, dict[str, list[float]]] = {}
    for (operator, case, dtype), contenders in cases.items():
        kind = f" {case.split()[0]}" if operator == "attention" else ""
        for rival in CONTENDERS[:-1]:
            ratio = speedup(contenders, over=rival)
            if ratio is not None:
                found.setdefault(f"{operator}{kind} {dtype}", {}).setdefault(rival, []).append(ratio)
    return {
        group: {rival: statistics.geometric_mean(ratios) for rival, ratios in rivals.items()}
        for group, rivals in found.items()
    }


def _overview(groups: dict[str, dict[str, float]], run: dict) -> Figure:
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(groups)), layout="constrained")
    axes = figure.subplots()
    rivals = CONTENDERS[:-1]
    height = 0.8 / len(rivals)
    for index, rival in enumerate(rivals):
        places = [
            place + (index - 1) * height for place, found in enumerate(groups.values()) if rival in found
        ]
        lengths = [found[rival] for found in groups.values() if rival in found]
        bars = axes.barh(places, lengths, height=height, color=COLOURS[rival], label=f"over {rival}")
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("how many times faster fastformer is (geometric mean over the cases; longer is better)")
    axes.set_title(
        f"{run['device']}, {run['threads']} threads, torch {run['versions']['torch']}", fontsize=9, pad=22
    )
    axes.legend(fontsize=8, ncols=len(rivals), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, metadata={"Date": None})
    return path.name
