"""How the cases are timed: pass after pass over the contenders, so that a slow spell hits them all.

pytest-benchmark times one function at a time. So that contenders alternate (A B C D, D C B A, ...),
every (case, pass, contender) is a test of its own with a few rounds, in that order; results.py pools
the rounds of a contender over all passes. A contender is checked before its first round, and one that
is wrong or fails is reported and never timed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pytest
import torch

from benchmarks.case import Case, Contest, Grid, clock

_contest_key = pytest.StashKey[Contest]()
_verdicts_key = pytest.StashKey[dict]()


@dataclass(frozen=True)
class Turn:
    case: Case
    contender: str
    last: bool

    def __str__(self) -> str:
        return f"{self.case.key} {self.contender}"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastformer benchmarks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--quick", action="store_true", help="small shapes, fewer passes, no torch.compile")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_verdicts_key] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    grid = Grid(metafunc.config.getoption("device"), metafunc.config.getoption("quick"))
    turns = []
    for case in metafunc.module.cases(grid):
        for number in range(grid.passes):
            order = grid.contenders[:: -1 if number % 2 else 1]
            turns += [Turn(case, name, number == grid.passes - 1 and name == order[-1]) for name in order]
    metafunc.parametrize("turn", turns, ids=str)


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

    def check_and_time() -> None:
        case = turn.case
        with torch.set_grad_enabled(case.needs_grad):
            verdict = contest.verdict(turn.contender)
            row = {"operator": case.operator, "case": case.name, "dtype": case.dtype_name}
            row |= {"contender": turn.contender, "flops": case.flops} | asdict(verdict)
            stash[_verdicts_key][f"{case.key} {turn.contender}"] = row
            if verdict.status != "right":
                pytest.skip(f"{verdict.status}: {verdict.detail}")
            benchmark.extra_info["row"] = f"{case.key} {turn.contender}"
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
