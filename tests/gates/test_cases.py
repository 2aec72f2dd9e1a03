"""The cases of the gates leave out no tile that configs.py can choose, and are few enough to be run."""

from __future__ import annotations

from itertools import count

import pytest

pytest.importorskip("triton")

from fastformer.triton_kernels import configs

from tests.triton.offline import TARGETS, catch_launches

from .readings import CASES

# {operator: the tables that its tiles come from}; the norms' cases go by norm_configs.norm_configs.
TABLES = {
    "attention": (
        "_PLAIN",
        "_MORE",
        "_MANY",
        "_FLOAT32",
        "_FLOAT32_FEW",
        "_PLAIN_BWD",
        "_IRREGULAR_BWD",
        "_MORE_BWD",
        "_FLOAT32_BWD",
        "_PLAIN_FLOAT32_BWD",
    ),
    "feed_forward": ("_GEMM", "_UNALIGNED"),
}
CHOOSERS = (configs.attention_fwd_config, configs.attention_bwd_config, configs.gemm_config)
# Of one target. On one core a case of a norm takes a second, one of the others 3 to 12.
MOST_CASES = {"norm": 260, "attention": 95, "feed_forward": 40}
# The same of kernels in CUDA C++, which take 4.
MOST_COMPILED = {"norm": 146, "attention": 64, "feed_forward": 15}


def relabelled(table, labels, path=()):
    """The table with a number of its own for each tile's warps and stages, and {number: where it stands}."""
    if isinstance(table, dict):
        pairs = table.items()
    elif hasattr(table, "num_warps"):
        label = next(labels)
        return table._replace(num_warps=label, num_stages=label), {label: path}
    else:
        pairs = enumerate(table)
    found = {key: relabelled(value, labels, (*path, key)) for key, value in pairs}
    places = {label: place for _, of_value in found.values() for label, place in of_value.items()}
    values = {key: value for key, (value, _) in found.items()}
    return values if isinstance(table, dict) else tuple(values.values()), places


def stands_for(place, target):
    """Whether a target's calls can come to this place of a table."""
    name, key, *rest = place
    if name == "_MANY":
        return rest[0] == target
    if name == "_IRREGULAR_BWD":
        return key == target
    if name in ("_PLAIN", "_MORE", "_PLAIN_BWD", "_MORE_BWD", "_FLOAT32_BWD"):
        default = "any" if name == "_MORE" else "sm_80"
        return key == (target if target in getattr(configs, name) else default)
    if name == "_FLOAT32_FEW":
        return target.startswith("sm_")
    return name != "_GEMM" or key == configs._FAMILY.get(target, "mma")


def launches_of(monkeypatch, target, operator):
    """Every launch of all cases."""
    launches = []
    with monkeypatch.context() as patch:
        catch_launches(patch, target, launches.append)
        for op in CASES:
            if op.startswith(operator):
                for case in CASES[op](target):
                    if not case.compiled:
                        case.call()
    return launches


@pytest.fixture
def places(monkeypatch):
    """{the number of warps and of stages of an entry: where it stands}, for every entry of the tables."""
    labels, found = count(1000), {}
    for name in (name for names in TABLES.values() for name in names):
        table, places = relabelled(getattr(configs, name), labels, (name,))
        monkeypatch.setattr(configs, name, table)
        found |= places
    for choose in CHOOSERS:
        choose.cache_clear()
    yield found
    for choose in CHOOSERS:
        choose.cache_clear()


@pytest.mark.parametrize("operator", TABLES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_entry_is_reached(monkeypatch, places, target, operator):
    launches = launches_of(monkeypatch, target, operator)
    wanted = {
        label: place
        for label, place in places.items()
        if place[0] in TABLES[operator] and stands_for(place, target)
    }
    # Of AMD's chips only the stages are the entry's.
    reached = {launch.options.get(name) for launch in launches for name in ("num_warps", "num_stages")}
    assert wanted and not [place for label, place in wanted.items() if label not in reached]
    # Of few queries in 16 bits only a tile's keys and stages are the entry's.
    few = {launch.options.get("num_stages") for launch in launches if launch.options.get("BLOCK_M", 32) <= 16}
    tables = ("_PLAIN", "_MORE", "_FLOAT32_FEW" if target.startswith("sm_") else "_FLOAT32")
    forward = {label: place for label, place in wanted.items() if place[0] in tables}
    assert not [place for label, place in forward.items() if label not in few]


@pytest.mark.parametrize("operator", MOST_CASES)
def test_every_launch_tells_whether_multiplications_may_be_fused(monkeypatch, operator):
    launches = launches_of(monkeypatch, "sm_90", operator)
    untold = {launch.kernel.__name__ for launch in launches if "enable_fp_fusion" not in launch.options}
    assert launches and not untold


@pytest.mark.parametrize("operator", MOST_CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_cases_are_few(target, operator):
    cases = [case for op in CASES if op.startswith(operator) for case in CASES[op](target)]
    compiled = sum(case.compiled for case in cases)
    assert len(cases) - compiled <= MOST_CASES[operator]
    assert compiled <= MOST_COMPILED[operator]
