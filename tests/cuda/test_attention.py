"""CUDA attention, run from its PTX: right values for every argument, width, type and layout.

Few queries go to the kernels of many here: test_decode.py has their own."""

import itertools
import math
import re

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fastformer
from fastformer.testing import attention_inputs
from tests import ptxvm
from tests.ops.attention_cases import CASES, PACKED, Draw, call, kernels_serve, packed_call
from tests.ops.attention_draws import calls, sets_of_features
from tests.ops.attention_judge import judge_attention
from tests.ops.dropout_calls import dropout_of
from tests.ops.judging import assert_same_bits, without_grad
from tests.ptxvm import nvcc

from .emulated_attention import FEW, GENERAL, PADDED, WHOLE
from .structures import CSRC, DTYPES, plans

pytestmark = pytest.mark.usefixtures("attention_emulator")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TYPES = BF16, F16, F32
WIDTHS = (32, 64, 96, 128, 192, 256)


@pytest.fixture(autouse=True)
def many_queries(attention_emulator):
    attention_emulator.few_queries = 0


def judge_here(inputs, **how):
    judge_attention(without_grad(inputs), backend="cuda", **how)


def judge_case(name, dtype):
    inputs = call(name, dtype, requires_grad=False, return_lse=True)
    if kernels_serve(inputs):
        judge_here(inputs)


def some_inputs(D, dtype=BF16, M=140, N=300, **more):
    """Two tiles of queries, full blocks of keys and a ragged one."""
    return attention_inputs(B=1, H=2, H_kv=1, M=M, N=N, D=D, dtype=dtype) | {"return_lse": True} | more


SOME = (
    *(
        (name, BF16)
        for name in ("everything", "lengths and causal", "mask, nothing visible", "no keys, sink")
    ),
    pytest.param("everything", F32, marks=pytest.mark.slow),
)


@pytest.mark.parametrize("name, dtype", SOME)
def test_some_cases(name, dtype):
    judge_case(name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case(name, dtype):
    judge_case(name, dtype)


@pytest.mark.parametrize("N, D", ((40, 256), (512, 32)))
def test_long_sums_of_float32(N, D):
    """Of one sign, so that what tensor cores cut off would add up."""
    inputs = attention_inputs(1, 1, 20, N, D, dtype=F32)
    judge_here({name: tensor.abs() for name, tensor in inputs.items()} | {"return_lse": True})


@pytest.mark.parametrize("D, dtype", ((64, BF16), (128, BF16), (100, F32)))
def test_full_and_edge_blocks(D, dtype):
    judge_here(some_inputs(D, dtype, causal="lower_right"))


SPANS = ({}, {"causal": "lower_right"}, {"window": (90, 40)}, {"key_lengths": torch.tensor([270])})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("D", (*WIDTHS, 80, 120, 176, 248))
def test_full_and_edge_blocks_of_every_width(D, dtype):
    for more in SPANS:
        judge_here(some_inputs(D, dtype, **more))


@pytest.mark.parametrize("dtype", (BF16, pytest.param(F32, marks=pytest.mark.slow)), ids=str)
@pytest.mark.parametrize(
    "name", [name if name == "lower right" else pytest.param(name, marks=pytest.mark.slow) for name in PACKED]
)
def test_packed(name, dtype):
    inputs, longest = packed_call(name, dtype)
    judge_here(inputs, fn_only=longest)


@pytest.mark.parametrize("D", (64, pytest.param(20, marks=pytest.mark.slow)))
@pytest.mark.parametrize(
    "layout",
    (
        "unaligned",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("transposed", "sliced", "broadcast")),
    ),
)
def test_layouts(layout, D):
    judge_here(attention_inputs(B=1, M=70, N=150, D=D, dtype=BF16, layout=layout))


@pytest.mark.parametrize("D, D_v", ((67, 37), pytest.param(20, 230, marks=pytest.mark.slow)))
@pytest.mark.parametrize("layout", ("unaligned", pytest.param("transposed", marks=pytest.mark.slow)))
def test_layouts_of_float32(layout, D, D_v):
    judge_here(attention_inputs(B=1, M=40, N=70, D=D, D_v=D_v, dtype=F32, layout=layout))


