"""python -m benchmarks: check and time everything, then write the report. `--help` lists the options."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import machine, memory, report
from benchmarks.case import Grid, thread_counts
from benchmarks.results import pooled, spread

FOLDER = Path(__file__).parent
# Below it rich would cut figures; a narrow terminal wraps the lines instead.
TABLE_WIDTH = 150
# `--only NAME` runs bench_NAME.py.
MODULES = ("attention", "decode", "norm", "feed_forward", "launch", "sentence_encoder")
PYTEST_OPTIONS = ["-q", "-rs", "-W", "ignore", "-p", "no:cacheprovider", "--capture=no", "--benchmark-quiet"]
PYTEST_OPTIONS += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]


class ProgressBar:
    """A pytest plugin that moves the bar where pytest would print dots; in a log, a line for each file."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("collecting", total=None)
        self._file = ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._progress.update(self._task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str, location: tuple) -> None:
        if location[0] != self._file and not self._progress.console.is_terminal:
            self._progress.console.print(location[0], highlight=False)
        self._file = location[0]
        # pytest tells the passes of one turn apart by a number at the end.
        description = nodeid.partition("[")[2].rstrip("0123456789]")
        self._progress.update(self._task, description=description)

    def pytest_runtest_logfinish(self) -> None:
        self._progress.advance(self._task)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: all is right. 1: a fastformer row is not, or the benchmark itself broke."""
    options = _parser().parse_args(arguments)
    grid = Grid(options.device, options.quick, options.grid == "full", options.threads)
    console = Console(stderr=True)
    with _progress(console) as progress:
        before = _matmul(grid, ["float32"])
        raw = _timed(options, progress)
        if raw is None:
            return 1
        found = _memory(grid, progress) if "sentence_encoder" in options.only else []
        after = _matmul(grid, list(dict.fromkeys(["float32", *(row["dtype"] for row in raw["rows"])])))
    results = {
        "run": machine.description(grid.device)
        | {"commit": raw["commit_info"].get("id"), "dirty": raw["commit_info"].get("dirty")}
        | {
            "when": raw["datetime"][:16].replace("T", " ") + " UTC",
            "passes": grid.passes,
            "quick": grid.quick,
            "threads": list(grid.threads),
        }
        | {"matmul_gflops": _best(before, after), "matmul_before": before, "matmul_after": after}
        | {"fma_gflops": {threads: spread(found) for threads, found in raw["fma_gflops"].items() if found}},
        "rows": pooled(raw),
        "memory": found,
    }
    report.write(results, options.report)
    _tell(results, options.report)
    return int(any(row["contender"] == "fastformer" for row in report.wrong_rows(results)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Check and time fastformer.")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small shapes in float32, fewer passes, no torch.compile: under a minute",
    )
    parser.add_argument(
        "--grid",
        choices=("default", "full"),
        default="default",
        help="full: attention's every kind at every length, both ways, in fewer passes: up to an hour",
    )
    parser.add_argument("--only", nargs="+", choices=MODULES, default=MODULES, help="these parts alone")
    parser.add_argument(
        "--threads",
        type=_thread_counts,
        default=(torch.get_num_threads(),),
        metavar="N,...",
        help="CPU threads; several, such as 1,all, take turns in one run (default: all, that is torch's)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: the GPU where there is one",
    )
    parser.add_argument("--report", type=Path, default=FOLDER / "report", help="folder for the report")
    return parser


def _thread_counts(text: str) -> tuple[int, ...]:
    try:
        return thread_counts(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


def _timed(options: argparse.Namespace, progress: Progress) -> dict | None:
    """pytest-benchmark's JSON of all passes, or None after telling what broke."""
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        arguments = [str(FOLDER / f"bench_{name}.py") for name in options.only]
        arguments += [f"--rootdir={FOLDER.parent}", f"--device={options.device}", f"--benchmark-json={raw}"]
        arguments += ["--quick"] * options.quick + [f"--grid={options.grid}"] + PYTEST_OPTIONS
        arguments.append(f"--threads={','.join(map(str, options.threads))}")
        with contextlib.redirect_stdout(printed):
            status = pytest.main(arguments, plugins=[ProgressBar(progress)])
        # Where nothing was right pytest-benchmark writes nothing; what was printed says why.
        if status != pytest.ExitCode.OK or not raw.exists():
            print(printed.getvalue(), file=sys.stderr)
            return None
        return json.loads(raw.read_text())


def _memory(grid: Grid, progress: Progress) -> list[dict]:
    task = progress.add_task("peak memory of the sentence encoder", total=len(grid.contenders))
    found = []
    for contender in grid.contenders:
        measured = memory.in_fresh_process(contender, grid, max(grid.threads))
        bytes_, detail = (measured, "") if isinstance(measured, int) else (None, measured)
        found.append({"contender": contender, "peak_bytes": bytes_, "detail": detail})
        progress.advance(task)
    return found


def _matmul(grid: Grid, dtypes: list[str]) -> dict[str, dict[str, float]]:
    """Threads -> dtype -> GFLOP/s of a large matrix product; in JSON all keys are strings."""
    found = {}
    for threads in grid.threads:
        torch.set_num_threads(threads)
        found[str(threads)] = {
            dtype: machine.matmul_gflops(grid.device, getattr(torch, dtype)) for dtype in dtypes
        }
    return found


def _best(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict:
    return {
        threads: {dtype: max(found, before[threads].get(dtype, 0.0)) for dtype, found in dtypes.items()}
        for threads, dtypes in after.items()
    }


def _tell(results: dict, folder: Path) -> None:
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(report.table(results))
    for row in report.wrong_rows(results):
        print(f"{row['status'].upper()}: {report.name_of(row)}: {row['detail']}")
    if results["memory"]:
        print("peak memory of an encoding:", ", ".join(report.memory_cells(results["memory"])))
    print(report.summary(results))
    print(f"report: {folder / 'report.md'}")


if __name__ == "__main__":
    sys.exit(main())
