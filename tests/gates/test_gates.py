"""The gates themselves: a few configurations in every run, all of them with -m slow or `make gates`."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from fastformer import dispatch
from fastformer.backends import cuda, triton
from fastformer.specs import AttentionSpec
from tests.ptxvm import nvcc
from tests.triton.offline import SHARED_LIMIT, TARGETS

from .__main__ import main
from .hot_loop import HotLoop
from .limits import EXCUSED_SPILLS, LIMITS, MOST_SPILLED, RUN_PRODUCTS, SECOND_CHOICE, misses, useful
from .readings import CASES, Reading, read

# (operator and direction, target, case).
SOME = [
    ("norm_fwd", "sm_90", "C=1024 align=8 bfloat16"),
    ("norm_bwd", "sm_90", "C=8192 align=8 mixed dropout"),
    ("norm_bwd", "sm_80", "C=1024 align=8 float32 dropout"),
    ("norm_fwd", "sm_120", "C=16384 align=1 float32 dropout"),
    ("norm_fwd", "gfx942", "C=64 align=8 bfloat16 dropout"),
    ("norm_bwd", "gfx950", "C=16384 align=8 float16 rms"),
    ("norm_fwd_cuda", "sm_80", "C=1024 bfloat16"),
    ("norm_fwd_cuda", "sm_120", "C=8192 mixed dropout"),
    ("norm_bwd_cuda", "sm_80", "C=1024 bfloat16"),
    ("norm_bwd_cuda", "sm_120", "C=768 float32"),
    ("attention_fwd", "sm_90", "D=64 D_v=64 bfloat16 plain"),
    ("attention_fwd", "sm_80", "D=64 D_v=64 bfloat16 window"),
    ("attention_fwd", "sm_90", "D=128 D_v=128 bfloat16 key mask"),
    ("attention_fwd", "sm_90", "D=128 D_v=128 bfloat16 everything, one query"),
    ("attention_bwd", "sm_80", "D=64 D_v=64 bfloat16 causal"),
    ("feed_forward_fwd", "sm_90", "bfloat16 tile 0 even"),
    ("feed_forward_bwd", "sm_80", "bfloat16 tile 0 even"),
    ("attention_fwd_cuda", "sm_80", "D=128 bfloat16 whole"),
    ("attention_fwd_cuda", "sm_80", "D=64 bfloat16 whole"),
    ("attention_fwd_cuda", "sm_120", "D=128 float16 general"),
    ("attention_fwd_cuda", "sm_90", "D=256 bfloat16 few"),
    ("attention_bwd_cuda", "sm_80", "D=128 bfloat16 plain"),
    ("attention_bwd_cuda", "sm_80", "D=64 bfloat16 plain"),
    ("attention_bwd_cuda", "sm_90", "D=128 float16 general"),
    ("attention_sums_cuda", "sm_80", "every call"),
    ("feed_forward_cuda", "sm_80", "bfloat16 hidden_gradient"),
    ("feed_forward_cuda", "sm_120", "float16 weight_gradient"),
]


def case_of(op, target, name):
    if compiles_nothing(op, target):
        pytest.skip("nvcc was not found")
    (case,) = (case for case in CASES[op](target) if case.name == name)
    return case


def compiles_nothing(op, target):
    """nvcc may be absent, and compiles for NVIDIA's chips alone."""
    return op.endswith("_cuda") and (nvcc.find_nvcc() is None or not target.startswith("sm_"))


@pytest.mark.parametrize("op, target, name", SOME)
def test_some_configurations_keep_to_their_limits(record_property, op, target, name):
    readings = read(case_of(op, target, name), target)
    for reading in readings:
        record_property(f"{target} {reading.kernel} {name}", str(reading))
    assert misses(readings) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", CASES)
def test_every_configuration_keeps_to_its_limits(op, target):
    missed = {case.name: found for case in CASES[op](target) if (found := misses(read(case, target)))}
    assert not missed


@pytest.mark.parametrize("op", CASES)
def test_cases_are_found_by_their_names(op):
    for target in TARGETS:
        names = [case.name for case in CASES[op](target)]
        assert bool(names) is not compiles_nothing(op, target) and len(set(names)) == len(names)


def test_a_reading_tells_what_was_launched():
    forward = read(case_of("norm_fwd", "sm_80", "C=64 align=8 bfloat16"), "sm_80")
    assert [(r.kernel, r.tile) for r in forward] == [("norm_fwd", "ALIGN=8 ROWS=16 BLOCK_C=64 num_warps=1")]
    assert 32 < forward[0].registers < 256 and forward[0].loop.bytes_per_slot > 0
    backward = read(case_of("norm_bwd", "gfx942", "C=64 align=8 bfloat16"), "gfx942")
    assert [r.kernel for r in backward] == ["norm_bwd", "column_sum"]
    assert backward[0].loop is None and backward[0].registers > 8


LOOP = HotLoop(
    instructions=100, mix={"tensor": 30}, kflop=1.0, nt=2.0, bytes_per_slot=0.0, cycles={}, solo=1.0,
    bound=1.0, serial=0.6, w1=0.7, w2=0.8,
)  # fmt: skip


