"""The raw attention operator of the CPU at every ISA level."""

from __future__ import annotations

import pytest
import torch

from fastformer.backends import cpu
from fastformer.specs import ATTENTION_TENSORS, AttentionSpec
from fastformer.testing import LAYOUTS, attention_inputs, in_float64, poison_keys

from ..ops import plain
from ..ops.judging import another_draw, assert_accurate_over_draws

if cpu.ready() is not None:
    pytest.skip(cpu.ready(), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (1, 3, 40, 64, 80, 96, 128, 200, 256)
# Where a key block ends (512; 256 for wide heads), where a panel ends, and neither.
LENGTHS = (1, 31, 32, 33, 257, 512, 513)


def run(inputs, *, scale=None, causal=False, window=None, corner=None):
    """(out, lse) of the raw operator; `inputs` by the names of ATTENTION_TENSORS."""
    left, right = window or (None, None)
    spec = AttentionSpec(
        scale=inputs["query"].shape[-1] ** -0.5 if scale is None else scale,
        left=left,
        right=0 if causal else right,
        lower_right="lower_right" in (causal, corner),
    )
    return cpu.attention_fwd(spec, *(inputs.get(name) for name in ATTENTION_TENSORS))[:2]


def check(inputs, **arguments):
    def three_results(draw):
        drawn = another_draw(inputs, draw) if draw else inputs
        actual = run(drawn, **arguments)
        baseline = plain.attention(**drawn, return_lse=True, **arguments)
        exact = plain.attention(**in_float64(drawn), return_lse=True, **in_float64(arguments))
        return tuple(dict(zip(("out", "lse"), r, strict=True)) for r in (actual, baseline, exact))

    assert_accurate_over_draws(three_results, "cpu:")
    return run(inputs, **arguments)


def draw_mask(*shape, seed=3, share=0.6):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dims(D, dtype):
    check(attention_inputs(2, 4, 37, 50, D, H_kv=2, dtype=dtype))


@pytest.mark.parametrize(("D", "D_v"), [(1, 256), (64, 3), (40, 128), (129, 17), (256, 1)])
def test_value_dim_of_its_own(D, D_v):
    check(attention_inputs(1, 2, 19, 70, D, D_v=D_v))


@pytest.mark.parametrize("N", LENGTHS)
@pytest.mark.parametrize("M", (1, 2, 13, 100))
def test_lengths(M, N):
    for D in (32, 160):
        check(attention_inputs(1, 2, M, N, D))


@pytest.mark.parametrize("H_kv", (1, 2, 6))
def test_grouped_heads(H_kv):
    check(attention_inputs(2, 6, 20, 45, 24, H_kv=H_kv))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_layouts(layout, dtype):
    check(attention_inputs(2, 3, 40, 61, 32, layout=layout, dtype=dtype))


def test_several_chunks_and_key_blocks():
    # More rows than one chunk holds (1020 of 64 columns), several key blocks.
    check(attention_inputs(1, 1, 1100, 1100, 64), causal="upper_left")


@pytest.mark.parametrize("scale", (0.0, -0.7, 4.0))
def test_scales(scale):
    check(attention_inputs(1, 2, 20, 40, 16), scale=scale)


@pytest.mark.parametrize("causal", ("upper_left", "lower_right"))
@pytest.mark.parametrize(("M", "N"), [(1, 70), (70, 1), (64, 64), (50, 130), (130, 50), (20, 600), (600, 20)])
def test_causal(causal, M, N):
    check(attention_inputs(1, 2, M, N, 16), causal=causal)


@pytest.mark.parametrize("corner", ("upper_left", "lower_right"))
@pytest.mark.parametrize("window", [(0, 0), (5, None), (None, 5), (3, 40), (40, 3), (700, 0)])
def test_windows(window, corner):
    for M, N in ((90, 90), (50, 300), (300, 50)):
        check(attention_inputs(1, 1, M, N, 16), window=window, corner=corner)


MASK_SHAPES = [
    (2, 3, 30, 70), (1, 3, 30, 70), (2, 1, 30, 70), (1, 1, 30, 70), (30, 70), (2, 3, 1, 70), (2, 1, 1, 70),
    (70,), (2, 3, 30, 1), (30, 1), (3, 1, 1), (1,),
]  # fmt: skip


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_mask_shapes(shape, dtype):
    check(attention_inputs(2, 3, 30, 70, 16, dtype=dtype) | {"mask": draw_mask(*shape)})


def test_mask_strides():
    inputs = attention_inputs(2, 3, 30, 70, 16)
    wide = draw_mask(2, 3, 30, 140)
    for mask in (
        wide[..., ::2],
        wide[..., 3:73],
        draw_mask(2, 3, 70, 30).transpose(-1, -2),
        draw_mask(2, 1, 1, 70).expand(2, 3, 30, 70),
        draw_mask(30, 1).expand(30, 70),
    ):
        check(inputs | {"mask": mask})


def test_everything_at_once():
    inputs = attention_inputs(2, 4, 75, 533, 40, H_kv=2, D_v=24)
    inputs["mask"] = draw_mask(2, 1, 75, 533)
    inputs["key_padding_mask"] = draw_mask(2, 533, seed=4, share=0.9)
    inputs["key_lengths"] = torch.tensor([500, 37])
    check(inputs, window=(200, 30), corner="lower_right")


@pytest.mark.parametrize("poison", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_nobody_sees_change_no_bit(dtype, poison):
    inputs = attention_inputs(2, 2, 25, 90, 16, dtype=dtype)
    real = draw_mask(2, 90, share=0.7)
    real[0, 50:] = False
    real[1, :40] = False
    key, value = poison_keys(inputs["key"], inputs["value"], real)
    clean_key, clean_value = poison_keys(inputs["key"], inputs["value"], real, 0.5)
    for hiding in ({"key_padding_mask": real}, {"mask": real[:, None, None, :]}):
        poisoned = run({"query": inputs["query"], "key": key, "value": value} | hiding)
        assert_same_bits(
            poisoned, run({"query": inputs["query"], "key": clean_key, "value": clean_value} | hiding)
        )
        assert poisoned[0].isfinite().all()
        check(inputs | hiding)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_key_lengths(dtype):
    inputs = attention_inputs(4, 2, 20, 60, 16)
    lengths = torch.tensor([60, 33, 1, 0], dtype=dtype)
    real = torch.arange(60)[None, :] < lengths[:, None]
    key, value = poison_keys(inputs["key"], inputs["value"], real)
    inputs = inputs | {"key": key, "value": value, "key_lengths": lengths}
    out, lse = check(inputs)
    assert (out[3] == 0).all() and (lse[3] == -torch.inf).all()


def test_rows_that_see_nothing():
    inputs = attention_inputs(1, 2, 40, 40, 16)
    mask = draw_mask(1, 2, 40, 40)
    mask[:, :, 7:20] = False
    out, lse = check(inputs | {"mask": mask})
    assert (out[:, :, 7:20] == 0).all() and (lse[:, :, 7:20] == -torch.inf).all()
    out, lse = check(inputs | {"mask": torch.zeros(1, dtype=torch.bool)})
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("where", ("query", "key"))
def test_nan_stays_in_its_rows(where):
    inputs = attention_inputs(1, 2, 40, 40, 16)
    clean = run(inputs, causal="upper_left")
    # The last key, which the last row alone may see.
    row = 17 if where == "query" else 39
    inputs[where][0, 1, row, 5] = torch.nan
    out, lse = run(inputs, causal="upper_left")
    assert out[0, 1, row].isnan().all() and lse[0, 1, row].isnan()
    others = torch.arange(40) != row
    assert_same_bits((out[0, 0], out[0, 1, others]), (clean[0][0, 0], clean[0][0, 1, others]))


def test_nan_value_reaches_its_column_only():
    inputs = attention_inputs(1, 2, 40, 40, 16)
    inputs["value"][0, 1, 30, 5] = torch.nan
    out, lse = run(inputs)
    assert out[0, 1, :, 5].isnan().all() and int(out.isnan().sum()) == 40 and lse.isfinite().all()


def test_infinite_score_gives_nan_as_in_torch():
    inputs = attention_inputs(1, 1, 20, 40, 16)
    inputs["query"][0, 0, 3] = torch.inf
    out, _ = run(inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs.values())
    assert torch.equal(out.isnan(), expected.isnan()) and out[0, 0, 3].isnan().all()


@pytest.mark.parametrize(("B", "H", "M", "N"), [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
def test_empty(B, H, M, N):
    out, lse = run(attention_inputs(B, H, M, N, 8))
    assert out.shape == (B, H, M, 8) and lse.shape == (B, H, M)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_tiny_probabilities_count_as_zero_and_cost_nothing_else():
    inputs = attention_inputs(1, 1, 30, 200, 16)
    check(inputs, scale=20.0)
    assert torch.tensor(1e-40).mul(1.0) != 0, "denormals must work again after the call"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_bits_do_not_depend_on_threads(dtype):
    inputs = attention_inputs(1, 2, 700, 530, 64, dtype=dtype) | {"mask": draw_mask(700, 530)}
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(run(inputs, window=(400, None)))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_bits_of_a_row_do_not_depend_on_the_others():
    inputs = attention_inputs(1, 1, 60, 300, 64)
    out, lse = run(inputs)
    few = inputs | {"query": inputs["query"][:, :, 31:37]}
    assert_same_bits(run(few), (out[:, :, 31:37], lse[:, :, 31:37]))