def test_rows_are_read_in_place(attention_emulator):
    """Rows further apart than they are wide, in one tensor of query, key and value: nothing is copied."""
    together = torch.randn(1, 90, 3, 2, 64, generator=torch.Generator().manual_seed(3)).to(BF16)
    rows = {
        name: t.transpose(1, 2) for name, t in zip(("query", "key", "value"), together.unbind(2), strict=True)
    }
    judge_here(rows)
    assert attention_emulator.tensors["query.data"].data_ptr() == together.data_ptr()
    assert attention_emulator.params.aligned and "KindE0EE" in attention_emulator.launched[0][0]


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("mask", Draw(BF16).bools(2, 1, 40, 100)),
        ("bias", Draw(BF16).floats(1, 2, 40, 100)),
        ("bias", torch.linspace(-3, 3, 4000).view(1, 1, 40, 100)),
    ],
    ids=("mask", "bias", "float32 bias"),
)
def test_scores_read_two_columns_at_a_time(attention_emulator, name, tensor):
    judge_here(attention_inputs(B=2, H=2, M=40, N=100, D=32, dtype=BF16) | {name: tensor})
    assert getattr(attention_emulator.params, f"{name}_pairs")


@pytest.mark.parametrize(
    "dtype", (F16, *(pytest.param(t, marks=pytest.mark.slow) for t in (BF16, F32))), ids=str
)
def test_dropout(dtype):
    """The contract's map says what is kept; twice gives the same bits."""
    shape = 2, 3, 70, 140
    inputs = attention_inputs(B=2, H=3, M=70, N=140, D=32, dtype=dtype)
    fn_only, plain_only = dropout_of(0.3, *shape)
    judge_here(inputs, fn_only=fn_only, plain_only=plain_only)
    first, second = (fastformer.attention(**inputs, **fn_only, backend="cuda") for _ in range(2))
    assert_same_bits({"out": first}, {"out": second})


WIDE = (pytest.param(F32, D, marks=pytest.mark.slow) for D in (32, 100, 136))


@pytest.mark.parametrize("p", (0.5, 1.0))
@pytest.mark.parametrize("dtype, D", ((F16, 32), *WIDE))
def test_what_dropout_keeps(p, dtype, D):
    """With the identity as values a weight is seen where it was kept, and nowhere else. Tiles of float32
    heads over 128 have half of a call's keys."""
    inputs = attention_inputs(B=1, H=2, M=33, N=64, D=D, D_v=64, dtype=dtype)
    inputs["value"] = torch.eye(64, dtype=dtype).expand(1, 2, 64, 64)
    fn_only, plain_only = dropout_of(p, 1, 2, 33, 64)
    out = fastformer.attention(**inputs, **fn_only, backend="cuda")
    assert torch.equal(out != 0, plain_only["keep"])


@pytest.mark.parametrize("dtype", (BF16, pytest.param(F32, marks=pytest.mark.slow)), ids=str)
@pytest.mark.parametrize("D", (40, pytest.param(128, marks=pytest.mark.slow)))
def test_hidden_keys_may_hold_anything(D, dtype):
    """Past the lengths, between real keys, behind a mask of keys: not a bit of any result changes."""
    hide = Draw(BF16).bools(1, 200)
    for more, hidden in (
        ({"key_lengths": torch.tensor([130])}, torch.arange(200) >= 130),
        ({"key_padding_mask": hide}, ~hide[0]),
        ({"mask": hide[:, None, None]}, ~hide[0]),
    ):
        clean = some_inputs(D, dtype, M=20, N=200, **more)
        dirty = clean | {name: clean[name].clone() for name in ("key", "value")}
        dirty["key"][..., hidden, :] = torch.inf
        dirty["value"][..., hidden, :] = torch.nan
        first, second = (fastformer.attention(**inputs, backend="cuda") for inputs in (clean, dirty))
        assert_same_bits(dict(enumerate(first)), dict(enumerate(second)))


@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
def test_visible_keys_that_are_no_numbers(dtype):
    """What they make of a row is what formulas make of it: inf stays inf, of either sign, and NaN NaN."""
    inputs = some_inputs(80, dtype, M=20, N=100)
    value = inputs["value"].clone()
    value[..., 3, 0], value[..., 50, 1], value[..., 70, 2] = torch.inf, -torch.inf, torch.nan
    value[..., 60, 3], value[..., 61, 3] = torch.inf, -torch.inf
    out, _ = fastformer.attention(**inputs | {"value": value}, backend="cuda")
    clean, _ = fastformer.attention(**inputs, backend="cuda")
    assert (out[..., 0] == torch.inf).all() and (out[..., 1] == -torch.inf).all()
    assert out[..., 2:4].isnan().all() and torch.equal(out[..., 4:], clean[..., 4:])
    key = inputs["key"].clone()
    key[..., 7, 5] = torch.inf
    out, lse = fastformer.attention(**inputs | {"key": key}, backend="cuda")
    hidden = inputs["query"][..., 5] < 0  # whose score is -inf, and the others' inf
    without = fastformer.attention(**inputs, mask=torch.arange(100) != 7, backend="cuda")
    for found, wanted in zip((out, lse), without, strict=True):
        torch.testing.assert_close(found[hidden], wanted[hidden])
    assert out[~hidden].isnan().all()


