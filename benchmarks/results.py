"""Pooling of the passes: a row for each (case, threads, contender), with all its rounds and their median."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from benchmarks.case import CONTENDERS


class CaseKey(NamedTuple):
    """What the rows that are compared with one another have in common."""

    operator: str
    case: str
    dtype: str
    threads: int

    @property
    def kind(self) -> str:
        return self.case.split()[0]


def pooled(raw: dict) -> list[dict]:
    """The rows that conftest.py adds to pytest-benchmark's JSON, each with its rounds of all passes."""
    rounds: dict[str, list[float]] = {}
    for entry in raw["benchmarks"]:
        rounds.setdefault(entry["extra_info"]["row"], []).extend(entry["stats"]["data"])
    rows = []
    for found in raw["rows"]:
        names = ("operator", "case", "dtype", "threads", "contender")
        row = {name: found[name] for name in (*names, "status", "detail", "backend", "flops", "peak_bytes")}
        row["calls_per_round"] = found["iterations"]
        row["seconds"] = rounds.get(" ".join(str(row[name]) for name in names), [])
        row |= spread(row["seconds"], "_s")
        rows.append(row)
    return sorted(rows, key=lambda row: CONTENDERS.index(row["contender"]))


def spread(values: list[float], unit: str = "") -> dict[str, float | None]:
    """Median, and the middle half's ends: on a shared machine the extremes tell about the neighbours."""
    ordered, quarter = sorted(values), len(values) // 4
    found = (statistics.median(ordered), ordered[quarter], ordered[-1 - quarter]) if ordered else (None,) * 3
    return {name + unit: value for name, value in zip(("median", "low", "high"), found, strict=True)}


def by_case(rows: list[dict]) -> dict[CaseKey, dict[str, dict]]:
    """contender -> row for each case, in the order in which they were run."""
    cases: dict[CaseKey, dict[str, dict]] = {}
    for row in rows:
        key = CaseKey(row["operator"], row["case"], row["dtype"], row["threads"])
        cases.setdefault(key, {})[row["contender"]] = row
    return cases


def speedup(contenders: dict[str, dict], over: str, of: str = "fastformer") -> float | None:
    """How many times less time `of` takes than `over`; None unless both were right and timed."""
    ours, theirs = (contenders.get(name, {}).get("median_s") for name in (of, over))
    return theirs / ours if ours and theirs else None


def gflops(row: dict) -> float | None:
    """Floating-point operations that the result needs, in the time that it took."""
    return row["flops"] / row["median_s"] / 1e9 if row.get("flops") and row["median_s"] else None


def fma_fraction(row: dict, run: dict) -> float | None:
    """`gflops` over the float32 multiply-adds that as many cores do in registers; CPU only."""
    rate, peak = gflops(row), run["fma_gflops"].get(str(row.get("threads")))
    return rate / peak["median"] if rate and peak else None


def matmul_fraction(row: dict, run: dict) -> float | None:
    """`gflops` over those of the run's large matrix product in the same dtype, with as many threads."""
    rate = gflops(row)
    return rate / run["matmul_gflops"][str(row["threads"])][row["dtype"]] if rate else None
