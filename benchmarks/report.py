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
from benchmarks.results import CaseKey, by_case, fma_fraction, gflops, matmul_fraction, speedup

INACCURATE = "†"
# What stands above each operator's table: what it is, and what its columns hold.
OPERATORS = {
    "attention": "Forward, without gradient, BxHxNxD. naive: matmul, masked softmax, matmul; torch: "
    "`scaled_dot_product_attention` with the same arguments; compile: the naive composition, compiled. "
    "masked: a random bool mask [B, 1, N, N] that shows 70 percent; bias: float [1, H, N, N]. "
    "dropout drops a tenth, by each contender's own random numbers: fastformer is held to its reference "
    "backend with the same seed, the others to the mean and the variance that dropout has.",
    "attention_training": "Forward, then the gradients of query, key, value, and of bias where there is one.",
    "decode": "Forward of one query a head, BxHxNxD over N keys; 8/2 heads: four of query's share one of "
    "key's, which naive repeats.",
    "layer_norm": "Forward. naive: mean, variance and scaling written out; torch: `F.layer_norm`; "
    "compile: that, compiled.",
    "add_norm": "Forward, both outputs (the norm and the sum). torch: `x + residual`, then `F.layer_norm`; "
    "compile: that, compiled.",
    "feed_forward": "Forward, tokens x width x hidden; gelu (erf) with biases, swiglu without. naive: "
    "matmuls and the formula; torch: `F.linear`, `F.gelu` or `F.silu`, `F.linear`; compile: that, compiled.",
    "feed_forward_training": "Forward, then the gradients of x, the weights and the biases.",
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
    threads = f"{row['threads']} thread" + "s" * (row["threads"] != 1)
    return f"{row['operator']} {row['case']} {_short(row['dtype'])}, {threads}, {row['contender']}"


def label(key: CaseKey, run: dict) -> str:
    """A case in its operator's table or picture; it names the threads where the run had several counts."""
    threads = f" {key.threads}T" if len(run["threads"]) > 1 else ""
    return f"{key.case} {_short(key.dtype)}{threads}"


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
    drawn.add_column("case", no_wrap=True)
    for name in (*CONTENDERS, "vs torch", "vs compile", "GF/s", "peak"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("backend", no_wrap=True, max_width=13)
    previous = None
    for key, contenders in by_case(results["rows"]).items():
        if key.operator != previous:
            drawn.add_section()
            drawn.add_row(Text(key.operator, style="bold"))
            previous = key.operator
        cells = [_rich_time(contenders.get(name)) for name in CONTENDERS]
        ratios = [_ratio(speedup(contenders, over=name)) for name in ("torch", "compile")]
        rates = _rates(contenders, results["run"])[:2]
        drawn.add_row(label(key, results["run"]), *cells, *ratios, *rates, _backend(contenders))
    return drawn


def summary(results: dict) -> str:
    """The run in a few words: where, with what, how fast a matrix product is there."""
    run = results["run"]
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in run["versions"].items())
    peaks = "; ".join(_peaks(run, str(threads)) for threads in run["threads"])
    commit = (run["commit"] or "no commit")[:12] + (" with local changes" if run["dirty"] else "")
    return f"{run['device']}; {versions}; {commit}; {peaks}"


def _peaks(run: dict, threads: str) -> str:
    """What the machine does at best with as many threads."""
    products = run["matmul_gflops"][threads].items()
    told = "matrix product " + ", ".join(f"{rate:,.0f} GFLOP/s {_short(dtype)}" for dtype, rate in products)
    peak = run["fma_gflops"].get(threads)
    if peak:
        told += f", multiply-add peak {peak['median']:,.0f} f32 ({peak['low']:,.0f} to {peak['high']:,.0f})"
    return f"{threads} thread{'s' * (threads != '1')}: {told}"


def _markdown(results: dict, drawn: dict[str, list[str]]) -> str:
    run = results["run"]
    lines = ["# Benchmark", "", summary(results) + ".", ""]
    lines += [
        f"{run['when']}, {run['passes']} alternating passes over the contenders, medians of their rounds. "
        "Every contender was checked against a float64 oracle before it was timed; a wrong one has no time, "
        f"and one marked {INACCURATE} is less accurate than fastformer may be. "
        "GF/s counts the floating-point operations that fastformer's result needs. “Peak” is their share of "
        "the float32 multiply-adds that as many threads do on registers alone at the instruction set level "
        "in use, measured before every pass and the run's median taken (on a CPU; bfloat16 by pairs can "
        "exceed 1). “Matmul” is their share of the speed of a large `torch.mm` in that dtype, the best from "
        "before and after the run.",
        "",
    ]
    if "overview" in drawn:
        lines += [f"![fastformer against torch and torch.compile]({drawn['overview'][0]})", ""]
    for operator in dict.fromkeys(row["operator"] for row in results["rows"]):
        lines += [f"## {operator}", "", OPERATORS.get(operator, ""), ""]
        for picture in drawn.get(operator, []):
            lines += [f"![{operator}]({picture})", ""]
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
    heads = ["case", *CONTENDERS, "vs torch", "vs compile", "GF/s", "peak", "matmul", "backend"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 2) + " --- |"]
    for key, contenders in by_case(results["rows"]).items():
        if key.operator != operator:
            continue
        cells = [label(key, results["run"])]
        cells += [_time(contenders.get(contender)) for contender in CONTENDERS]
        cells += [_ratio(speedup(contenders, over=rival)) for rival in ("torch", "compile")]
        cells += [*_rates(contenders, results["run"]), _backend(contenders)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _rates(contenders: dict[str, dict], run: dict) -> tuple[str, str, str]:
    """fastformer's GF/s and their shares of the multiply-add peak and of a matrix product."""
    ours = contenders.get("fastformer", {})
    shares = (fma_fraction(ours, run), matmul_fraction(ours, run))
    rate = gflops(ours)
    return "" if rate is None else f"{rate:.3g}", *(
        "" if share is None else f"{share:.2f}" for share in shares
    )


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
    seconds = row["median_s"]
    if seconds is None:
        return f"**{row['status'].upper()}**"
    mark = INACCURATE if row["status"] == "inaccurate" else ""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}{mark}"
    return f"{seconds * 1e6:.3g} µs{mark}"


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
