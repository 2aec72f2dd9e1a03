"""Pooling of the passes: one row for each (case, contender), with all its rounds and their median."""

from __future__ import annotations

import statistics

from benchmarks.case import CONTENDERS


def pooled(raw: dict) -> list[dict]:
    """The rows that conftest.py adds to pytest-benchmark's JSON, each with its rounds of all passes."""
    rounds: dict[str, list[float]] = {}
    for entry in raw["benchmarks"]:
        rounds.setdefault(entry["extra_info"]["row"], []).extend(entry["stats"]["data"])
    rows = []
    for found in raw["rows"]:
        row = {name: found[name] for name in ("operator", "case", "dtype", "contender", "status", "detail")}
        row |= {"backend": found["backend"], "flops": found["flops"], "calls_per_round": found["iterations"]}
        row["peak_bytes"] = found["peak_bytes"]
        row["seconds"] = rounds.get(f"{row['operator']} {row['case']} {row['dtype']} {row['contender']}", [])
        row |= _summary(row["seconds"])
        rows.append(row)
    return sorted(rows, key=lambda row: CONTENDERS.index(row["contender"]))


def _summary(seconds: list[float]) -> dict:
    if not seconds:
        return {"median_s": None, "low_s": None, "high_s": None}
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    # The middle half of the rounds: on a shared machine the extremes tell about the neighbours.
    return {
        "median_s": statistics.median(ordered),
        "low_s": ordered[quarter],
        "high_s": ordered[-1 - quarter],
    }


def by_case(rows: list[dict]) -> dict[tuple[str, str, str], dict[str, dict]]:
    """(operator, case, dtype) -> contender -> row, in the order in which they were run."""
    cases: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["operator"], row["case"], row["dtype"]), {})[row["contender"]] = row
    return cases


def speedup(contenders: dict[str, dict], over: str, of: str = "fastformer") -> float | None:
    """How many times less time `of` takes than `over`; None unless both were right and timed."""
    ours, theirs = (contenders.get(name, {}).get("median_s") for name in (of, over))
    return theirs / ours if ours and theirs else None


def peak_fraction(row: dict, matmul_gflops: dict[str, float]) -> float | None:
    """Needed floating-point operations over what the run's matrix product would have done in that time."""
    if not row["flops"] or not row["median_s"]:
        return None
    return row["flops"] / row["median_s"] / 1e9 / matmul_gflops[row["dtype"]]
