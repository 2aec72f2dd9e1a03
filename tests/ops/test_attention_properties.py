"""attention with every argument alone, with every other, and with all: whatever hypothesis draws.

`Drawn`, printed with a failure, is the call; attention_draws.py says how it is made.
"""

from __future__ import annotations

import itertools
import zlib

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fastformer
from fastformer.testing import attention_inputs

from . import plain
from .attention_draws import APART, FEATURES, calls, sets_of_features, together
from .attention_judge import judge_attention
from .judging import DTYPES, assert_reference_means_plain

PAIRS = tuple(pair for pair in itertools.combinations(FEATURES, 2) if together(pair))
# Everything, each time with one of those that exclude each other.
ALL = tuple(
    tuple(name for name in FEATURES if name not in left_out)
    for left_out in (
        ("upper_left", "packed"),
        ("lower_right", "packed"),
        ("padding", "lengths", "upper_left"),
    )
)
# A pair that fails has usually one of its two to blame, whose own test then finds the smallest call.
WITHOUT_SHRINKING = (hypothesis.Phase.generate,)
SHRINKING = (hypothesis.Phase.generate, hypothesis.Phase.shrink)


def check_cpu(drawn, dtype):
    inputs, fn_only, plain_only = drawn.inputs(dtype)
    judge_attention(inputs, backend="cpu", fn_only=fn_only, plain_only=plain_only)


def check_reference(drawn, dtype=torch.float64):
    inputs, fn_only, plain_only = drawn.inputs(dtype)
    formula = plain.packed_attention if drawn.sizes_q else plain.attention
    assert_reference_means_plain(
        fastformer.attention, formula, inputs, fn_only=fn_only, plain_only=plain_only
    )


def sweep(check, features, examples, dtypes, phases=SHRINKING):
    """`check` on drawn calls with these features, other ones for each set of features."""

    @hypothesis.seed(zlib.crc32(" ".join(features).encode()))
    @hypothesis.settings(max_examples=examples, phases=phases)
    @hypothesis.given(calls(features), st.sampled_from(dtypes))
    def checked(drawn, dtype):
        check(drawn, dtype)

    checked()


each_pair = pytest.mark.parametrize("pair", PAIRS, ids="+".join)
FLOAT64 = (torch.float64,)


def test_every_pair_is_there():
    assert len(PAIRS) == len(FEATURES) * (len(FEATURES) - 1) // 2 - len(APART)
    assert set().union(*ALL) == set(FEATURES) and all(together(features) for features in ALL)


@pytest.mark.parametrize("feature", ("nothing", *FEATURES))
def test_alone_on_cpu(feature):
    sweep(check_cpu, (feature,), 8, DTYPES)


@pytest.mark.parametrize("feature", ("nothing", *FEATURES))
def test_alone_on_the_reference(feature):
    sweep(check_reference, (feature,), 4, FLOAT64)


@each_pair
def test_in_pairs_on_cpu(pair):
    sweep(check_cpu, pair, 3, DTYPES, phases=WITHOUT_SHRINKING)


@pytest.mark.slow
@each_pair
def test_in_pairs_on_the_reference(pair):
    sweep(check_reference, pair, 5, FLOAT64, phases=WITHOUT_SHRINKING)


@pytest.mark.slow
@each_pair
def test_many_in_pairs_on_cpu(pair):
    sweep(check_cpu, pair, 40, DTYPES, phases=WITHOUT_SHRINKING)


@pytest.mark.parametrize("features", ALL, ids=("lower_right", "upper_left", "packed"))
def test_all_at_once(features):
    sweep(check_cpu, features, 15, DTYPES)
    sweep(check_reference, features, 5, FLOAT64)


@pytest.mark.slow
@pytest.mark.parametrize("features", ALL, ids=("lower_right", "upper_left", "packed"))
def test_all_at_once_many_times(features):
    sweep(check_cpu, features, 300, DTYPES)


@pytest.mark.slow
@hypothesis.settings(max_examples=1500, phases=SHRINKING)
@hypothesis.given(sets_of_features().flatmap(calls), st.sampled_from(DTYPES))
def test_any_call_on_cpu(drawn, dtype):
    check_cpu(drawn, dtype)


@pytest.mark.slow
@hypothesis.settings(max_examples=500, phases=SHRINKING)
@hypothesis.given(sets_of_features().flatmap(calls))
def test_any_call_on_the_reference(drawn):
    check_reference(drawn)


@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_a_permutation_of_the_keys_changes_nothing(M, N, seed):
    inputs = attention_inputs(M=M, N=N, dtype=torch.float64, seed=seed)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    permuted = {**inputs, **{name: inputs[name][:, :, order] for name in ("key", "value")}}
    torch.testing.assert_close(fastformer.attention(**inputs), fastformer.attention(**permuted))