@pytest.mark.parametrize("scale, softcap", ((30.0, None), (0.2, 3.0)), ids=("products", "logits"))
def test_statistics(scale, softcap):
    """What backward reads: the largest score and the sum of exp(score - largest), the sink included. The sum
    makes up for the rounding of the largest, which at products of whole numbers is all that there is."""
    query, key, value = (t.contiguous() for t in list(some_inputs(32, M=20, N=70).values())[:3])
    if softcap is None:
        query, key = (query * 2).round(), (key * 2).round()
    sink, lengths = torch.tensor([0.5, 3.0]), torch.tensor([55])
    tensors = (query, key, value, None, None, lengths, None, None, sink, None, None, None)
    spec = (scale, None, 0, True, softcap, 0.0, None, None)
    _, lse, largest, total = torch.ops.fastformer.attention_fwd_cuda(*tensors, *spec)
    # Where one multiply-add makes an exponent of 2 of a product, it is the factor in there that is rounded.
    factor = (torch.tensor(scale) * math.log2(math.e)).double() * math.log(2)
    scores = (scale if softcap else factor) * (query.double() @ key.double().transpose(-1, -2))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(20)[:, None], torch.arange(70)
    scores = scores.masked_fill((j > i + 50) | (j >= 55), -torch.inf)
    scores = torch.cat([scores, sink.double().view(1, 2, 1, 1).expand(1, 2, 20, 1)], -1)
    torch.testing.assert_close(largest.double(), scores.amax(-1), rtol=1e-6, atol=1e-6)
    sums = (scores - largest.double()[..., None]).exp().sum(-1)
    torch.testing.assert_close(total.double(), sums, rtol=4e-6, atol=0)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
def test_traffic(attention_emulator, dtype):
    """One tile of queries reads and writes everything once, in whole sectors and without bank conflicts."""
    inputs = attention_inputs(B=1, H=1, M=128, N=192, D=128, dtype=dtype)
    fastformer.attention(**inputs, backend="cuda")
    ((_, counters),) = attention_emulator.launched
    read = sum(inputs[name].numel() * dtype.itemsize for name in ("query", "key", "value"))
    assert read == counters.global_load_bytes == 32 * counters.global_load_sectors
    written = 128 * (128 * dtype.itemsize + 3 * 4)
    assert written <= counters.global_store_bytes <= 1.05 * written
    assert counters.store_efficiency > 0.95
    assert counters.bank_conflicts == 0


@pytest.mark.parametrize("schedule", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_warps_in_any_order(attention_emulator, schedule):
    attention_emulator.checks = ptxvm.Checks(schedule_seed=schedule)
    judge_here(some_inputs(64, M=100, N=250, causal="lower_right"))


@pytest.mark.slow
@pytest.mark.parametrize("D", (64, 128, 256))
def test_warps_in_any_order_of_float32(attention_emulator, D):
    attention_emulator.checks = ptxvm.Checks(schedule_seed=D)
    judge_here(some_inputs(D, F32, M=100, N=250, causal="lower_right"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
@pytest.mark.parametrize("arch", ("90", "100", "120"))
def test_other_targets(attention_emulator, arch, dtype):
    attention_emulator.arch = arch
    judge_here(some_inputs(128, dtype, causal="lower_right"))
    judge_case("everything", dtype)


def width_and_call(width, kind):
    """A call that the instantiation serves: the narrowest there is for it, or the widest."""
    D = {WHOLE: width, PADDED: width - 8, GENERAL: width - 1, FEW: width - 1}[kind]
    return some_inputs(D, M=37, N=170, window=(100, 90))


@pytest.mark.slow
def test_every_instantiation_runs(attention_emulator):
    attention_emulator.splits = 2
    for width, kind, dtype in itertools.product(WIDTHS, range(4), TYPES):
        if not plans().attention_is_chosen(width, kind, DTYPES[dtype], 8):
            continue
        attention_emulator.few_queries = 37 if kind == FEW else 0
        inputs = width_and_call(width, kind)
        inputs |= {name: inputs[name].to(dtype) for name in ("query", "key", "value")}
        judge_here(inputs)
    text = nvcc.compile_text(CSRC / "cuda" / "launch_attention.cu", "80", f"-I{CSRC}", f"-I{CSRC / 'cuda'}")
    assert {name for name, _ in attention_emulator.launched} == set(re.findall(r"\.entry (\w+)\(", text))


@pytest.mark.slow
def test_any_call(attention_emulator):
    @hypothesis.given(st.data(), sets_of_features(), st.sampled_from(TYPES))
    @hypothesis.settings(max_examples=100, phases=(hypothesis.Phase.generate,))
    def checked(data, features, dtype):
        inputs, fn_only, plain_only = data.draw(calls(features - {"weights"})).inputs(dtype)
        judge_here(inputs, fn_only=fn_only, plain_only=plain_only)

    checked()
