"""results.json as people read it: report.md with its plots, and the table on the terminal.

`python -m benchmarks.report DIRECTORY` draws a directory's results.json anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from benchmarks import plots
from benchmarks.case import CONTENDERS
from benchmarks.results import by_case, peak_fraction, speedup

# What stands above each operator's table: what it is, and what its columns hold.
OPERATORS = {
    "attention": "Forward, without gradient. naive: matmul, masked softmax, matmul; torch: "
    "`scaled_dot_product_attention`; compile: the naive composition, compiled.",
    "layer_norm": "Forward. naive: mean, variance and scaling written out; torch: `F.layer_norm`; "
    "compile: that, compiled.",
    "add_norm": "Forward, both outputs (the norm and the sum). torch: `x + residual`, then `F.layer_norm`; "
    "compile: that, compiled.",
    "feed_forward": "Forward with erf-GELU, tokens x width x hidden. naive: matmuls and GELU's formula; "
    "torch: `F.linear`, `F.gelu`, `F.linear`; compile: that, compiled.",
    "launch": "layer_norm on 4 rows of 64: what a call costs before it computes anything.",
    "sentence_encoder": "all-MiniLM-L6-v2 encodes paragraphs of the Python language reference. naive: stock "
    "with eager attention; torch: stock with SDPA; compile: that, compiled for ragged shapes (with frozen "
    "weights on a CPU); fastformer: stock after `fastformer.patch(model)`.",
}


def write(results: dict, directory: Path) -> None:
    """results.json, the plots and report.md, into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    drawn = plots.draw(results, directory)
    (directory / "report.md").write_text(_markdown(results, drawn))


def wrong_rows(results: dict) -> list[dict]:
    return [row for row in results["rows"] if row["status"] != "right"]


def name_of(row: dict) -> str:
    return f"{row['operator']} {row['case']} {_short(row['dtype'])}, {row['contender']}"


def memory_cells(memory: list[dict]) -> list[str]:
    """For each contender its name and MiB, or why there is no figure."""
    cells = []
    for entry in memory:
        measured = entry["detail"] or f"{entry['peak_bytes'] / 2**20:.0f} MiB"
        cells.append(f"{entry['contender']} {measured}")
    return cells


def table(results: dict) -> Table:
    """One line a case: the median of each contender, and fastformer against the two that count."""
    drawn = Table(title="median time of a call", title_justify="left", box=SIMPLE_HEAD)
    for name in ("operator", "case"):
        drawn.add_column(name, no_wrap=True)
    for name in (*CONTENDERS, "vs torch", "vs compile"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("backend", no_wrap=True, max_width=9)
    previous = None
    for (operator, case, dtype), contenders in by_case(results["rows"]).items():
        if operator != previous and previous is not None:
            drawn.add_section()
        cells = [_rich_time(contenders.get(name)) for name in CONTENDERS]
        ratios = [_ratio(speedup(contenders, over=name)) for name in ("torch", "compile")]
        drawn.add_row(
            operator if operator != previous else "",
            f"{case} {_short(dtype)}",
            *cells,
            *ratios,
            _backend(contenders),
        )
        previous = operator
    return drawn


def summary(results: dict) -> str:
    """The run in a few words: where, with what, how fast a matrix product is there."""
    run = results["run"]
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in run["versions"].items())
    peaks = ", ".join(
        f"{value:,.0f} GFLOP/s {_short(dtype)}" for dtype, value in run["matmul_gflops"].items()
    )
    commit = (run["commit"] or "no commit")[:12] + (" with local changes" if run["dirty"] else "")
    return f"{run['device']}, {run['threads']} threads; {versions}; {commit}; matrix product {peaks}"


def _markdown(results: dict, drawn: dict[str, str]) -> str:
    run = results["run"]
    lines = ["# Benchmark", "", summary(results) + ".", ""]
    lines += [
        f"{run['when']}, {run['passes']} alternating passes over the contenders, medians of their rounds. "
        "Every contender was checked against a float64 oracle before it was timed; a wrong one has no time. "
        "“Peak” is the share of the speed of a large `torch.mm` in that dtype, measured in the same run "
        f"(in float32 before and after: {run['matmul_before']:,.0f} and {run['matmul_after']:,.0f} GFLOP/s).",
        "",
    ]
    if "overview" in drawn:
        lines += [f"![fastformer against torch and torch.compile]({drawn['overview']})", ""]
    for operator in dict.fromkeys(row["operator"] for row in results["rows"]):
        lines += [f"## {operator}", "", OPERATORS.get(operator, ""), ""]
        if operator in drawn:
            lines += [f"![{operator}]({drawn[operator]})", ""]
        lines += [*_markdown_table(results, operator), ""]
        lines += _patch_reports(results, operator)
    if results["memory"]:
        lines += _memory_table(results["memory"])
    wrong = wrong_rows(results)
    if wrong:
        lines += ["## Not right", ""]
        lines += [f"- {name_of(row)}: **{row['status']}**, {row['detail']}" for row in wrong] + [""]
    return "\n".join(lines)


def _markdown_table(results: dict, operator: str) -> list[str]:
    heads = ["case", *CONTENDERS, "vs torch", "vs compile", "peak", "backend"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 2) + " --- |"]
    for (name, case, dtype), contenders in by_case(results["rows"]).items():
        if name != operator:
            continue
        ours = contenders.get("fastformer", {})
        fraction = peak_fraction(ours, results["run"]["matmul_gflops"]) if ours else None
        cells = [f"{case} {_short(dtype)}"]
        cells += [_time(contenders.get(contender)) for contender in CONTENDERS]
        cells += [_ratio(speedup(contenders, over=rival)) for rival in ("torch", "compile")]
        cells += ["" if fraction is None else f"{fraction:.2f}", _backend(contenders)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _patch_reports(results: dict, operator: str) -> list[str]:
    """What `fastformer.patch` said about a model, which its row has in place of a backend's name."""
    told = dict.fromkeys(row["backend"] for row in results["rows"] if row["operator"] == operator)
    return [line for text in told if "\n" in text for line in ("```", text, "```", "")]


def _backend(contenders: dict[str, dict]) -> str:
    return contenders.get("fastformer", {}).get("backend", "").partition("\n")[0]


def _memory_table(memory: list[dict]) -> list[str]:
    lines = ["## Peak memory of the sentence encoder", ""]
    lines += ["What encoding the longest batch in float32 adds, each contender in a process of its own.", ""]
    return [*lines, *(f"- {cell}" for cell in memory_cells(memory)), ""]


def _time(row: dict | None) -> str:
    if row is None:
        return ""
    if row["status"] != "right":
        return f"**{row['status'].upper()}**"
    seconds = row["median_s"]
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _rich_time(row: dict | None) -> Text:
    text = _time(row).strip("*")
    return Text(text, style="bold red" if row and row["status"] != "right" else "")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _short(dtype: str) -> str:
    return {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}.get(dtype, dtype)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(json.loads((folder / "results.json").read_text()), folder)
