"""Dropout: known answers, the map from elements to decisions, its quality, what users expect of a seed."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

import fastformer
from fastformer.testing import attention_inputs, feed_forward_inputs, norm_inputs, outputs_and_gradients

from . import philox, plain
from .judging import (
    BACKENDS,
    DTYPES,
    assert_reference_means_plain,
    assert_same_bits,
    judge,
    skip_unless_built,
)

SEEDS = (0, 1, 12345, -1, 2**32, 2**40 + 3, 2**63 - 1, -(2**63))
PROBABILITIES = (2**-16, 0.1, 0.25, 0.5, 0.999)


def seed_tensor(seed):
    return torch.tensor([seed])


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


# --- what each operator keeps, seen through its public function


def attention_scaled_keep(B, H, M, N, seed, p, *, backend=None, H_kv=None):
    """keep * scale [B, H, M, N]: every score is 0, so every weight is 1/N, and v is the identity times N."""
    query, key = torch.zeros(B, H, M, 4), torch.zeros(B, H_kv or H, N, 4)
    value = (torch.eye(N) * N).expand(B, H_kv or H, N, N)
    return fastformer.attention(query, key, value, dropout_p=p, seed=seed_tensor(seed), backend=backend)


def norm_scaled_keep(rows, columns, seed, p, *, backend=None):
    x, residual = torch.ones(rows, columns), torch.zeros(rows, columns)
    return fastformer.add_norm(x, residual, dropout_p=p, seed=seed_tensor(seed), backend=backend)[1]


def feed_forward_scaled_keep(rows, columns, seed, p, *, backend=None):
    return fastformer.feed_forward(
        torch.zeros(rows, 4),
        torch.zeros(columns, 4),
        torch.ones(columns),
        torch.eye(columns),
        None,
        activation="relu",
        dropout_p=p,
        seed=seed_tensor(seed),
        backend=backend,
    )


def assert_keeps(found, keep, p):
    assert torch.equal(found != 0, keep), f"{int(((found != 0) != keep).sum())} decisions differ"
    torch.testing.assert_close(found, keep * philox.keep_scale(p), rtol=1e-6, atol=0)


def or_skip(backend, call, *args, **kwargs):
    skip_unless_built(backend)
    try:
        return call(*args, **kwargs, backend=backend)
    except fastformer.BackendError as refusal:
        assert backend is not None
        pytest.skip(str(refusal))


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_map(backend, seed, p):
    found = or_skip(backend, attention_scaled_keep, 2, 6, 5, 70, seed, p, H_kv=3)
    assert_keeps(found, philox.attention_keep(2, 6, 5, 70, seed, p), p)


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
    for columns in (1, 13, 100):
        found = or_skip(backend, feed_forward_scaled_keep, 9, columns, seed, p)
        assert_keeps(found, philox.feed_forward_keep(9, columns, seed, p), p)


def test_rows_are_counted_over_all_leading_dimensions():
    x, residual = torch.ones(2, 3, 4, 20), torch.zeros(2, 3, 4, 20)
    found = fastformer.add_norm(x, residual, dropout_p=0.5, seed=seed_tensor(3))[1]
    assert_keeps(found.view(24, 20), philox.norm_keep(24, 20, 3, 0.5), 0.5)
    transposed = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(
        fastformer.add_norm(transposed, residual, dropout_p=0.5, seed=seed_tensor(3))[1], found
    )


def test_packed_sequences_count_from_their_own_start():
    sizes_q, sizes_k, H = (5, 33, 1), (40, 3, 64), 4
    inputs = attention_inputs(B=1, H=H, M=39, N=107, dtype=torch.float64, requires_grad=True)
    inputs = {name: t.detach()[0].transpose(0, 1).requires_grad_() for name, t in inputs.items()}
    for name, sizes in (("cu_seqlens_q", sizes_q), ("cu_seqlens_k", sizes_k)):
        inputs[name] = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    keep = [
        philox.attention_keep(1, H, m, n, 77, 0.5, first_batch=b)
        for b, (m, n) in enumerate(zip(sizes_q, sizes_k, strict=True))
    ]
    assert_reference_means_plain(
        fastformer.attention,
        plain.packed_attention,
        inputs,
        fn_only={"dropout_p": 0.5, "seed": seed_tensor(77)},
        plain_only={"keep": keep, "keep_scale": 2.0},
    )


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


# --- values and gradients


def dropout_calls(dtype, p, seed=4):
    """Name -> (function, plain, inputs, keep)."""
    attention = attention_inputs(B=2, H=4, H_kv=2, M=20, N=70, dtype=dtype, requires_grad=True)
    norm = norm_inputs(6, 5, 72, dtype=dtype, requires_grad=True)
    feed = feed_forward_inputs(6, 5, gated=True, dtype=dtype, requires_grad=True)
    attention_keep = philox.attention_keep(2, 4, 20, 70, seed, p)
    norm_keep = philox.norm_keep(30, 72, seed, p).view(6, 5, 72)
    feed_keep = philox.feed_forward_keep(30, 40, seed, p).view(6, 5, 40)
    padding = torch.arange(70) < torch.tensor([[70], [31]])
    weights = {"key_padding_mask": padding, "return_lse": True, "return_weights": True}
    mean = {"causal": "lower_right", "return_weights": "mean"}
    ff = fastformer.feed_forward
    return {
        "attention": (fastformer.attention, plain.attention, attention, attention_keep),
        "weights": (fastformer.attention, plain.attention, attention | weights, attention_keep),
        "mean weights": (fastformer.attention, plain.attention, attention | mean, attention_keep),
        "layer": (fastformer.add_norm, plain.add_norm, norm, norm_keep),
        "rms": (fastformer.add_norm, plain.add_norm, norm | {"kind": "rms"}, norm_keep),
        "feed_forward": (ff, plain.feed_forward, feed | {"activation": "geglu"}, feed_keep),
        "recompute": (
            functools.partial(ff, recompute=True),
            plain.feed_forward,
            feed | {"activation": "geglu"},
            feed_keep,
        ),
    }


CALLS = tuple(dropout_calls(torch.float32, 0.5))


@pytest.mark.parametrize("name", CALLS)
def test_reference_means_the_plain_formula(name):
    # At 1/2 and 3/4 the scale is exact in every dtype.
    for p in (0.5, 0.75):
        fn, plain_fn, inputs, keep = dropout_calls(torch.float64, p)[name]
        assert_reference_means_plain(
            fn,
            plain_fn,
            inputs,
            fn_only={"dropout_p": p, "seed": seed_tensor(4)},
            plain_only={"keep": keep, "keep_scale": philox.keep_scale(p)},
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name, dtype):
    fn, plain_fn, inputs, keep = dropout_calls(dtype, 0.1)[name]
    judge(
        fn,
        plain_fn,
        inputs,
        backend=None,
        fn_only={"dropout_p": 0.1, "seed": seed_tensor(4)},
        plain_only={"keep": keep, "keep_scale": philox.keep_scale(0.1)},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("layer", "rms"))
def test_cpu_serves_the_norm_with_dropout(kind, dtype):
    fn, plain_fn, inputs, keep = dropout_calls(dtype, 0.1)[kind]
    judge(
        fn,
        plain_fn,
        inputs,
        backend="cpu",
        fn_only={"dropout_p": 0.1, "seed": seed_tensor(4)},
        plain_only={"keep": keep, "keep_scale": philox.keep_scale(0.1)},
    )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("p", (1.0, 1 - 2**-18))
def test_everything_dropped(name, p):
    fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)[name]
    results = outputs_and_gradients(fn, **inputs, dropout_p=p)
    assert all(t.isfinite().all() for t in results.values())
    if name in ("layer", "rms"):
        assert torch.equal(results["out1"], inputs["residual"].detach())
        assert (results["d_x"] == 0).all() and (results["d_residual"] != 0).any()
    elif name in ("feed_forward", "recompute"):
        assert torch.equal(results["out0"], inputs["b2"].detach().expand(6, 5, 24))
        assert all((results[f"d_{n}"] == 0).all() for n in ("x", "w1", "b1", "w_gate", "b_gate", "w2"))
    else:
        assert (results["out0"] == 0).all()
        assert (results["d_value"] == 0).all()
        if name == "attention":
            assert (results["d_query"] == 0).all() and (results["d_key"] == 0).all()


def test_backward_drops_what_forward_dropped_when_nobody_gave_a_seed():
    N = 70
    value = (torch.eye(N) * N).expand(2, 3, N, N).clone().requires_grad_()
    out = fastformer.attention(torch.zeros(2, 3, N, 4), torch.zeros(2, 3, N, 4), value, dropout_p=0.5)
    (grad,) = torch.autograd.grad(out, value, torch.eye(N).expand(2, 3, N, N))
    # grad[j, i] = weights[i, j], and out[i, j] = N weights[i, j].
    torch.testing.assert_close(grad.transpose(-1, -2) * N, out.detach())

    x = torch.ones(9, 72, requires_grad=True)
    out = fastformer.add_norm(x, torch.zeros(9, 72), dropout_p=0.5)[1]
    (grad,) = torch.autograd.grad(out, x, torch.ones(9, 72))
    assert torch.equal(grad, out.detach())

    for recompute in (False, True):
        b1 = torch.ones(50, requires_grad=True)
        out = fastformer.feed_forward(
            torch.zeros(1, 4), torch.zeros(50, 4), b1, torch.eye(50), None, dropout_p=0.5, activation="relu",
            recompute=recompute,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(out, b1, torch.ones(1, 50))
        torch.testing.assert_close(grad, out.detach()[0])


# --- quality


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


# --- seeds


@pytest.mark.parametrize("name", CALLS)
def test_manual_seed_reproduces(name):
    fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)[name]
    run = functools.partial(outputs_and_gradients, fn, **inputs, dropout_p=0.5)
    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert_same_bits(first, run())
    assert_same_bits(second, run())
    assert not torch.equal(first["out0"], second["out0"])


@pytest.mark.parametrize("name", CALLS)
def test_the_generator_moves_only_for_a_seed_that_is_drawn(name):
    fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)[name]
    before = torch.get_rng_state()
    outputs_and_gradients(fn, **inputs)
    outputs_and_gradients(fn, **inputs, dropout_p=0.5, seed=seed_tensor(1))
    assert torch.equal(torch.get_rng_state(), before)
    outputs_and_gradients(fn, **inputs, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), before)


def test_scaled_dot_product_attention_drops_by_the_same_map():
    torch.manual_seed(0)
    N, value = 70, (torch.eye(70) * 70).expand(1, 2, 70, 70)
    zeros = torch.zeros(1, 2, N, 4)
    out = fastformer.scaled_dot_product_attention(zeros, zeros, value, dropout_p=0.5)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    torch.manual_seed(0)
    assert torch.equal(out, fastformer.attention(zeros, zeros, value, dropout_p=0.5))


def test_no_dropout_ignores_the_seed():
    fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)["layer"]
    assert_same_bits(
        outputs_and_gradients(fn, **inputs), outputs_and_gradients(fn, **inputs, seed=seed_tensor(1))
    )


def test_threads_change_no_decision():
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            for name in CALLS:
                fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)[name]
                found.append(fn(**inputs, dropout_p=0.5, seed=seed_tensor(1)))
    finally:
        torch.set_num_threads(threads)
    for first, second in zip(found[: len(CALLS)], found[len(CALLS) :], strict=True):
        first, second = (t if isinstance(t, torch.Tensor) else t[0] for t in (first, second))
        assert torch.equal(first == 0, second == 0)
        torch.testing.assert_close(first, second)


# --- what is refused


@pytest.mark.parametrize("p", (-0.1, 1.5, float("nan"), 2**-18, 1e-9, 2**-17))
@pytest.mark.parametrize("name", CALLS)
def test_probabilities_that_are_refused(name, p):
    fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)[name]
    with pytest.raises(ValueError, match="dropout_p"):
        fn(**inputs, dropout_p=p)


@pytest.mark.parametrize("p", (-0.1, 1.5, 2**-18))
def test_probabilities_that_sdpa_refuses(p):
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="dropout_p"):
        fastformer.scaled_dot_product_attention(q, q, q, dropout_p=p)


@pytest.mark.parametrize(
    "seed", (torch.tensor([1.0]), torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32), 0.5), ids=str
)
def test_seeds_that_are_refused(seed):
    for name in ("attention", "layer", "feed_forward"):
        fn, _, inputs, _ = dropout_calls(torch.float32, 0.5)[name]
        with pytest.raises((TypeError, ValueError), match="seed"):
            fn(**inputs, dropout_p=0.5, seed=seed)
