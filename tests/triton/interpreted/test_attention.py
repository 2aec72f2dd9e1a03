"""Attention's forward on the Triton backend, interpreted: every argument alone, with others, with all."""

from __future__ import annotations

import pytest
import torch
from fastformer.triton_kernels import configs

import fastformer
from fastformer.testing import attention_inputs
from tests.ops import philox
from tests.ops.attention_cases import CASES, PACKED, Draw, call, kernels_serve, packed_call
from tests.ops.attention_draws import Drawn
from tests.ops.attention_judge import judge_attention
from tests.ops.dropout_calls import assert_keeps, attention_scaled_keep
from tests.ops.judging import DTYPES, without_grad
from tests.ops.test_attention_properties import ALL, PAIRS, WITHOUT_SHRINKING, sweep

F32, F16 = torch.float32, torch.float16
FORWARD_FEATURES = tuple(dict.fromkeys(name for features in ALL for name in features if name != "weights"))
LAYOUTS = ("transposed", "sliced", "unaligned", "last_strided", "broadcast")


def check(drawn, dtype):
    inputs, fn_only, plain_only = drawn.inputs(dtype)
    judge_attention(without_grad(inputs), backend="triton", fn_only=fn_only, plain_only=plain_only)


@pytest.mark.parametrize("name", CASES)
def test_every_case(name):
    dtype = DTYPES[list(CASES).index(name) % 3]
    inputs = call(name, dtype, requires_grad=False, return_lse=True)
    served = judge_attention(inputs, backend="triton", must_serve=kernels_serve(inputs))
    assert served == kernels_serve(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_every_dtype(name, dtype):
    inputs = call(name, dtype, requires_grad=False, return_lse=True)
    judge_attention(inputs, backend="triton", must_serve=kernels_serve(inputs))


@pytest.mark.parametrize("name", PACKED)
def test_packed(name):
    inputs, longest = packed_call(name, DTYPES[list(PACKED).index(name) % 3])
    judge_attention(without_grad(inputs), backend="triton", fn_only=longest)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Everything outside the tensors' own elements is NaN."""
    for dtype, D in ((torch.float32, 20), (torch.bfloat16, 24)):
        inputs = attention_inputs(N=45, D=D, dtype=dtype, layout=layout)
        judge_attention(inputs, backend="triton")


def test_rows_far_apart():
    """2^22 elements and more, which a tile's 32-bit offsets do not reach."""
    inputs = attention_inputs(B=1, H=1, M=40, N=70, D=8, dtype=torch.float16)
    for name, rows in (("query", 40), ("key", 70), ("value", 70)):
        far = torch.empty(rows * 2**22, dtype=torch.float16).as_strided((1, 1, rows, 8), (0, 0, 2**22, 1))
        inputs[name] = far.copy_(inputs[name])
    judge_attention(inputs, backend="triton")


@pytest.mark.parametrize("feature", ("nothing", *FORWARD_FEATURES))
def test_alone(feature):
    sweep(check, (feature,), 3, DTYPES, phases=WITHOUT_SHRINKING)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "weights" not in pair], ids="+".join)
def test_in_pairs(pair):
    sweep(check, pair, 4, DTYPES, phases=WITHOUT_SHRINKING)


@pytest.mark.parametrize("features", ALL, ids=("lower_right", "upper_left", "packed"))
def test_all_at_once(features):
    sweep(check, [name for name in features if name != "weights"], 3, DTYPES, phases=WITHOUT_SHRINKING)


@pytest.mark.slow
@pytest.mark.parametrize("features", ALL, ids=("lower_right", "upper_left", "packed"))
def test_all_at_once_many_times(features):
    sweep(check, [name for name in features if name != "weights"], 60, DTYPES)


@pytest.mark.parametrize(
    "more", ({}, {"causal": "lower_right"}, {"window": (700, 0), "corner": "lower_right"})
)
@pytest.mark.parametrize("M", (1, 5))
def test_many_keys_are_split(M, more):
    """Shares of the keys that are added up afterwards, some of them empty, with a sink and a dead row."""
    d = Draw(torch.float32)
    inputs = attention_inputs(B=2, H=2, M=M, N=1500, D=16)
    inputs |= {"sink": d.floats(2).detach(), "mask": d.dead_rows(M, 1500), "return_lse": True} | more
    inputs["mask"][-1, 300:] = False
    judge_attention(inputs, backend="triton")
    inputs["mask"] = None
    judge_attention(inputs | {"key_lengths": torch.tensor([1500, 3])}, backend="triton")