def reading(op="attention_fwd", target="sm_90", dim=128, kernel="attention_fwd", case="case", **more):
    given = {"gated": True, "registers": 255, "spilled": 0, "shared": 0, "loop": LOOP, "tensor_cores": True}
    return Reading(target, op, case, dim, kernel=kernel, tile="tile", **{**given, **more})


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({}, None),
        ({"spilled": 4}, "attention_fwd spills 4 bytes a thread; 0 allowed"),
        ({"shared": SHARED_LIMIT["sm_90"]}, None),
        ({"shared": SHARED_LIMIT["sm_90"] + 1}, "shared memory"),
        ({"loop": HotLoop(**{**vars(LOOP), "nt": 2.81})}, "nt is 2.81; at most 2.8 allowed"),
        ({"loop": HotLoop(**{**vars(LOOP), "w1": 0.54})}, "w1 is 0.54; at least 0.55 wanted"),
        ({"loop": HotLoop(**{**vars(LOOP), "mix": {}})}, "no product on tensor cores"),
        ({"loop": HotLoop(**{**vars(LOOP), "mix": {}}), "tensor_cores": False}, None),
        # Only the spill gate binds a call that is not the plain one.
        ({"gated": False, "loop": HotLoop(**{**vars(LOOP), "nt": 9.0, "w1": 0.1})}, None),
        ({"gated": False, "spilled": 4}, "spills 4 bytes"),
        ({"gated": False, "repeats": 1.5}, "runs its products 1.50 times"),
        ({"gated": False, "repeats": 1.5, "case": "D=256 plain"}, None),
        ({"bytes_per_slot": 6.9}, "moves 6.9 bytes of DRAM to an instruction; at least 7.0 wanted"),
        ({"bytes_per_slot": 0.0}, "moves 0.0 bytes of DRAM"),
        ({"bytes_per_slot": 7.0}, None),
        ({"bytes_per_slot": 1.0, "gated": False}, None),
    ],
)
def test_misses(more, sentence):
    found = misses([reading(**more)])
    assert len(found) == (sentence is not None)
    assert sentence is None or sentence in found[0]


def test_what_is_computed_twice_counts_against_the_kernels(monkeypatch):
    """Backward needs five products; two kernels that run four and three of them are charged with seven."""
    monkeypatch.setitem(RUN_PRODUCTS, "first", 4)
    monkeypatch.setitem(RUN_PRODUCTS, "second", 3)
    both = [reading("attention_bwd", "sm_80", kernel=kernel) for kernel in ("first", "second", "delta")]
    found = useful("attention_bwd", both)
    assert found.nt == pytest.approx(2.0 * 7 / 5)
    assert found.serial == pytest.approx(0.6 * 5 / 7)
    assert found.w1 == pytest.approx(0.7 * 5 / 7)
    assert SECOND_CHOICE["attention_bwd", "sm_80", 128].most_nt == 2.7
    (sentence,) = misses(both)
    assert "nt is 2.80" in sentence
    repeated = [reading("attention_bwd", "sm_80", kernel="first", repeats=1.5)]
    assert useful("attention_bwd", repeated).nt == pytest.approx(2.0 * 4 * 1.5 / 5)


def test_the_command_fails_on_a_miss(monkeypatch, capsys):
    """One case spills, and one does not compile, which keeps no other from being told."""
    good = [reading("norm_fwd", "sm_90", None, "norm_fwd")]
    found = []

    class Here:
        def __init__(self, *arguments):
            pass

        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None

        def submit(self, read_place, place):
            future, result = Future(), found.pop(0)
            done = future.set_exception if isinstance(result, Exception) else future.set_result
            done(result)
            return future

    monkeypatch.setattr("tests.gates.__main__.ProcessPoolExecutor", Here)
    spilling = [reading("norm_fwd", "sm_90", None, "norm_fwd", spilled=8)]
    some = ["--op", "norm_fwd", "--target", "sm_90", "--case"]
    found[:] = good, spilling, RuntimeError("ptxas"), good, good
    assert main([*some, "C=64 align=8"]) == 1
    printed = capsys.readouterr().out
    assert not found
    assert printed.count("MISSED: norm_fwd spills 8 bytes") == 1
    assert "MISSED: norm_fwd sm_90 C=64 align=8 float32 dropout: RuntimeError: ptxas" in printed
    assert "5 cases, 4 kernels; 2 cases miss a limit" in printed
    found[:] = [good]
    assert main([*some, "C=64 align=8 bfloat16 dropout"]) == 0


@pytest.mark.parametrize("op, target, dim", SECOND_CHOICE)
def test_only_what_comes_second_is_held_to_less(monkeypatch, op, target, dim):
    """The limit itself binds the kernel that "auto" runs there."""
    assert (op, target, dim) not in LIMITS
    first, second = LIMITS[f"{op}_cuda", target, dim], SECOND_CHOICE[op, target, dim]
    assert first.most_nt < second.most_nt and first.least_w1 >= second.least_w1
    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "_unusable", lambda device: None)
    capability = divmod(int(target.removeprefix("sm_")), 10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        rows = torch.empty(4, 16, 4096, dim, dtype=torch.bfloat16, device="cuda")
    call = op, AttentionSpec(0.1), (rows, rows, rows, *(None,) * 9), "auto"
    assert dispatch.choose(*call) is cuda
    monkeypatch.setattr(cuda, "gives_way", lambda op, device: True)
    assert dispatch.choose(*call) is triton


def test_what_is_excused_is_little_and_a_case():
    for (kernel, target, name), allowed in EXCUSED_SPILLS.items():
        assert MOST_SPILLED < allowed <= 16, kernel
        assert any(case.name == name for op in CASES for case in CASES[op](target)), name
