"""The benchmark's cases: each is judged, and what is wrong is found out. No test looks at a time."""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import bench_attention, bench_decode, bench_feed_forward, bench_launch, bench_norm, dropout
from benchmarks.case import Case, Contest, Grid, Inaccurate, by_the_rule, thread_counts
from benchmarks.conftest import turns_of

SHAPE = (4, 4, 64, 16)
DROPOUT_SHAPE = (16, 16, 64, 16)  # 2 * 10^5 outputs, for which the tolerance of moments is meant
UNCOMPILED = ("naive", "torch", "fastformer")
GRIDS = {"quick": Grid("cpu", quick=True), "default": Grid("cpu"), "full": Grid("cpu", full=True)}


def small_cases(dtype):
    for operator in bench_attention.OPERATORS:
        for kind in bench_attention.KINDS:
            shape = DROPOUT_SHAPE if kind == "dropout" else SHAPE
            yield bench_attention._case(operator, kind, kind, shape, dtype, "cpu")
    for operator in bench_feed_forward.OPERATORS:
        yield bench_feed_forward._case(operator, "gelu", 8, 32, 64, dtype, "cpu")
        yield bench_feed_forward._case(operator, "swiglu", 8, 32, 48, dtype, "cpu")
    yield bench_decode._case(2, 8, 2, 96, 32, dtype, "cpu")


CASES = [case for dtype in (torch.float32, torch.bfloat16) for case in small_cases(dtype)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_contenders_agree(case):
    torch.manual_seed(0)
    contest = Contest(case, quick=True)
    with torch.set_grad_enabled(case.needs_grad):
        verdicts = {name: contest.verdict(name) for name in UNCOMPILED}
    assert verdicts["fastformer"].status == "right", verdicts["fastformer"].detail
    for name, verdict in verdicts.items():
        assert verdict.timed, f"{name}: {verdict.detail}"
    outputs = contest.run("fastformer")
    if case.operator.endswith("_training"):
        wanted = [tensor.shape for tensor in contest.inputs if tensor.requires_grad]
        assert [gradient.shape for gradient in outputs[1:]] == wanted and len(wanted) >= 3
    else:
        assert isinstance(outputs, torch.Tensor)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_every_row_has_a_name_of_its_own(grid):
    modules = (bench_attention, bench_decode, bench_feed_forward, bench_launch, bench_norm)
    keys = [case.key for module in modules for case in module.cases(grid)]
    assert len(set(keys)) == len(keys)
    kinds = {key.split()[1] for key in keys if key.startswith("attention_training")}
    assert kinds == set(bench_attention.KINDS)


def toy(**contenders):
    """A case of one input whose naive result is off by one float32 rounding here and there."""
    contenders = {"naive": lambda x: x.sin() * 3, **contenders}
    draw = lambda: (torch.linspace(0, 3, 1000),)
    return Case("toy", "toy", torch.float32, contenders, draw)


def test_a_rival_may_be_less_accurate_but_not_wrong():
    case = toy()
    judge = by_the_rule(case, case.draw())
    exact = (case.draw()[0].double().sin() * 3).float()
    close, far = exact + 6e-7, exact + 1e-4
    judge("torch", exact)
    judge("fastformer", exact)
    with pytest.raises(Inaccurate):
        judge("torch", close)
    for contender, result in (("torch", far), ("fastformer", close)):
        with pytest.raises(AssertionError) as found:
            judge(contender, result)
        assert not isinstance(found.value, Inaccurate)


def test_what_is_inaccurate_is_timed_and_what_is_wrong_is_not():
    contest = Contest(toy(torch=lambda x: x.sin() * 3 + 6e-7, compile=lambda x: x.sin() * 3.1), quick=True)
    assert [contest.verdict(name).status for name in ("naive", "torch", "compile", "fastformer")] == [
        "right",
        "inaccurate",
        "wrong",
        "failed",  # there is none
    ]
    assert contest.verdict("torch").timed and not contest.verdict("compile").timed


@pytest.fixture
def dropping():
    torch.manual_seed(0)
    named = "attention_training", "dropout", "dropout"
    case = bench_attention._case(*named, DROPOUT_SHAPE, torch.float32, "cpu")
    inputs = case.draw()
    return case, inputs, case.judge(case, inputs)


def test_dropout_of_another_probability_is_wrong(dropping):
    _, inputs, judge = dropping
    query, key, value, *_ = inputs
    weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    judge("torch", torch.dropout(weights, 0.1, train=True) @ value)
    for p, rescale in ((0.2, 1.0), (0.05, 1.0), (0.1, 0.9), (0.0, 1.0)):
        with pytest.raises(AssertionError, match="mean square"):
            judge("torch", torch.dropout(weights, p, train=True) @ value * rescale)


def test_fastformers_dropout_is_its_references(dropping):
    case, inputs, judge = dropping
    assert isinstance(case.judge, dropout.Judge)
    judge("fastformer", case.contenders["fastformer"](*inputs))
    *others, grad_out = inputs
    others[3] = others[3] + 1
    another_seed = case.contenders["fastformer"](*others, grad_out)
    judge("torch", another_seed)
    with pytest.raises(AssertionError, match="absolute error"):
        judge("fastformer", another_seed)
    out, *gradients = another_seed
    gradients[2] = gradients[2] / 0.0
    with pytest.raises(AssertionError, match=r"torch\[3\]: not finite"):
        judge("torch", (out, *gradients))


def test_thread_counts():
    every = torch.get_num_threads()
    assert thread_counts("1") == (1,)
    assert thread_counts("3,all,3") == tuple(dict.fromkeys((3, every)))
    for text in ("", "0", "-1", "two", "1,,2"):
        with pytest.raises(ValueError, match="wanted counts or 'all'"):
            thread_counts(text)


def test_contenders_and_thread_counts_alternate():
    grid = Grid("cpu", quick=True, threads=(1, 2))
    turns = turns_of(toy(), grid)
    once = [(n, name) for n in (1, 2) for name in ("naive", "torch", "fastformer")]
    assert [(turn.threads, turn.contender) for turn in turns] == once + once[::-1] + once
    assert [turn.last for turn in turns] == [False] * 17 + [True]
    assert [place for place, turn in enumerate(turns) if turn.first_of_pass] == [0, 6, 12]
    assert len({str(turn) for turn in turns}) == 6
