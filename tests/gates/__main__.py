"""Compiles every configuration that can be chosen for every target, and judges what the kernels take and do.

Exits with 1 where one misses its limits. No GPU is needed, and no time is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from tests.triton.offline import SHARED_LIMIT, TARGETS

from .limits import ANCHORS, misses, useful
from .readings import CASES, Reading, read_place

_HEADER = f"{'kernel':22} {'target':7} {'case':46} {'regs':>4} {'spill':>5} {'shared':>6}"
_HEADER += f" {'nt':>6} {'serial':>6} {'w1':>5} {'B/slot':>6}"


def _row(reading: Reading) -> str:
    row = (
        f"{reading.kernel:22} {reading.target:7} {reading.case:46} {reading.registers:4} {reading.spilled:5}"
    )
    row += f" {reading.shared:6}"
    loop = reading.loop
    if reading.bytes_per_slot is not None:
        return f"{row} {'':6} {'':6} {'':5} {reading.bytes_per_slot:6.1f}"
    if loop is None:
        return row
    if loop.tensor:
        return f"{row} {loop.nt:6.2f} {loop.serial:6.2f} {loop.w1:5.2f} {loop.bytes_per_slot:6.1f}"
    return f"{row} {'':6} {'':6} {'':5} {loop.bytes_per_slot:6.1f}"


def _figures(readings: Sequence[Reading]) -> Iterable[str]:
    """A case's figures by useful product, above those of the best shipped binaries."""
    first = readings[0]
    figures = useful(first.op, readings)
    if first.dim is None or figures is None:
        return
    width = len(_HEADER) - 29
    name = f"{first.op} {first.target} D={first.dim}, of all its kernels per useful product"
    yield f"  {name:{width}} {figures.nt:6.2f} {figures.serial:6.2f} {figures.w1:5.2f}"
    for anchor in ANCHORS.get((first.op, first.target, first.dim), ()):
        name = f"beside {anchor.name}, which spills in {anchor.spilling} instructions"
        yield f"    {name:{width - 2}} {anchor.nt:6.2f} {anchor.serial:6.2f} {anchor.w1:5.2f}"


def _summary(readings: Iterable[Reading]) -> Iterable[str]:
    """One line for each kernel and target: the most that any of its configurations takes."""
    by_kernel = lambda reading: (reading.op, reading.kernel, list(TARGETS).index(reading.target))
    for (_, kernel, _), group in groupby(sorted(readings, key=by_kernel), by_kernel):
        of_kernel = list(group)
        most = [max(getattr(r, name) for r in of_kernel) for name in ("registers", "spilled", "shared")]
        target = of_kernel[0].target
        count = f"at most, of {len(of_kernel)} cases ({SHARED_LIMIT[target]} bytes shared)"
        yield f"{kernel:22} {target:7} {count:46} {most[0]:4} {most[1]:5} {most[2]:6}"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gates", description=__doc__)
    parser.add_argument("--op", nargs="+", default=list(CASES), choices=CASES, help="default: all")
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=TARGETS, help="default: all")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default %(default)s)")
    parser.add_argument("--all", action="store_true", help="a row for every configuration")
    parser.add_argument("--json", type=Path, help="write every reading to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    places = [
        (op, target, index)
        for op in options.op
        for target in options.target
        for index, case in enumerate(CASES[op](target))
        if options.case in case.name
    ]
    print(_HEADER)
    every: list[Reading] = []
    missed = 0
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(read_place, place) for place in places]
        for (op, target, index), reader in zip(places, running, strict=True):
            try:
                readings = reader.result()
            except Exception as error:  # an hour's other cases are worth more than its traceback
                missed += 1
                name = list(CASES[op](target))[index].name
                print(f"  MISSED: {op} {target} {name}: {type(error).__name__}: {error}", flush=True)
                continue
            every += readings
            found = misses(readings)
            missed += bool(found)
            if options.all or found or readings[0].dim is not None:
                print(*map(_row, readings), *_figures(readings), sep="\n", flush=True)
            for sentence in found:
                print(f"  MISSED: {sentence}", flush=True)
    print(*_summary(every), sep="\n")
    print(f"{len(places)} cases, {len(every)} kernels; {missed} cases miss a limit")
    if options.json:
        options.json.write_text(json.dumps([asdict(reading) for reading in every], indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
