"""attention: every argument of docs/contract.md, on every backend that CPU tensors can go to."""

from __future__ import annotations

import functools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fastformer
from fastformer.testing import attention_inputs, laid_out, outputs_and_gradients, poison_keys

from . import plain
from .judging import (
    BACKENDS,
    DTYPES,
    assert_reference_means_plain,
    assert_same_bits,
    judge,
    skip_unless_built,
    without_grad,
)

# The arguments of attention that the cpu backend serves, forward, in this release.
SERVED_BY_CPU = {"mask", "key_padding_mask", "key_lengths", "causal", "scale", "return_lse"}


class Draw:
    """Arguments of one call, drawn in its dtype."""

    def __init__(self, dtype, seed=11):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def floats(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype).requires_grad_()

    def bools(self, *shape, p=0.7):
        return torch.rand(shape, generator=self.generator) < p

    def with_minus_inf(self, *shape):
        """A bias with -inf in it, the whole first row included."""
        hidden = ~self.bools(*shape)
        hidden[..., 0, :] = True
        return self.floats(*shape).detach().masked_fill(hidden, -torch.inf).requires_grad_()

    def dead_rows(self, *shape):
        mask = self.bools(*shape)
        mask[..., ::3, :] = False
        return mask


def lengths(*values):
    return lambda d: {"key_lengths": torch.tensor(values)}


def fixed(**arguments):
    return lambda d: arguments


