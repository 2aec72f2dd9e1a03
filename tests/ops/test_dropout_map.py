"""Dropout's decisions: known answers, the map from elements to decisions, bits, quality."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

import fastformer
from fastformer.testing import attention_inputs, norm_inputs, outputs_and_gradients

from . import philox
from .attention_cases import cumulated
from .attention_judge import judge_attention
from .dropout_calls import (
    assert_keeps,
    attention_scaled_keep,
    feed_forward_scaled_keep,
    norm_scaled_keep,
    seed_tensor,
)
from .judging import BACKENDS, DTYPES, skip_unless_built

SEEDS = (0, 1, 12345, -1, 2**32, 2**40 + 3, 2**63 - 1, -(2**63))
PROBABILITIES = (2**-16, 0.1, 0.25, 0.5, 0.999)

# Random123's kat_vectors: counter, key, the words after 7 rounds and after 10.
ZEROS, ONES = (0,) * 6, (0xFFFFFFFF,) * 6
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
KNOWN_ANSWERS = (
    (ZEROS, 7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (ONES, 7, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (PI, 7, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (ZEROS, 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (ONES, 10, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, 10, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
)


@pytest.mark.parametrize("words, rounds, answer", KNOWN_ANSWERS)
def test_the_tests_own_philox_gives_random123s_known_answers(words, rounds, answer):
    assert tuple(int(w) for w in philox.philox4x32(words[:4], words[4:], rounds)) == answer


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_map(backend, seed, p):
    skip_unless_built(backend)
    found = attention_scaled_keep(2, 6, 5, 70, seed, p, H_kv=3, backend=backend)
    assert_keeps(found, philox.attention_keep(2, 6, 5, 70, seed, p), p)


@pytest.mark.parametrize(("M", "N"), ((1, 256), (130, 33), (300, 129), (70, 255)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_map_beyond_a_tile(backend, M, N):
    skip_unless_built(backend)
    found = attention_scaled_keep(2, 3, M, N, 7, 0.25, backend=backend)
    assert_keeps(found, philox.attention_keep(2, 3, M, N, 7, 0.25), 0.25)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_those_that_dropout_keeps(backend):
    """Of more keys than a value may have columns; and their mean over heads counts the dropped as 0."""
    skip_unless_built(backend)
    M, N, p = 70, 530, 0.25
    q, k, v = torch.zeros(2, 3, M, 4), torch.zeros(2, 3, N, 4), torch.zeros(2, 3, N, 1)
    arguments = {"dropout_p": p, "seed": seed_tensor(-9), "backend": backend}
    keep = philox.attention_keep(2, 3, M, N, -9, p)
    weights = fastformer.attention(q, k, v, **arguments, return_weights=True)[1]
    assert_keeps(weights * N, keep, p)
    mean = fastformer.attention(q, k, v, **arguments, return_weights="mean")[1]
    torch.testing.assert_close(mean * N, keep.float().mean(1) * philox.keep_scale(p), rtol=2e-6, atol=0)


@pytest.mark.parametrize("hidden", ("nothing", "causal", "padding", "window", "mask"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_are_skipped_move_no_decision(backend, hidden):
    """A gradient shows every decision: d_value[j] = sum of w[i, j] do[i], with do the identity."""
    skip_unless_built(backend)
    M, N, p, seed = 140, 200, 0.5, 11
    arguments, visible = {
        "nothing": ({}, torch.ones(M, N, dtype=torch.bool)),
        "causal": ({"causal": "lower_right"}, torch.ones(M, N).tril(N - M) > 0),
        "padding": ({"key_lengths": torch.tensor([77])}, (torch.arange(N) < 77).expand(M, N)),
        "window": (
            {"window": (0, 40), "corner": "lower_right"},
            (torch.ones(M, N).tril(N - M + 40) * torch.ones(M, N).triu(N - M)) > 0,
        ),
        "mask": ({"mask": torch.arange(N) >= 130}, (torch.arange(N) >= 130).expand(M, N)),
    }[hidden]
    value = torch.zeros(1, 2, N, M, requires_grad=True)
    q, k = torch.zeros(1, 2, M, 4), torch.zeros(1, 2, N, 4)
    arguments |= {"dropout_p": p, "seed": seed_tensor(seed), "backend": backend}
    out = fastformer.attention(q, k, value, **arguments)
    (found,) = torch.autograd.grad(out, value, torch.eye(M).expand(1, 2, M, M))
    keep = philox.attention_keep(1, 2, M, N, seed, p) & visible
    assert torch.equal(found.transpose(-1, -2) != 0, keep)
    wanted = keep * philox.keep_scale(p) / visible.sum(-1, keepdim=True)
    torch.testing.assert_close(found.transpose(-1, -2), wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_cpu_drops_what_the_reference_drops(seed, p):
    """Of a call whose weights are all different, in out, weights and gradients."""
    skip_unless_built("cpu")
    inputs = attention_inputs(B=2, H=6, H_kv=3, M=37, N=70, D=20, requires_grad=True)
    # The value's gradient shows the decisions one by one where every query has a column of its own.
    inputs["value"] = torch.zeros(2, 3, 70, 37, requires_grad=True)
    grad_outputs = [torch.eye(37).expand(2, 6, 37, 37), torch.zeros(2, 6, 37, 70)]
    run = functools.partial(
        outputs_and_gradients,
        fastformer.attention,
        **inputs,
        grad_outputs=grad_outputs,
        dropout_p=p,
        seed=seed_tensor(seed),
        return_weights=True,
    )
    found, wanted = run(backend="cpu"), run(backend="reference")
    for name in ("out1", "d_value"):
        assert torch.equal(found[name] != 0, wanted[name] != 0), name
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_map(backend, seed, p):
    skip_unless_built(backend)
    for columns in (1, 13, 264):
        found = norm_scaled_keep(9, columns, seed, p, backend=backend)
        assert_keeps(found, philox.norm_keep(9, columns, seed, p), p)


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_feed_forward_map(backend, seed, p):
    skip_unless_built(backend)
    for columns in (1, 13, 100):
        found = feed_forward_scaled_keep(9, columns, seed, p, backend=backend)
        assert_keeps(found, philox.feed_forward_keep(9, columns, seed, p), p)


def test_rows_are_counted_over_all_leading_dimensions():
    x, residual = torch.ones(2, 3, 4, 20), torch.zeros(2, 3, 4, 20)
    found = fastformer.add_norm(x, residual, dropout_p=0.5, seed=seed_tensor(3))[1]
    assert_keeps(found.view(24, 20), philox.norm_keep(24, 20, 3, 0.5), 0.5)
    transposed = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(
        fastformer.add_norm(transposed, residual, dropout_p=0.5, seed=seed_tensor(3))[1], found
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_count_from_their_own_start(backend):
    sizes_q, sizes_k, H = (5, 33, 1), (40, 3, 64), 4
    inputs = attention_inputs(B=1, H=H, M=39, N=107, requires_grad=True)
    inputs = {name: t.detach()[0].transpose(0, 1).requires_grad_() for name, t in inputs.items()}
    inputs |= {"cu_seqlens_q": cumulated(*sizes_q), "cu_seqlens_k": cumulated(*sizes_k)}
    keep = [
        philox.attention_keep(1, H, m, n, 77, 0.5, first_batch=b)
        for b, (m, n) in enumerate(zip(sizes_q, sizes_k, strict=True))
    ]
    dropout = {"dropout_p": 0.5, "seed": seed_tensor(77)}
    judge_attention(inputs, backend=backend, fn_only=dropout, plain_only={"keep": keep, "keep_scale": 2.0})


def test_thresholds_round_half_to_even_and_the_scale_is_unbiased():
    for halves in (5, 7, 65536 + 1, 65536 + 3, 131072 - 5):
        p = halves / 131072
        dropped = round(halves / 2)
        assert dropped % 2 == 0
        found = norm_scaled_keep(64, 64, 5, p)
        kept = found[found != 0].unique()
        assert kept.numel() <= 1
        if kept.numel():
            assert kept.item() == np.float32(65536 / (65536 - dropped))


# --- the bits of add_norm's sum


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("dtypes", tuple(itertools.product(DTYPES, repeat=2)), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_with_dropout_has_one_right_answer(backend, dtypes, p):
    """Product and sum are rounded one after the other in float32: a fused multiply-add would differ."""
    skip_unless_built(backend)
    inputs = norm_inputs(33, 264, dtype=dtypes[0], residual_dtype=dtypes[1])
    keep = philox.norm_keep(33, 264, 99, p).numpy()
    x, residual = inputs["x"].float().numpy(), inputs["residual"].float().numpy()
    product = np.where(keep, x * np.float32(philox.keep_scale(p)), np.float32(0))
    expected = torch.from_numpy(residual + product).to(torch.promote_types(*dtypes))
    found = fastformer.add_norm(**inputs, dropout_p=p, seed=seed_tensor(99), backend=backend)[1]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_values_are_selected_away(backend):
    """A dropped NaN or inf leaves the residual; multiplied by 0 it would leave NaN."""
    skip_unless_built(backend)
    keep = philox.norm_keep(4, 64, 8, 0.5)
    inputs = norm_inputs(4, 64)
    inputs["x"] = torch.where(keep, inputs["x"], torch.inf)
    out, s = fastformer.add_norm(**inputs, dropout_p=0.5, seed=seed_tensor(8), backend=backend)
    assert out.isfinite().all() and torch.equal(s[~keep], inputs["residual"][~keep])


def in_standard_deviations(chi_square, freedom):
    return (chi_square - freedom) / (2 * freedom) ** 0.5


def sample_keeps():
    p = 0.25
    attention = attention_scaled_keep(2, 8, 128, 128, 2024, p) != 0
    norm = norm_scaled_keep(256, 512, 2024, p) != 0
    feed_forward = feed_forward_scaled_keep(256, 512, 2024, p) != 0
    return {"attention": attention.flatten(0, 1), "norm": norm[None], "feed_forward": feed_forward[None]}


@pytest.fixture(scope="module")
def keeps():
    """Operator -> bool [streams, rows, columns], kept with probability 3/4."""
    return sample_keeps()


@pytest.mark.parametrize("operator", ("attention", "norm", "feed_forward"))
def test_counts_over_rows_columns_and_heads(keeps, operator):
    keep = keeps[operator].double()
    for dim, name in ((0, "head"), (1, "row"), (2, "column")):
        counts = keep.movedim(dim, 0).flatten(1).sum(1)
        n = keep.numel() // counts.numel()
        chi_square = ((counts - 0.75 * n) ** 2 / (n * 0.75 * 0.25)).sum().item()
        deviation = in_standard_deviations(chi_square, counts.numel())
        assert abs(deviation) < 5, f"{operator}: counts per {name} are {deviation:.1f} sigma from binomial"


def assert_uncorrelated(first, second, what):
    first, second = first.double() - 0.75, second.double() - 0.75
    deviation = (first * second).sum().item() / (0.75 * 0.25 * first.numel() ** 0.5)
    assert abs(deviation) < 5, f"{what}: correlated by {deviation:.1f} sigma"


@pytest.mark.parametrize("operator", ("attention", "norm", "feed_forward"))
def test_neighbours_are_uncorrelated(keeps, operator):
    keep = keeps[operator]
    for lag in (1, 2, 3, 4, 7, 8, 16, 31, 32, 64):
        assert_uncorrelated(keep[:, :, lag:], keep[:, :, :-lag], f"{operator}: columns {lag} apart")
        assert_uncorrelated(keep[:, lag:], keep[:, :-lag], f"{operator}: rows {lag} apart")
        if keep.shape[0] > lag:
            assert_uncorrelated(keep[lag:], keep[:-lag], f"{operator}: heads {lag} apart")
    if keep.shape[1] == keep.shape[2]:
        assert_uncorrelated(keep, keep.transpose(1, 2), f"{operator}: (i, j) and (j, i)")


@pytest.mark.parametrize("sampler", (norm_scaled_keep, feed_forward_scaled_keep))
def test_seeds_are_uncorrelated(sampler):
    base = sampler(128, 256, 0, 0.25) != 0
    for seed in (1, 2, 2**31, 2**32, 2**33, -1, -(2**63)):
        assert_uncorrelated(base, sampler(128, 256, seed, 0.25) != 0, f"seeds 0 and {seed}")


def test_operators_with_one_seed_are_uncorrelated(keeps):
    attention, norm, feed = keeps["attention"][0], keeps["norm"][0], keeps["feed_forward"][0]
    assert_uncorrelated(norm, feed, "norm and feed_forward")
    assert_uncorrelated(attention, norm[:128, :128], "attention and norm")
    assert_uncorrelated(attention, feed[:128, :128], "attention and feed_forward")