@pytest.mark.parametrize("masked", ("", "M", "HM"))
@pytest.mark.parametrize(("M", "N", "dtype"), [(1, 60, F16), (7, 90, F32), (3, 700, F32)])
def test_few_queries_of_grouped_heads(M, N, dtype, masked):
    """Three heads read a key head: rows of a tile, or of two, each with the head's own arguments. A mask for
    all queries alike may differ by head, or be that of all heads (`masked`: what it is broadcast over)."""
    over = tuple(dim in masked for dim in "BHMN")
    nowhere = (False,) * 4
    choices = {
        "mask": {"broadcast": over, "layout": "contiguous", "dead_rows": not masked and M > 1},
        "bias": {"broadcast": nowhere, "layout": "contiguous", "wide": False, "kind": "plain"},
        "relative_bias": {"rows": "H", "wide": False},
        "window": {"window": (N // 2, 2), "corner": "lower_right"},
        "lengths": {"dtype": torch.int64},
        "sink": {"wide": False, "absent": True},
        "dropout": {"p": 0.25, "seed": 7},
        "softcap": 3.0,
        "lse": True,
    }
    drawn = Drawn(2, 6, 2, M, N, D=24, D_v=40, layout="transposed", seed=3, choices=choices)
    check(drawn, dtype)


def test_more_shares_than_are_added_in_a_step():
    """Later ones hold larger scores, none at all, and the largest."""
    inputs = attention_inputs(B=1, H=2, M=3, N=1500, D=8, D_v=200)
    inputs["key"] *= torch.linspace(0.1, 3.0, 1500)[:, None]
    mask = torch.ones(3, 1500, dtype=torch.bool)
    mask[:, 900:1300] = False
    mask[1, :1400] = False
    mask[2] = False
    config = configs.attention_fwd_config("sm_80", 4, 256, "more", 0, 3)
    assert config.splits(2, 1500) > configs.combined_shares(256)
    judge_attention(inputs | {"mask": mask, "return_lse": True}, backend="triton")


@pytest.mark.parametrize("value", (torch.nan, torch.inf), ids=str)
@pytest.mark.parametrize("where", ("query", "key", "value"))
def test_nonfinite_values_stay_in_their_rows(where, value):
    inputs = attention_inputs(B=1, H=2, M=40, N=40, D=8) | {"causal": True, "return_lse": True}
    inputs[where][0, 1, 17, 3] = value
    judge_attention(inputs, backend="triton")


@pytest.mark.parametrize("p", (0.25, 1.0))
def test_dropout_map(p):
    """What is kept is what the contract's map says, beyond a tile too."""
    found = attention_scaled_keep(2, 6, 67, 70, -5, p, H_kv=3, backend="triton")
    keep = philox.attention_keep(2, 6, 67, 70, -5, p)
    assert_keeps(found, keep, p)


def test_what_backward_reads():
    """The largest score and the sum of exp(score - largest), the sink in both."""
    inputs = without_grad(call("sink, dead rows", torch.float32))
    inputs["sink"][1] = -torch.inf
    query, key, value, sink, mask = (inputs[n] for n in ("query", "key", "value", "sink", "mask"))
    raw = torch.ops.fastformer.attention_fwd_triton
    nothing = (None,) * 3
    args = (query, key, value, mask, None, None, None, None, sink, *nothing)
    out, lse, row_max, row_sum = raw(*args, 0.25, None, None, False, None, 0.0, None, None)
    scores = (0.25 * query @ key.transpose(-1, -2)).masked_fill(~mask, -torch.inf)
    scores = torch.cat([scores, sink[None, :, None, None].expand(2, 4, 33, 1)], -1)
    largest = scores.amax(-1)
    torch.testing.assert_close(row_max, largest)
    exponentials = (scores - largest[..., None].nan_to_num(neginf=0.0)).exp()
    torch.testing.assert_close(row_sum, exponentials.sum(-1))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert (row_sum == 0).any() and out[row_sum == 0].eq(0).all()


def test_refusals():
    with pytest.raises(fastformer.BackendError, match="head dims of 1 to 256, and query's is 257"):
        fastformer.attention(**attention_inputs(D=257), backend="triton")
    with pytest.raises(fastformer.BackendError, match="float64"):
        fastformer.attention(**attention_inputs(dtype=torch.float64), backend="triton")