# Name -> (arguments of attention_inputs, arguments of attention).
CASES = {
    **{f"head dim {D}": ({"D": D, "M": 19, "N": 37}, fixed()) for D in (1, 3, 40, 64, 80, 96, 128, 200, 256)},
    "head dim 300": ({"D": 300, "M": 5}, fixed()),
    "D_v differs": ({"D": 24, "D_v": 40}, fixed()),
    "one query": ({"M": 1, "N": 65}, fixed()),
    "one key": ({"M": 65, "N": 1}, fixed()),
    "one element": ({"B": 1, "H": 1, "M": 1, "N": 1, "D": 1}, fixed()),
    "M > N": ({"M": 130, "N": 70}, fixed()),
    "many tiles": ({"B": 1, "H": 2, "M": 257, "N": 389, "D": 32}, fixed()),
    "scale": ({}, fixed(scale=0.5)),
    "scale 0": ({}, fixed(scale=0.0)),
    "negative scale": ({}, fixed(scale=-1.0)),
    "GQA": ({"H": 6, "H_kv": 2, "N": 50}, fixed()),
    "MQA causal": ({"H": 5, "H_kv": 1}, fixed(causal=True)),
    "mask": ({"N": 45}, lambda d: {"mask": d.bools(2, 4, 33, 45)}),
    "mask [M, N]": ({"N": 45}, lambda d: {"mask": d.bools(33, 45)}),
    "mask [B, 1, 1, N]": ({"N": 45}, lambda d: {"mask": d.bools(2, 1, 1, 45)}),
    "mask [1, H, M, 1]": ({"N": 45}, lambda d: {"mask": d.bools(1, 4, 33, 1)}),
    "mask of one element": ({}, lambda d: {"mask": torch.tensor(True)}),
    "mask, dead rows": ({"N": 45}, lambda d: {"mask": d.dead_rows(2, 4, 33, 45)}),
    "mask, nothing visible": ({}, lambda d: {"mask": torch.zeros(33, 33, dtype=torch.bool)}),
    "mask and causal": ({}, lambda d: {"mask": d.bools(2, 1, 33, 33), "causal": True}),
    "padding": ({"N": 100}, lambda d: {"key_padding_mask": d.bools(2, 100)}),
    "padding and GQA": (
        {"H": 6, "H_kv": 3, "N": 100},
        lambda d: {"key_padding_mask": d.bools(2, 100), "causal": "lower_right"},
    ),
    "lengths": ({"B": 4, "N": 130}, lengths(130, 64, 1, 0)),
    "lengths and causal": ({"B": 4, "M": 70}, lambda d: {**lengths(70, 64, 1, 0)(d), "causal": True}),
    "lengths, int32": ({"B": 2}, lambda d: {"key_lengths": torch.tensor([3, 33], dtype=torch.int32)}),
    "mask, padding and lengths": (
        {"N": 80},
        lambda d: {"mask": d.bools(4, 33, 80), "key_padding_mask": d.bools(2, 80), **lengths(70, 20)(d)},
    ),
    "causal": ({"M": 70}, fixed(causal=True)),
    "upper left, M < N": ({"M": 20, "N": 90}, fixed(causal="upper_left")),
    "upper left, M > N": ({"M": 90, "N": 20}, fixed(causal="upper_left")),
    "lower right, M < N": ({"M": 20, "N": 90}, fixed(causal="lower_right")),
    "lower right, M > N": ({"M": 90, "N": 20}, fixed(causal="lower_right")),
    "window": ({"M": 90, "N": 70}, fixed(window=(5, 3))),
    "window (0, 0)": ({}, fixed(window=(0, 0))),
    "window, open left": ({"M": 90, "N": 70}, fixed(window=(None, 2))),
    "window, open right": ({"M": 90, "N": 70}, fixed(window=(2, None))),
    "window, open": ({"M": 90, "N": 70}, fixed(window=(None, None))),
    "window wider than N": ({}, fixed(window=(1000, 1000))),
    "window, lower right": ({"M": 20, "N": 90}, fixed(window=(4, 6), corner="lower_right")),
    "window, lower right, M > N": ({"M": 90, "N": 20}, fixed(window=(4, 6), corner="lower_right")),
    "window, upper left": ({"M": 20, "N": 90}, fixed(window=(4, 6), corner="upper_left")),
    "window and causal": ({"M": 90}, fixed(window=(16, None), causal=True)),
    "window and causal, right cut": ({"M": 90}, fixed(window=(16, 3), causal=True)),
    "window and lower right": ({"M": 20, "N": 90}, fixed(window=(16, 0), causal="lower_right")),
    "bias": ({"N": 45}, lambda d: {"bias": d.floats(2, 4, 33, 45)}),
    "bias [H, M, N]": ({"N": 45}, lambda d: {"bias": d.floats(4, 33, 45)}),
    "bias [B, 1, 1, N]": ({"N": 45}, lambda d: {"bias": d.floats(2, 1, 1, 45)}),
    "bias [H, 1, 1]": ({"N": 45}, lambda d: {"bias": d.floats(4, 1, 1)}),
    "bias and causal": ({}, lambda d: {"bias": d.floats(33, 33), "causal": True}),
    "bias with -inf": ({"N": 45}, lambda d: {"bias": d.with_minus_inf(4, 33, 45)}),
    "bias of -inf and mask": ({}, lambda d: {"bias": d.with_minus_inf(33, 33), "mask": d.bools(33, 33)}),
    "relative bias": ({"M": 40, "N": 70}, lambda d: {"relative_bias": d.floats(4, 109)}),
    "relative bias, one row": ({"M": 40, "N": 20}, lambda d: {"relative_bias": d.floats(1, 59)}),
    "relative bias, causal, padding": (
        {"M": 70, "H": 4, "H_kv": 2},
        lambda d: {"relative_bias": d.floats(4, 139), "causal": True, "key_padding_mask": d.bools(2, 70)},
    ),
    "softcap": ({"N": 45}, fixed(softcap=2.0)),
    "softcap and causal": ({}, fixed(softcap=0.5, causal=True)),
    "softcap, bias, mask": (
        {"N": 45},
        lambda d: {"softcap": 3.0, "bias": d.floats(4, 33, 45), "mask": d.dead_rows(33, 45)},
    ),
    "sink": ({"N": 45}, lambda d: {"sink": d.floats(4)}),
    "sink, dead rows": ({"N": 45}, lambda d: {"sink": d.floats(4), "mask": d.dead_rows(2, 1, 33, 45)}),
    "sink of -inf": ({}, lambda d: {"sink": torch.tensor([0.0, -torch.inf, 1.0, 2.0], dtype=d.dtype)}),
    "everything": (
        {"M": 40, "N": 70, "H": 4, "H_kv": 2, "D": 24, "D_v": 40},
        lambda d: {
            "mask": d.dead_rows(4, 40, 70),
            "key_padding_mask": d.bools(2, 70),
            "key_lengths": torch.tensor([70, 33]),
            "window": (30, 10),
            "corner": "lower_right",
            "bias": d.floats(2, 1, 40, 70),
            "relative_bias": d.floats(4, 109),
            "softcap": 5.0,
            "sink": d.floats(4),
            "scale": 0.3,
        },
    ),
    "no batch": ({"B": 0}, fixed()),
    "no heads": ({"H": 0}, fixed()),
    "no queries": ({"M": 0, "N": 5}, fixed()),
    "no keys": ({"M": 5, "N": 0}, fixed()),
    "no keys, sink": ({"M": 5, "N": 0}, lambda d: {"sink": d.floats(4)}),
}


