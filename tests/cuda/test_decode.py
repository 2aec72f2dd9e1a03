"""CUDA attention of few queries, run from its PTX: the heads of a group in one tile, keys that several blocks
of threads divide among them, and keys that lie in pages."""

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fastformer
from fastformer.testing import attention_inputs
from tests import ptxvm
from tests.ops import plain
from tests.ops.attention_cases import CASES, PACKED, Draw, call, kernels_serve, packed_call
from tests.ops.attention_draws import calls, sets_of_features
from tests.ops.attention_judge import judge_attention
from tests.ops.dropout_calls import dropout_of
from tests.ops.judging import assert_same_bits, judge, without_grad
from tests.ops.paged_cases import CASES as PAGED_CASES
from tests.ops.paged_cases import LAYOUTS, paged_call, paged_inputs, real_places

pytestmark = pytest.mark.usefixtures("attention_emulator")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FEW_NAME = "AttentionKindE3E"


def judge_here(emulator, inputs, **how):
    """Judges a call that the kernel of few queries serves, and whose splits another joins."""
    emulator.launched.clear()
    judge_attention(without_grad(inputs), backend="cuda", **how)
    names = [name for name, _ in emulator.launched]
    joins = sum("combine" in name for name in names)
    assert sum(FEW_NAME in name for name in names) == len(names) - joins
    assert joins == (len(names) // 2 if emulator.params.splits > 1 else 0)
    assert emulator.splits in (None, emulator.params.splits)


def few_inputs(M=1, N=300, group=4, D=64, H_kv=1, dtype=BF16, **more):
    inputs = attention_inputs(B=1, H=H_kv * group, H_kv=H_kv, M=M, N=N, D=D, dtype=dtype)
    return inputs | {"return_lse": True} | more


@pytest.mark.parametrize(
    "M, N, group, splits",
    [
        (3, 70, 4, 1),
        (1, 63, 8, 2),  # one block of keys: a split has none
        (3, 512, 4, 7),
        (9, 200, 8, 2),  # two tiles, the second with 8 rows
    ],
)
def test_groups_and_splits(attention_emulator, M, N, group, splits):
    attention_emulator.splits = splits
    judge_here(attention_emulator, few_inputs(M, N, group))


@pytest.mark.parametrize(
    "D, splits", ((64, 2), *(pytest.param(D, 3, marks=pytest.mark.slow) for D in (32, 120, 128, 250)))
)
def test_float32(attention_emulator, D, splits):
    attention_emulator.splits = splits
    judge_here(attention_emulator, few_inputs(9, 200, 8, D, dtype=F32))


@pytest.mark.slow
@pytest.mark.parametrize("splits", (1, 2, 7, 20))
@pytest.mark.parametrize("group", (1, 4, 8, 70))
def test_many_groups_and_splits(attention_emulator, group, splits):
    attention_emulator.splits = splits
    for M, N in itertools.product((1, 3, 16), (1, 63, 512, 1030)):
        if M * group < 300:
            judge_here(attention_emulator, few_inputs(M, N, group, D=40))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F16, F32), ids=str)
@pytest.mark.parametrize("D, D_v", [(64, 64), (128, 128), (256, 256), (20, 200), (192, 128), (33, 7)])
def test_widths(attention_emulator, D, D_v, dtype):
    for splits in (1, 3):
        attention_emulator.splits = splits
        inputs = attention_inputs(B=2, H=6, H_kv=2, M=5, N=300, D=D, D_v=D_v, dtype=dtype)
        judge_here(attention_emulator, inputs | {"return_lse": True})


SPANS = {
    "lower right": {"causal": "lower_right"},
    "upper left": {"causal": "upper_left"},
    "window": {"window": (90, 40), "corner": "lower_right"},
    "lengths": {"key_lengths": torch.tensor([150])},
    "no keys": {"key_lengths": torch.tensor([0])},
    "lengths and sink": {"key_lengths": torch.tensor([1]), "sink": torch.tensor([0.5, -1.0, 2.0])},
}


