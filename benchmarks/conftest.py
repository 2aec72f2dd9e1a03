"""How the cases are timed: pass after pass over the contenders, so that a slow spell hits them all.

pytest-benchmark times one function at a time. So that contenders alternate (A B C D, D C B A, ...),
every (case, pass, threads, contender) is a test of its own with a few rounds, in that order; results.py
pools the rounds of a contender over all passes. A contender is checked before its first round, and one
that is wrong or fails is reported and never timed. Before every pass the machine's own multiply-add peak is
measured, since a neighbour who slows the contenders slows it too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pytest
import torch

from benchmarks import machine
from benchmarks.case import Case, Contest, Grid, clock, thread_counts

_contest_key = pytest.StashKey[Contest]()
_verdicts_key = pytest.StashKey[dict]()
_fma_key = pytest.StashKey[dict[int, list[float]]]()


@dataclass(frozen=True)
class Turn:
    case: Case
    threads: int
    contender: str
    first_of_pass: bool
    last: bool

    def __str__(self) -> str:
        return f"{self.case.key} {self.threads} {self.contender}"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastformer benchmarks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--quick", action="store_true", help="small shapes, fewer passes, no torch.compile")
    group.addoption("--grid", choices=("default", "full"), default="default")
    group.addoption("--threads", type=thread_counts, default=(torch.get_num_threads(),))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_verdicts_key] = {}
    config.stash[_fma_key] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    grid = Grid(option("device"), option("quick"), option("grid") == "full", option("threads"))
    turns = [turn for case in metafunc.module.cases(grid) for turn in turns_of(case, grid)]
    metafunc.parametrize("turn", turns, ids=str)


def turns_of(case: Case, grid: Grid) -> list[Turn]:
    once = [(threads, contender) for threads in grid.threads for contender in grid.contenders]
    turns = []
    for number in range(grid.passes):
        for place, (threads, contender) in enumerate(once[:: -1 if number % 2 else 1]):
            last = number == grid.passes - 1 and place == len(once) - 1
            turns.append(Turn(case, threads, contender, place == 0, last))
    return turns


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock, disable_gc=True))


@pytest.fixture
def take(turn: Turn, request: pytest.FixtureRequest, benchmark):
    """Calling it checks the turn's contender, times it, and notes both for the report."""
    stash = request.config.stash
    contest = stash.get(_contest_key, None)
    if contest is None or contest.case is not turn.case:
        contest = stash[_contest_key] = Contest(turn.case, request.config.getoption("quick"))

    if turn.first_of_pass and request.config.getoption("device") == "cpu":
        for threads in request.config.getoption("threads"):
            stash[_fma_key].setdefault(threads, []).extend(machine.fma_gflops(threads))

    def check_and_time() -> None:
        case = turn.case
        torch.set_num_threads(turn.threads)
        with torch.set_grad_enabled(case.needs_grad):
            verdict = contest.verdict(turn.contender)
            row = {"operator": case.operator, "case": case.name, "dtype": case.dtype_name}
            row |= {"threads": torch.get_num_threads(), "contender": turn.contender, "flops": case.flops}
            stash[_verdicts_key][str(turn)] = row | asdict(verdict)
            if not verdict.timed:
                pytest.skip(f"{verdict.status}: {verdict.detail}")
            benchmark.extra_info["row"] = str(turn)
            # What ran before has taken the caches: one round to take them back.
            benchmark.pedantic(
                case.contenders[turn.contender],
                args=contest.inputs,
                rounds=verdict.rounds,
                iterations=verdict.iterations,
                warmup_rounds=1 if verdict.rounds > 1 else 0,
            )

    yield check_and_time
    if turn.last:
        del stash[_contest_key]
        # Dynamo counts recompilations per code object: without this, the ninth shape runs eagerly.
        torch.compiler.reset()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    output_json["rows"] = list(config.stash[_verdicts_key].values())
    output_json["fma_gflops"] = config.stash[_fma_key]
