"""CUDA's returned weights and what their gradient adds to attention's, run from PTX."""

import pytest
import torch

import fastformer
from fastformer.testing import attention_inputs, outputs_and_gradients
from tests import ptxvm
from tests.ops.attention_cases import CASES, PACKED, Draw, call, kernels_serve, packed_call
from tests.ops.attention_judge import judge_attention
from tests.ops.dropout_calls import dropout_of
from tests.ops.judging import assert_same_bits, without_grad

from .test_attention_sums import MORE, B, H, M, N, slow_unless, some_inputs

pytestmark = pytest.mark.usefixtures("gradient_emulator")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

per_head_and_mean = pytest.mark.parametrize("which", ("per_head", "mean"))


def judge_here(inputs, which, **how):
    judge_attention(inputs | {"return_weights": which}, backend="cuda", **how)


EACH = [(which, more) for which in ("per_head", "mean") for more in MORE]


@pytest.mark.parametrize("case", slow_unless([("mean", "window and lengths")], EACH), ids=str)
def test_weights_and_gradients(case):
    which, more = case
    judge_here(some_inputs() | MORE[more](Draw(BF16)), which)


@pytest.mark.parametrize("which", slow_unless(("mean",), ("per_head", "mean")))
def test_dropout(which):
    """Weights come as dropout leaves them."""
    fn_only, plain_only = dropout_of(0.3, B, H, M, N)
    judge_here(some_inputs(F16), which, fn_only=fn_only, plain_only=plain_only)


@pytest.mark.slow
def test_everything_is_dropped():
    fn_only, plain_only = dropout_of(1.0, B, H, M, N)
    judge_here(some_inputs(F16), "mean", fn_only=fn_only, plain_only=plain_only)


@pytest.mark.parametrize("which", slow_unless(("mean",), ("per_head", "mean")))
def test_with_gradients_of_biases_and_of_a_sink(which):
    """They get that of the weights too, by delta and by every tile; a bias of one column by its rows."""
    d = Draw(BF16)
    column = which == "mean"
    bias = d.floats(1, H, M, 1) if column else d.floats(B, 1, 1, N)
    more = {"bias": bias, "relative_bias": d.floats(1, M + N - 1), "sink": d.floats(H)}
    judge_here(some_inputs() | more, which)


@pytest.mark.slow
@per_head_and_mean
@pytest.mark.parametrize("dtype", (BF16, F16, F32), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case(name, dtype, which):
    inputs = call(name, dtype)
    if kernels_serve(inputs):
        judge_here(inputs, which)


@pytest.mark.parametrize("name", ("no keys", "no heads", "one element"))
def test_some_cases(name):
    judge_here(call(name, BF16), "mean" if name == "no heads" else "per_head")


@pytest.mark.slow
@per_head_and_mean
@pytest.mark.parametrize("name", PACKED)
def test_packed(name, which):
    """0 beyond a sequence's ends."""
    inputs, longest = packed_call(name, BF16)
    judge_here(inputs, which, fn_only=longest)


@pytest.mark.slow
@per_head_and_mean
@pytest.mark.parametrize("D, D_v", ((1, 1), (64, 64), (65, 20), (128, 128), (100, 200), (256, 256)))
def test_every_width(D, D_v, which):
    judge_here(some_inputs(F16, D, D_v=D_v), which)


@pytest.mark.slow
@per_head_and_mean
def test_float32(which):
    judge_here(some_inputs(F32, M=40, N=70), which)


def test_float32_of_one_column():
    """A score that is one product shows all that the product lacks."""
    judge_here(call("head dim 1", F32), "per_head")


def test_nothing_but_weights_has_a_gradient():
    inputs = some_inputs(M=40, N=70) | {"return_weights": True}
    zero, grads = torch.zeros(()), torch.randn(B, H, 40, 70, generator=torch.Generator().manual_seed(2))
    given = [zero.expand(B, H, 40, 24), zero.expand(B, H, 40), grads]
    judge_attention(inputs, backend="cuda", grad_outputs=given)


def test_a_row_of_nan_is_one_row():
    """And rows past a sequence's end are none: packed, a key of NaN reaches the rows of its own sequence."""
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    query, key, value = (torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(k)) for k in range(3))
    key[2] = torch.nan
    rows = {name: t.to(BF16) for name, t in (("query", query), ("key", key), ("value", value))}
    _, weights = fastformer.attention(
        **rows, cu_seqlens_q=starts, cu_seqlens_k=starts, return_weights=True, backend="cuda"
    )
    assert weights[0, :, :5, :5].isnan().all() and not weights[1].isnan().any()
    assert not weights[0, :, 5:].any()


def test_a_row_of_nan_has_no_weight_of_a_key_that_it_sees():
    """Weights of keys that it does not see are NaN beside them, and 0 in tiles that no row sees."""
    seen = {"window": (10, 10), "return_weights": True}
    query, key, value = (t.detach() for t in attention_inputs(1, 1, 140, 140, 16, dtype=BF16).values())
    query[0, 0, 5] = torch.nan
    out, weights = fastformer.attention(query, key, value, **seen, backend="cuda")
    row = weights[0, 0, 5]
    assert row[:16].isnan().all() and not row[128:].any() and out[0, 0, 5].isnan().all()
    others = torch.arange(140) != 5
    assert weights[0, 0, others].isfinite().all() and out[0, 0, others].isfinite().all()


@pytest.mark.slow
def test_weights_in_any_order_of_warps(gradient_emulator):
    inputs = without_grad(some_inputs()) | {"return_weights": "mean"}
    first = outputs_and_gradients(fastformer.attention, **inputs, backend="cuda")
    gradient_emulator.checks = ptxvm.Checks(schedule_seed=3)
    assert_same_bits(first, outputs_and_gradients(fastformer.attention, **inputs, backend="cuda"))


def test_traffic(gradient_emulator):
    """Weights are written once, in whole sectors, and a tile reads its rows once, without bank conflicts."""
    inputs = attention_inputs(B=1, H=1, M=64, N=128, D=128, dtype=BF16)
    fastformer.attention(**inputs, return_weights=True, backend="cuda")
    (counters,) = (counters for name, counters in gradient_emulator.launched if "attention_sums" in name)
    assert counters.global_store_bytes == 64 * 128 * 2 == 32 * counters.global_store_sectors
    rows = 2 * (64 + 64) * 128 * 2
    assert rows <= counters.global_load_bytes <= 1.13 * rows, "beside them two numbers of each row a lane has"
    assert counters.bank_conflicts == 0