@pytest.mark.parametrize(
    "name", [name if name == "window" else pytest.param(name, marks=pytest.mark.slow) for name in SPANS]
)
def test_spans(attention_emulator, name):
    """Rows of one tile that see different keys, and splits with none of a row's."""
    attention_emulator.splits = 3
    judge_here(attention_emulator, few_inputs(M=20, N=300, group=3, **SPANS[name]))


@pytest.mark.parametrize(
    "name, dtype",
    [
        (name, dtype)
        if (name, dtype) == ("everything", BF16)
        else pytest.param(name, dtype, marks=pytest.mark.slow)
        for name in CASES
        for dtype in (BF16, F32)
    ],
)
def test_cases(attention_emulator, name, dtype):
    inputs = call(name, dtype, requires_grad=False, return_lse=True)
    M = inputs["query"].shape[2]
    if kernels_serve(inputs) and inputs["query"].numel() > 0 and M <= 64:
        attention_emulator.splits = 2
        judge_here(attention_emulator, inputs)


@pytest.mark.parametrize("N", (100, pytest.param(101, marks=pytest.mark.slow)))
@pytest.mark.parametrize("shape", [(6, 3), (6, 1)], ids=("every query", "all queries"))
def test_biases_of_each_head(attention_emulator, shape, N):
    attention_emulator.splits = 2
    inputs = attention_inputs(B=2, H=6, H_kv=2, M=3, N=N, D=32, dtype=BF16) | {"return_lse": True}
    judge_here(attention_emulator, inputs | {"bias": Draw(BF16).floats(*shape, N)})
    assert attention_emulator.params.bias_pairs == (N % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("splits", (1, 3))
@pytest.mark.parametrize("name", PACKED)
def test_packed(attention_emulator, name, splits):
    inputs, longest = packed_call(name, BF16)
    attention_emulator.few_queries, attention_emulator.splits = 70, splits
    judge_here(attention_emulator, inputs, fn_only=longest)


@pytest.mark.parametrize("splits", (2, pytest.param(1, marks=pytest.mark.slow)))
def test_dropout(attention_emulator, splits):
    """Decisions are those of each row's own head."""
    attention_emulator.splits = splits
    inputs = attention_inputs(B=2, H=6, H_kv=2, M=5, N=140, D=32, dtype=BF16)
    fn_only, plain_only = dropout_of(0.3, 2, 6, 5, 140)
    judge_here(attention_emulator, inputs, fn_only=fn_only, plain_only=plain_only)


@pytest.mark.parametrize("dtype", (BF16, pytest.param(F32, marks=pytest.mark.slow)), ids=str)
@pytest.mark.parametrize("layout", ("unaligned", pytest.param("transposed", marks=pytest.mark.slow)))
def test_layouts(attention_emulator, layout, dtype):
    attention_emulator.splits = 2
    inputs = attention_inputs(B=2, H=4, H_kv=2, M=3, N=150, D=20, dtype=dtype, layout=layout)
    judge_here(attention_emulator, inputs)


def test_statistics(attention_emulator):
    """Those of all splits together, the sink included; products of whole numbers lose nothing."""
    attention_emulator.splits = 3
    query, key, value = list(few_inputs(M=5, N=200, group=2, D=32).values())[:3]
    query, key = (query * 2).round(), (key * 2).round()
    sink, lengths = torch.tensor([0.5, 300.0]), torch.tensor([130])
    tensors = (query, key, value, None, None, lengths, None, None, sink, None, None, None)
    _, lse, largest, total = torch.ops.fastformer.attention_fwd_cuda(
        *tensors, 3.0, None, None, False, None, 0.0, None, None
    )
    scores = 3.0 * (query.double() @ key.double().transpose(-1, -2))[..., :130]
    scores = torch.cat([scores, sink.double().view(1, 2, 1, 1).expand(1, 2, 5, 1)], -1)
    torch.testing.assert_close(largest.double(), scores.amax(-1), rtol=1e-6, atol=1e-6)
    sums = (scores - largest.double()[..., None]).exp().sum(-1)
    torch.testing.assert_close(total.double(), sums, rtol=4e-6, atol=0)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=2e-6)