def call(name, dtype, requires_grad=True, **more):
    shape, arguments = CASES[name]
    inputs = attention_inputs(**{"dtype": dtype, "requires_grad": requires_grad, **shape})
    inputs |= arguments(Draw(dtype)) | more
    return inputs if requires_grad else without_grad(inputs)


def cpu_must_serve(inputs):
    """4-D calls with D <= 256 and no gradient; what else the backend serves is its own affair."""
    used = {name for name, value in inputs.items() if value is not None and value is not False}
    return (
        used <= SERVED_BY_CPU | {"query", "key", "value"}
        and inputs["query"].shape[-1] <= 256
        and inputs["query"].numel() > 0
        and inputs["key"].numel() > 0
    )


@pytest.mark.parametrize("weights", (False, "per_head"), ids=("", "weights"))
@pytest.mark.parametrize("name", CASES)
def test_reference_means_the_plain_formula(name, weights):
    inputs = call(name, torch.float64, return_lse=True, return_weights=weights)
    assert_reference_means_plain(fastformer.attention, plain.attention, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_auto_forward_and_backward(name, dtype):
    judge(fastformer.attention, plain.attention, call(name, dtype, return_lse=True), backend=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cpu_forward(name, dtype):
    inputs = call(name, dtype, requires_grad=False, return_lse=True)
    must = cpu_must_serve(inputs)
    if not judge(fastformer.attention, plain.attention, inputs, backend="cpu", must_serve=must):
        pytest.skip("not served by cpu in this release")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("everything", "bias with -inf", "sink, dead rows", "lower right, M > N"))
def test_reference_in_narrow_dtypes(name, dtype):
    inputs = call(name, dtype, return_lse=True)
    judge(fastformer.attention, plain.attention, inputs, backend="reference")


def test_a_call_without_unserved_arguments_goes_to_cpu():
    skip_unless_built("cpu")
    for name in CASES:
        inputs = call(name, torch.float32, requires_grad=False)
        if cpu_must_serve(inputs):
            chosen = fastformer.explain(fastformer.attention, **inputs)
            assert chosen.backend == "cpu", f"{name}: {chosen}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ("transposed", "sliced", "unaligned", "last_strided", "broadcast"))
def test_layouts(layout, backend):
    grad = backend != "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        inputs = attention_inputs(N=45, D=20, dtype=dtype, layout=layout, requires_grad=grad)
        judge(fastformer.attention, plain.attention, inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_masks_and_heads_that_share_storage(backend):
    d = Draw(torch.float32)
    inputs = attention_inputs(M=20, N=45, requires_grad=backend != "cpu")
    inputs["key"] = inputs["key"][:, :1].detach().expand(2, 4, 45, 16).requires_grad_(backend != "cpu")
    inputs["mask"] = d.bools(45, 4, 20).permute(1, 2, 0)
    inputs["key_padding_mask"] = d.bools(45, 2).t()
    judge(fastformer.attention, plain.attention, inputs, backend=backend)


def test_explain_tells_of_the_copy_of_a_strided_last_dimension():
    skip_unless_built("cpu")
    inputs = attention_inputs(layout="last_strided")
    assert "cop" in str(fastformer.explain(fastformer.attention, **inputs))
    assert "cop" not in str(fastformer.explain(fastformer.attention, **attention_inputs()))


# --- rows and keys that nobody may see


def finite_everywhere(results, but=()):
    return all(value.isfinite().all() for name, value in results.items() if name not in but)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cause", ("mask", "bias", "lengths", "padding", "corner"))
def test_dead_rows_are_zero_and_pass_no_gradient(cause, backend):
    skip_unless_built(backend)
    inputs = attention_inputs(M=40, N=20, requires_grad=backend != "cpu")
    dead = torch.zeros(2, 4, 40, dtype=torch.bool)
    if cause in ("mask", "bias"):
        dead[1, 2, 5:17] = True
        inputs["mask"] = ~dead[..., None].expand(2, 4, 40, 20)
        if cause == "bias":
            inputs["bias"] = torch.zeros(2, 4, 40, 20).masked_fill_(~inputs.pop("mask"), -torch.inf)
            inputs["bias"].requires_grad_(backend != "cpu")
    elif cause == "lengths":
        dead[0] = True
        inputs["key_lengths"] = torch.tensor([0, 20])
    elif cause == "padding":
        dead[1] = True
        inputs["key_padding_mask"] = torch.tensor([True, False])[:, None].expand(2, 20)
    else:
        dead[..., :20] = True
        inputs["causal"] = "lower_right"
    try:
        results = outputs_and_gradients(fastformer.attention, **inputs, return_lse=True, backend=backend)
    except fastformer.BackendError as refusal:
        assert cause == "bias", refusal
        pytest.skip(str(refusal))
    out, lse = results["out0"], results["out1"]
    assert (out[dead] == 0).all()
    assert (lse[dead] == -torch.inf).all()
    assert out[~dead].ne(0).any() and lse[~dead].isfinite().all()
    assert finite_everywhere(results, but=("out1",))
    if "d_query" in results:
        assert (results["d_query"][dead] == 0).all()
        if "d_bias" in results:
            assert (results["d_bias"][dead] == 0).all()
        if dead[0].all():
            assert (results["d_key"][0] == 0).all() and (results["d_value"][0] == 0).all()


@pytest.mark.parametrize("weights", (True, "per_head", "mean"))
def test_dead_rows_have_zero_weights(weights):
    inputs = call("mask, dead rows", torch.float32, return_weights=weights)
    results = outputs_and_gradients(fastformer.attention, **inputs)
    weights = results["out1"]
    assert finite_everywhere(results)
    dead = ~inputs["mask"].any(-1)
    if weights.dim() == 4:
        assert (weights[dead] == 0).all()
        torch.testing.assert_close(weights.sum(-1), (~dead).float())


def test_a_dead_row_with_a_sink_has_the_sink_as_its_lse():
    inputs = call("sink, dead rows", torch.float32, return_lse=True)
    results = outputs_and_gradients(fastformer.attention, **inputs)
    dead = ~inputs["mask"].expand(2, 4, 33, 45).any(-1)
    sink = inputs["sink"].detach()[None, :, None].expand(2, 4, 33)
    torch.testing.assert_close(results["out1"][dead], sink[dead])
    assert (results["out0"][dead] == 0).all() and finite_everywhere(results)


def test_the_largest_negative_number_is_no_mask():
    """A row of finfo.min gives the mean of v; scaled by log2(e) carelessly it becomes -inf and gives 0."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = attention_inputs(M=8, N=20, dtype=dtype, requires_grad=True)
        inputs["bias"] = torch.zeros(8, 20, dtype=dtype)
        inputs["bias"][3] = torch.finfo(dtype).min
        inputs["bias"].requires_grad_()
        judge(fastformer.attention, plain.attention, inputs, backend=None)
        out = fastformer.attention(**inputs)
        torch.testing.assert_close(out[:, :, 3], inputs["value"].mean(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", (torch.nan, torch.inf, -torch.inf), ids=str)
@pytest.mark.parametrize("how", ("padding", "lengths", "mask", "mask per head"))
def test_keys_hidden_from_every_query_change_no_bit(how, poison, backend):
    skip_unless_built(backend)
    N = 150
    for dtype in (torch.float32, torch.bfloat16):
        inputs = attention_inputs(M=40, N=N, D=40, dtype=dtype, requires_grad=backend != "cpu")
        real = Draw(dtype).bools(2, N, p=0.5)
        if how == "padding":
            arguments = {"key_padding_mask": real}
        elif how == "lengths":
            real = torch.arange(N) < torch.tensor([70, 129])[:, None]
            arguments = {"key_lengths": torch.tensor([70, 129])}
        else:
            arguments = {"mask": real[:, None, None, :]}
        if how == "mask per head":
            arguments["mask"] = real[:, None, None, :].repeat(1, 4, 1, 1)
            arguments["mask"][0, 1] = True
            real[0] = True
        run = functools.partial(
            outputs_and_gradients, fastformer.attention, return_lse=True, backend=backend, **arguments
        )
        clean = run(**inputs)
        inputs["key"], inputs["value"] = poison_keys(inputs["key"], inputs["value"], real, poison)
        poisoned = run(**inputs)
        assert finite_everywhere(poisoned)
        assert_same_bits(clean, poisoned)
        if "d_key" in clean:
            hidden = (~real)[:, None, :].expand(2, 4, N)
            assert (poisoned["d_key"][hidden] == 0).all() and (poisoned["d_value"][hidden] == 0).all()


@pytest.mark.parametrize(
    "arguments", ("bias", "relative_bias", "softcap", "sink", "window", "return_weights")
)
def test_hidden_keys_change_no_bit_of_any_argument(arguments):
    d, N = Draw(torch.float32), 70
    inputs = attention_inputs(M=40, N=N, requires_grad=True)
    real = d.bools(2, N, p=0.5)
    more = {
        "bias": {"bias": d.floats(4, 40, N)},
        "relative_bias": {"relative_bias": d.floats(4, 40 + N - 1)},
        "softcap": {"softcap": 2.0},
        "sink": {"sink": d.floats(4)},
        "window": {"window": (20, 20)},
        "return_weights": {"return_weights": True},
    }[arguments]
    run = functools.partial(outputs_and_gradients, fastformer.attention, key_padding_mask=real, **more)
    clean = run(**inputs)
    inputs["key"], inputs["value"] = poison_keys(inputs["key"], inputs["value"], real)
    assert_same_bits(clean, run(**inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_query_stays_in_its_row(backend):
    skip_unless_built(backend)
    inputs = attention_inputs(M=40, N=70)
    run = functools.partial(fastformer.attention, return_lse=True, backend=backend)
    out, lse = run(**inputs)
    inputs["query"][1, 2, 7, 3] = torch.nan
    nan_out, nan_lse = run(**inputs)
    assert nan_out[1, 2, 7].isnan().all() and nan_lse[1, 2, 7].isnan()
    out[1, 2, 7], lse[1, 2, 7] = torch.nan, torch.nan
    assert_same_bits({"out": out, "lse": lse}, {"out": nan_out, "lse": nan_lse})


def test_nan_in_the_bias_counts_only_where_it_is_visible():
    inputs = attention_inputs(M=10, N=10)
    bias = torch.zeros(10, 10)
    out = fastformer.attention(**inputs, bias=bias, causal=True)
    bias[4, 8] = torch.nan
    assert torch.equal(fastformer.attention(**inputs, bias=bias, causal=True), out)
    bias[4, 2] = torch.nan
    nan_out = fastformer.attention(**inputs, bias=bias, causal=True)
    assert nan_out[:, :, 4].isnan().all()
    assert torch.equal(nan_out[:, :, 5:], out[:, :, 5:]) and torch.equal(nan_out[:, :, :4], out[:, :, :4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype, backend):
    inputs = attention_inputs(M=20, N=70, dtype=dtype, requires_grad=backend != "cpu")
    for name in ("query", "key"):
        inputs[name] = (inputs[name].detach() * 100).requires_grad_(backend != "cpu")
    inputs["causal"] = "lower_right"
    if dtype == torch.float16:
        inputs["scale"] = 2**-10  # torch's own composition, the baseline, holds its scores in float16
    judge(fastformer.attention, plain.attention, inputs, backend=backend)


# --- lse and weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", (True, "mean"), ids=str)
@pytest.mark.parametrize("name", ("GQA", "mask, dead rows", "lengths", "sink", "everything", "no keys"))
def test_weights_and_lse_with_gradients(name, weights, dtype):
    inputs = call(name, dtype, return_lse=True, return_weights=weights)
    judge(fastformer.attention, plain.attention, inputs, backend=None)


def test_what_is_returned_and_its_shapes():
    inputs = attention_inputs(B=2, H=4, M=5, N=7, D=8, D_v=6, dtype=torch.bfloat16)
    out, lse, weights = fastformer.attention(**inputs, return_lse=True, return_weights="mean")
    assert (out.shape, lse.shape, weights.shape) == ((2, 4, 5, 6), (2, 4, 5), (2, 5, 7))
    assert lse.dtype == torch.float32 and out.dtype == weights.dtype == torch.bfloat16
    assert out.is_contiguous()
    out, weights = fastformer.attention(**inputs, return_weights="per_head")
    assert weights.shape == (2, 4, 5, 7)
    assert torch.equal(fastformer.attention(**inputs, return_weights=True)[1], weights)
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(2, 4, 5), rtol=0, atol=2e-2)
    assert isinstance(fastformer.attention(**inputs), torch.Tensor)


# --- packed sequences


def cumulated(*sizes):
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


# Name -> (query lengths, key lengths, arguments).
PACKED = {
    "self": ((5, 33, 1, 70), (5, 33, 1, 70), fixed()),
    "cross": ((5, 33, 1), (40, 3, 64), fixed()),
    "empty sequences": ((0, 5, 3, 0), (4, 0, 3, 0), fixed()),
    "one sequence": ((40,), (40,), fixed(causal=True)),
    "causal": ((5, 33, 1, 70), (5, 33, 1, 70), fixed(causal=True)),
    "upper left": ((5, 33, 1), (40, 3, 64), fixed(causal="upper_left")),
    "lower right": ((5, 33, 1), (40, 3, 64), fixed(causal="lower_right")),
    "window": ((5, 33, 70), (40, 3, 70), fixed(window=(3, 5), corner="lower_right")),
    "relative bias": ((5, 33, 1), (40, 3, 64), lambda d: {"relative_bias": d.floats(4, 33 + 64 - 1)}),
    "softcap and sink": ((5, 33), (5, 33), lambda d: {"softcap": 2.0, "sink": d.floats(4)}),
}


def packed_call(name, dtype):
    sizes_q, sizes_k, arguments = PACKED[name]
    inputs = attention_inputs(
        B=1, M=sum(sizes_q), N=sum(sizes_k), H=4, H_kv=2, dtype=dtype, requires_grad=True
    )
    inputs = {key: t.detach()[0].transpose(0, 1).contiguous().requires_grad_() for key, t in inputs.items()}
    starts_q = cumulated(*sizes_q)
    # causal=True asks for M = N in every sequence, and one tensor for both says so without a look at it.
    starts_k = starts_q if sizes_q == sizes_k else cumulated(*sizes_k)
    inputs |= {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "return_lse": True}
    return inputs | arguments(Draw(dtype)), {"max_seqlen_q": max(sizes_q), "max_seqlen_k": max(sizes_k)}


@pytest.mark.parametrize("name", PACKED)
def test_packed_reference(name):
    inputs, longest = packed_call(name, torch.float64)
    assert_reference_means_plain(fastformer.attention, plain.packed_attention, inputs)
    assert_reference_means_plain(fastformer.attention, plain.packed_attention, inputs, fn_only=longest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed(name, dtype):
    inputs, longest = packed_call(name, dtype)
    judge(fastformer.attention, plain.packed_attention, inputs, backend=None, fn_only=longest)


def test_packed_sequences_do_not_see_each_other():
    inputs, longest = packed_call("cross", torch.float32)
    run = functools.partial(outputs_and_gradients, fastformer.attention, **longest)
    clean = run(**inputs)
    for name in ("key", "value"):
        poisoned = inputs[name].detach().clone()
        poisoned[40:43] = torch.nan
        inputs[name] = poisoned.requires_grad_()
    dirty = run(**inputs)
    others = torch.cat([torch.arange(5), torch.arange(38, 39)])
    other_keys = torch.cat([torch.arange(40), torch.arange(43, 107)])
    assert dirty["out0"][5:38].isnan().all()
    assert torch.equal(clean["out0"][others], dirty["out0"][others])
    assert torch.equal(clean["d_query"][others], dirty["d_query"][others])
    assert torch.equal(clean["d_key"][other_keys], dirty["d_key"][other_keys])
    assert torch.equal(clean["d_value"][other_keys], dirty["d_value"][other_keys])


@pytest.mark.parametrize("causal", (False, True), ids=("", "causal"))
def test_jagged_nested_tensors(causal):
    sizes, H, D = (5, 33, 1), 4, 16
    generator = torch.Generator().manual_seed(0)
    pieces = [[torch.randn(n, H, D, generator=generator) for n in sizes] for _ in range(3)]
    leaves = [torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True) for parts in pieces]
    # One ragged structure for all three, as one projection would give them.
    key, value = (
        torch.nested.nested_tensor_from_jagged(leaf.values(), leaves[0].offsets()) for leaf in leaves[1:]
    )
    query = leaves[0]
    out = fastformer.attention(*(t.transpose(1, 2) for t in (query, key, value)), causal=causal)
    assert out.is_nested and out.layout == torch.jagged
    for index, found in enumerate(out.unbind()):
        q, k, v = (parts[index].transpose(0, 1)[None] for parts in pieces)
        torch.testing.assert_close(found, plain.attention(q, k, v, causal=causal)[0])
    out.values().square().sum().backward()
    assert query.grad is not None and query.grad.values().abs().sum() > 0


# --- properties


@st.composite
def calls(draw):
    """Arguments of one call, every combination that the contract allows, small enough to be quick."""
    H_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    B, H, M, N = draw(st.integers(1, 3)), H_kv * group, draw(st.integers(1, 70)), draw(st.integers(1, 70))
    D, D_v = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    shape = {
        "B": B,
        "H": H,
        "M": M,
        "N": N,
        "D": D,
        "D_v": D_v,
        "H_kv": H_kv,
        "seed": draw(st.integers(0, 9)),
    }
    shape["layout"] = draw(st.sampled_from(("contiguous", "transposed", "sliced", "last_strided")))
    chosen = draw(st.sets(st.sampled_from(("mask", "padding", "lengths", "bias", "relative", "cap", "sink"))))
    sides = st.none() | st.integers(0, 20)
    window = draw(st.none() | st.tuples(sides, sides))
    corner = draw(st.sampled_from((False, "upper_left", "lower_right")))
    broadcast = [1 if draw(st.booleans()) else size for size in (B, H, M, N)]

    def arguments(dtype):
        d = Draw(dtype)
        found = {"return_lse": True, "causal": corner}
        if window is not None:
            found["window"] = window
        if "mask" in chosen:
            found["mask"] = d.bools(*broadcast)
        if "padding" in chosen:
            found["key_padding_mask"] = d.bools(B, N)
        if "lengths" in chosen:
            found["key_lengths"] = torch.randint(0, N + 1, (B,), generator=d.generator)
        if "bias" in chosen:
            found["bias"] = d.floats(*broadcast)
        if "relative" in chosen:
            found["relative_bias"] = d.floats(H, M + N - 1)
        if "cap" in chosen:
            found["softcap"] = 4.0
        if "sink" in chosen:
            found["sink"] = d.floats(H)
        return attention_inputs(**shape, dtype=dtype, requires_grad=True) | found

    return arguments


def check_reference(arguments):
    inputs = arguments(torch.float64)
    assert_reference_means_plain(fastformer.attention, plain.attention, inputs)


def check_auto(arguments, dtype):
    inputs = arguments(dtype)
    judge(fastformer.attention, plain.attention, inputs, backend=None)
    # Without gradient the fast forward serves more, so judge it too.
    judge(fastformer.attention, plain.attention, without_grad(inputs), backend=None)


@hypothesis.given(calls())
def test_any_call_reference(arguments):
    check_reference(arguments)


@hypothesis.given(calls(), st.sampled_from(DTYPES))
def test_any_call_auto(arguments, dtype):
    check_auto(arguments, dtype)


@pytest.mark.slow
@hypothesis.settings(max_examples=1000)
@hypothesis.given(calls(), st.sampled_from(DTYPES))
def test_many_calls(arguments, dtype):
    check_reference(arguments)
    check_auto(arguments, dtype)


@st.composite
def calls_for_cpu(draw):
    """Only what the cpu backend must serve."""
    H_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    B, H, M, N = draw(st.integers(1, 3)), H_kv * group, draw(st.integers(1, 150)), draw(st.integers(1, 300))
    shape = {"B": B, "H": H, "M": M, "N": N, "H_kv": H_kv, "seed": draw(st.integers(0, 9))}
    shape |= {"D": draw(st.integers(1, 256)), "D_v": draw(st.integers(1, 256))}
    shape["layout"] = draw(st.sampled_from(("contiguous", "transposed", "sliced", "last_strided")))
    broadcast = [1 if draw(st.booleans()) else size for size in (B, H, M, N)]
    chosen = draw(st.sets(st.sampled_from(("mask", "padding", "lengths"))))
    causal = draw(st.sampled_from((False, "upper_left", "lower_right")))

    def arguments(dtype):
        d = Draw(dtype)
        found = {"return_lse": True, "causal": causal}
        if "mask" in chosen:
            found["mask"] = d.bools(*broadcast)
        if "padding" in chosen:
            found["key_padding_mask"] = d.bools(B, N)
        if "lengths" in chosen:
            found["key_lengths"] = torch.randint(0, N + 1, (B,), generator=d.generator)
        return attention_inputs(**shape, dtype=dtype) | found

    return arguments


@hypothesis.given(calls_for_cpu(), st.sampled_from(DTYPES))
def test_any_call_cpu(arguments, dtype):
    judge(fastformer.attention, plain.attention, arguments(dtype), backend="cpu")


@pytest.mark.slow
@hypothesis.settings(max_examples=1000)
@hypothesis.given(calls_for_cpu(), st.sampled_from(DTYPES))
def test_many_calls_cpu(arguments, dtype):
    judge(fastformer.attention, plain.attention, arguments(dtype), backend="cpu")


@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_a_permutation_of_the_keys_changes_nothing(M, N, seed):
    inputs = attention_inputs(M=M, N=N, dtype=torch.float64, seed=seed)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    permuted = {**inputs, **{name: inputs[name][:, :, order] for name in ("key", "value")}}
    torch.testing.assert_close(fastformer.attention(**inputs), fastformer.attention(**permuted))


def test_a_toeplitz_row_is_a_bias():
    """relative_bias [H, M + N - 1] means what the [H, M, N] tensor gathered from it means."""
    inputs = attention_inputs(M=30, N=50, dtype=torch.float64)
    row = Draw(torch.float64).floats(4, 79)
    index = torch.arange(50)[None, :] - torch.arange(30)[:, None] + 29
    gathered = fastformer.attention(**inputs, bias=row[:, index])
    torch.testing.assert_close(fastformer.attention(**inputs, relative_bias=row), gathered)


def test_a_bias_that_is_broadcast_by_stride_has_a_gradient():
    inputs = attention_inputs(M=10, N=12, requires_grad=True)
    table = Draw(torch.float32).floats(4, 1, 12)
    inputs["bias"] = laid_out(table, "contiguous").detach().expand(4, 10, 12).requires_grad_()
    judge(fastformer.attention, plain.attention, inputs, backend=None)