def same_bits(clean, dirty):
    first, second = (fastformer.attention(**inputs, backend="cuda") for inputs in (clean, dirty))
    assert_same_bits(dict(enumerate(first)), dict(enumerate(second)))


@pytest.mark.parametrize("splits", (3, pytest.param(1, marks=pytest.mark.slow)))
def test_hidden_keys_may_hold_anything(attention_emulator, splits):
    """Past the lengths, between real keys, behind a mask of keys: not a bit of any result changes."""
    attention_emulator.splits = splits
    hide = Draw(BF16).bools(1, 200)
    for more, hidden in (
        ({"key_lengths": torch.tensor([130])}, torch.arange(200) >= 130),
        ({"key_padding_mask": hide}, ~hide[0]),
        ({"mask": hide[:, None, None]}, ~hide[0]),
    ):
        clean = few_inputs(M=3, N=200, **more)
        dirty = clean | {name: clean[name].clone() for name in ("key", "value")}
        dirty["key"][..., hidden, :] = torch.inf
        dirty["value"][..., hidden, :] = torch.nan
        same_bits(clean, dirty)
        assert attention_emulator.params.share == 4


def test_keys_hidden_from_one_head_of_a_group(attention_emulator):
    """A mask of keys with heads of its own: what one head may not see may hold anything for that head."""
    attention_emulator.splits = 2
    mask = Draw(BF16).bools(1, 2, 1, 150)
    clean = few_inputs(M=3, N=150, group=2, mask=mask)
    judge_here(attention_emulator, clean)
    assert attention_emulator.params.share == 1
    out, lse = fastformer.attention(**clean, backend="cuda")
    dirty = clean | {name: clean[name].clone() for name in ("key", "value")}
    hidden = ~mask[0, 0, 0]
    dirty["key"][..., hidden, :] = torch.nan
    dirty["value"][..., hidden, :] = torch.nan
    found, found_lse = fastformer.attention(**dirty, backend="cuda")
    assert_same_bits({"out": out[:, 0], "lse": lse[:, 0]}, {"out": found[:, 0], "lse": found_lse[:, 0]})
    assert found[:, 1].isnan().all()


@pytest.mark.parametrize("schedule", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_no_schedule_changes_a_bit(attention_emulator, schedule):
    attention_emulator.splits = 2
    inputs = few_inputs(M=20, N=200, causal="lower_right")
    first = fastformer.attention(**inputs, backend="cuda")
    attention_emulator.checks = ptxvm.Checks(schedule_seed=schedule)
    second = fastformer.attention(**inputs, backend="cuda")
    assert_same_bits(dict(enumerate(first)), dict(enumerate(second)))


@pytest.mark.parametrize("splits, dtype", ((1, BF16), (3, BF16), (3, F32)))
def test_traffic(attention_emulator, splits, dtype):
    """K and V come once for all heads of a group, partial sums go and come once, all in whole sectors."""
    attention_emulator.splits = splits
    H, N, D = 8, 500, 64
    size = dtype.itemsize
    inputs = attention_inputs(B=1, H=H, H_kv=1, M=1, N=N, D=D, dtype=dtype)
    fastformer.attention(**inputs, backend="cuda")
    (_, counters), *joining = attention_emulator.launched
    read = size * (splits * H * D + 2 * N * D)
    assert read == counters.global_load_bytes == 32 * counters.global_load_sectors
    assert counters.bank_conflicts == 0
    if splits == 1:
        assert counters.global_store_bytes == H * (size * D + 3 * 4)
        return
    sums = H * splits * D * 4
    assert counters.global_store_bytes == sums + H * splits * 8
    # A row's maximum and sum go alone, and come three times.
    assert 32 * counters.global_store_sectors <= sums + 32 * H * splits
    ((_, joined),) = joining
    assert sums < joined.global_load_bytes
    assert 32 * joined.global_load_sectors <= sums + 3 * 32 * H * 2
    assert joined.global_store_bytes == H * (size * D + 3 * 4)
    assert 32 * joined.global_store_sectors == H * (size * D + 3 * 32)


SOME_PAGES = ("everything", "fewer keys than queries")


@pytest.mark.parametrize("splits", (2, pytest.param(None, marks=pytest.mark.slow)))
@pytest.mark.parametrize(
    "name",
    [name if name in SOME_PAGES else pytest.param(name, marks=pytest.mark.slow) for name in PAGED_CASES],
)
def test_pages(attention_emulator, name, splits):
    """Each batch element has its own length and corner, and splits without a key."""
    judge_pages(attention_emulator, name, splits, BF16)


@pytest.mark.parametrize(
    "name",
    [name if name == "everything" else pytest.param(name, marks=pytest.mark.slow) for name in PAGED_CASES],
)
def test_pages_of_float32(attention_emulator, name):
    judge_pages(attention_emulator, name, 2, F32)


def judge_pages(attention_emulator, name, splits, dtype):
    attention_emulator.splits = splits
    inputs = paged_call(name, dtype)
    judge(fastformer.paged_attention, plain.paged_attention, inputs, backend="cuda")
    assert FEW_NAME in attention_emulator.launched[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_read_in_place(attention_emulator, layout):
    inputs = paged_inputs((40, 16, 5), D=64, dtype=BF16, layout=layout)
    judge(fastformer.paged_attention, plain.paged_attention, inputs, backend="cuda")
    in_place = attention_emulator.tensors["key.data"].data_ptr() == inputs["key_pages"].data_ptr()
    assert in_place is (layout != "last strided")


def test_unread_places_of_pages_may_hold_anything(attention_emulator):
    """And numbers of no page read nothing outside the pages, as the emulator sees."""
    attention_emulator.splits = 2
    inputs = paged_inputs((130, 0, 33), S=16, M=2, D=64, dtype=BF16) | {"return_lse": True}
    clean = fastformer.paged_attention(**inputs, backend="cuda")
    unread = ~real_places(inputs["page_table"], inputs["lengths"], *inputs["key_pages"].shape[:2])
    for name in ("key_pages", "value_pages"):
        inputs[name] = inputs[name].masked_fill(unread[..., None, None], torch.nan)
    dirty = fastformer.paged_attention(**inputs, backend="cuda")
    assert_same_bits(dict(enumerate(clean)), dict(enumerate(dirty)))
    inputs["page_table"][:, :2] = torch.tensor([-5, 2**30], dtype=torch.int32)
    fastformer.paged_attention(**inputs, backend="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
@pytest.mark.parametrize("arch", ("90", "100", "120"))
def test_other_targets(attention_emulator, arch, dtype):
    attention_emulator.arch, attention_emulator.splits = arch, 2
    judge_here(attention_emulator, call("everything", dtype, requires_grad=False, return_lse=True))


@pytest.mark.slow
def test_any_call(attention_emulator):
    @hypothesis.given(
        st.data(), sets_of_features(), st.sampled_from((BF16, F16, F32)), st.sampled_from((None, 1, 2, 5))
    )
    @hypothesis.settings(max_examples=100, phases=(hypothesis.Phase.generate,))
    def checked(data, features, dtype, splits):
        attention_emulator.splits = splits
        drawn = data.draw(calls((features - {"weights"}) | {"decode"}))
        inputs, fn_only, plain_only = drawn.inputs(dtype)
        judge_attention(without_grad(inputs), backend="cuda", fn_only=fn_only, plain_only=plain_only)

    checked()
