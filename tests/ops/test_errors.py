"""What is refused before anything runs, by which exception, and what the message names."""

from __future__ import annotations

import re

import pytest
import torch

import fastformer
from fastformer.testing import attention_inputs, feed_forward_inputs, norm_inputs

from .judging import BACKENDS, HAS_EXTENSION, skip_unless_built

B, H, M, N, D = 2, 4, 5, 7, 8


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def changed(**arguments):
    return lambda: attention_inputs(B, H, M, N, D) | arguments


def packed(**arguments):
    tensors = {"query": zeros(12, H, D), "key": zeros(12, H, D), "value": zeros(12, H, D)}
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    return lambda: tensors | {"cu_seqlens_q": cu, "cu_seqlens_k": cu} | arguments


# What is wrong -> (the argument that the message must name, the call).
ATTENTION = {
    "query is no tensor": ("query", changed(query=[[1.0]])),
    "query of integers": ("query", changed(query=zeros(B, H, M, D, dtype=torch.int64))),
    "complex query": ("query", changed(query=zeros(B, H, M, D, dtype=torch.complex64))),
    "query of rank 1": ("query", changed(query=zeros(D))),
    "head dim 0": ("query|head", changed(query=zeros(B, H, M, 0), key=zeros(B, H, N, 0))),
    "key of another D": ("key", changed(key=zeros(B, H, N, D + 1))),
    "key of another batch": ("key", changed(key=zeros(B + 1, H, N, D))),
    "heads that do not divide": ("key", changed(key=zeros(B, 3, N, D), value=zeros(B, 3, N, D))),
    "key of another dtype": ("key", changed(key=zeros(B, H, N, D, dtype=torch.bfloat16))),
    "value of another dtype": ("value", changed(value=zeros(B, H, N, D, dtype=torch.float64))),
    "value of another N": ("value", changed(value=zeros(B, H, N + 1, D))),
    "value of other heads": ("value", changed(value=zeros(B, 2, N, D))),
    "mask of floats": ("mask", changed(mask=zeros(M, N))),
    "mask of integers": ("mask", changed(mask=zeros(M, N, dtype=torch.int64))),
    "mask that does not broadcast": ("mask", changed(mask=zeros(M, N + 1, dtype=torch.bool))),
    "mask of too high a rank": ("mask", changed(mask=zeros(1, B, H, M, N, dtype=torch.bool))),
    "mask that would broadcast query": ("mask", changed(mask=zeros(B * 3, H, M, N, dtype=torch.bool))),
    "padding of integers": ("key_padding_mask", changed(key_padding_mask=zeros(B, N, dtype=torch.int64))),
    "padding [B, M]": ("key_padding_mask", changed(key_padding_mask=zeros(B, M, dtype=torch.bool))),
    "padding of rank 1": ("key_padding_mask", changed(key_padding_mask=zeros(N, dtype=torch.bool))),
    "lengths of floats": ("key_lengths", changed(key_lengths=zeros(B))),
    "lengths for another batch": ("key_lengths", changed(key_lengths=zeros(B + 1, dtype=torch.int64))),
    "bias of bools": ("bias", changed(bias=zeros(M, N, dtype=torch.bool))),
    "bias that does not broadcast": ("bias", changed(bias=zeros(M + 1, N))),
    "relative bias of the wrong width": ("relative_bias", changed(relative_bias=zeros(H, M + N))),
    "relative bias of the wrong height": ("relative_bias", changed(relative_bias=zeros(3, M + N - 1))),
    "relative bias of rank 1": ("relative_bias", changed(relative_bias=zeros(M + N - 1))),
    "sink for other heads": ("sink", changed(sink=zeros(H + 1))),
    "sink of integers": ("sink", changed(sink=zeros(H, dtype=torch.int64))),
    "softcap 0": ("softcap", changed(softcap=0.0)),
    "negative softcap": ("softcap", changed(softcap=-1.0)),
    "causal of an unknown name": ("causal", changed(causal="middle")),
    "corner of an unknown name": ("corner", changed(corner="middle", window=(1, 1))),
    "negative window": ("window", changed(window=(-1, 2))),
    "window of one": ("window", changed(window=(1,))),
    "window of floats": ("window", changed(window=(1.5, 2))),
    "return_weights of an unknown name": ("return_weights", changed(return_weights="sum")),
    "backend of an unknown name": ("backend", changed(backend="quantum")),
    "cu_seqlens_q alone": ("cu_seqlens_k", packed(cu_seqlens_k=None)),
    "cu_seqlens of floats": ("cu_seqlens_q", packed(cu_seqlens_q=zeros(3))),
    "cu_seqlens of different counts": (
        "cu_seqlens_q|cu_seqlens_k",
        packed(cu_seqlens_q=torch.tensor([0, 12], dtype=torch.int32)),
    ),
    "packed with padding": ("key_padding_mask", packed(key_padding_mask=zeros(2, 7, dtype=torch.bool))),
    "packed of rank 4": ("query", packed(query=zeros(1, 12, H, D))),
    "max_seqlen without packing": ("max_seqlen_q", changed(max_seqlen_q=5)),
}

norm, feed = norm_inputs(3, 16), feed_forward_inputs(3, gated=False)
gated = feed_forward_inputs(3, gated=True)


def layer(**arguments):
    call = {"input": norm["x"], "normalized_shape": (16,), "weight": norm["weight"], "bias": norm["bias"]}
    return lambda: call | arguments


def rms(**arguments):
    return lambda: {"input": norm["x"], "normalized_shape": (16,), "weight": norm["weight"]} | arguments


def add(**arguments):
    return lambda: norm | arguments


def ff(**arguments):
    return lambda: feed | arguments


OTHERS = {
    "layer_norm": {
        "input of integers": ("input", layer(input=zeros(3, 16, dtype=torch.int64))),
        "another shape": ("normalized_shape", layer(normalized_shape=(15,))),
        "empty shape": ("normalized_shape", layer(normalized_shape=())),
        "weight of another width": ("weight", layer(weight=zeros(15))),
        "weight of integers": ("weight", layer(weight=zeros(16, dtype=torch.int64))),
        "bias of another width": ("bias", layer(bias=zeros(17))),
        "bias of rank 2": ("bias", layer(bias=zeros(1, 16))),
        "unknown backend": ("backend", layer(backend="quantum")),
    },
    "rms_norm": {
        "another shape": ("normalized_shape", rms(normalized_shape=(4, 4))),
        "weight of another width": ("weight", rms(weight=zeros(15))),
    },
    "add_norm": {
        "residual of another shape": ("residual", add(residual=zeros(3, 15))),
        "residual that would broadcast": ("residual", add(residual=zeros(1, 16))),
        "residual of integers": ("residual", add(residual=zeros(3, 16, dtype=torch.int64))),
        "no residual": ("residual", add(residual=None)),
        "weight of another width": ("weight", add(weight=zeros(15))),
        "unknown kind": ("kind", add(kind="batch")),
        "rank 0": ("x", add(x=torch.tensor(1.0), residual=torch.tensor(1.0), weight=None, bias=None)),
    },
    "feed_forward": {
        "x of another width": ("w1|x", ff(x=zeros(3, 25))),
        "x of integers": ("x", ff(x=zeros(3, 24, dtype=torch.int64))),
        "w1 of rank 1": ("w1", ff(w1=zeros(24))),
        "w1 of another dtype": ("w1", ff(w1=zeros(40, 24, dtype=torch.bfloat16))),
        "b1 of another width": ("b1", ff(b1=zeros(41))),
        "w2 of another width": ("w2", ff(w2=zeros(24, 41))),
        "b2 of another width": ("b2", ff(b2=zeros(25))),
        "unknown activation": ("activation", ff(activation="softmax")),
        "gated without w_gate": ("w_gate", ff(activation="swiglu")),
        "w_gate without a gate": ("w_gate", lambda: gated | {"activation": "gelu"}),
        "b_gate without w_gate": ("w_gate|b_gate", ff(activation="gelu", b_gate=zeros(40))),
        "w_gate of another shape": (
            "w_gate",
            lambda: gated | {"activation": "reglu", "w_gate": zeros(40, 23)},
        ),
        "b_gate of another width": ("b_gate", lambda: gated | {"activation": "reglu", "b_gate": zeros(41)}),
    },
}
CASES = [("attention", what) for what in ATTENTION] + [(op, what) for op in OTHERS for what in OTHERS[op]]


@pytest.mark.parametrize("op, what", CASES)
def test_a_wrong_argument_is_named(op, what):
    argument, call = {"attention": ATTENTION, **OTHERS}[op][what]
    with pytest.raises((ValueError, TypeError), match=rf"\b({argument})\b") as raised:
        getattr(fastformer, op)(**call())
    # torch's own complaints ("expected scalar type ...") do not tell what came.
    assert len(str(raised.value)) > len(argument) + 10


@pytest.mark.parametrize("kind", ("dtype", "shape"))
def test_wrong_dtypes_are_type_errors_and_wrong_shapes_value_errors(kind):
    wanted = TypeError if kind == "dtype" else ValueError
    wrong = {
        "dtype": {"mask": zeros(M, N), "key": zeros(B, H, N, D, dtype=torch.bfloat16)},
        "shape": {"mask": zeros(M, N + 1, dtype=torch.bool), "key": zeros(B, H, N, D + 1)},
    }[kind]
    for name, tensor in wrong.items():
        with pytest.raises(wanted, match=name):
            fastformer.attention(**changed(**{name: tensor})())


def test_messages_tell_what_came_and_what_is_wanted():
    with pytest.raises(ValueError) as raised:
        fastformer.attention(**changed(key_padding_mask=zeros(3, 9, dtype=torch.bool))())
    assert re.search(r"3, ?9", str(raised.value)) and re.search(r"2, ?7", str(raised.value))
    with pytest.raises(TypeError) as raised:
        fastformer.attention(**changed(mask=zeros(M, N))())
    assert "float32" in str(raised.value) and "bool" in str(raised.value)


def test_causal_without_a_corner_names_the_two_choices():
    for arguments in ({}, {"window": (1, None)}):
        with pytest.raises(ValueError, match="upper_left") as raised:
            fastformer.attention(**changed(causal=True, **arguments)())
        assert "lower_right" in str(raised.value)


def test_tensors_on_another_device_are_named():
    call = changed(key=torch.zeros(B, H, N, D, device="meta"))()
    with pytest.raises((ValueError, TypeError), match="key"):
        fastformer.attention(**call)
    with pytest.raises((ValueError, TypeError), match="weight"):
        fastformer.layer_norm(norm["x"], (16,), torch.zeros(16, device="meta"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_beyond_the_keys_never_read_outside(backend):
    """The values live on the device, where nobody looks at them: too long means all, negative means none."""
    skip_unless_built(backend)
    inputs = attention_inputs(B, H, M, N, D)
    try:
        found = fastformer.attention(**inputs, key_lengths=torch.tensor([N + 1000, -3]), backend=backend)
    except ValueError as error:
        assert "key_lengths" in str(error)
        return
    wanted = fastformer.attention(**inputs, key_lengths=torch.tensor([N, 0]), backend=backend)
    assert torch.equal(found, wanted)


# --- backends


CALLS = {
    "attention": (fastformer.attention, changed()),
    "layer_norm": (fastformer.layer_norm, layer()),
    "rms_norm": (fastformer.rms_norm, rms()),
    "add_norm": (fastformer.add_norm, add()),
    "feed_forward": (fastformer.feed_forward, ff()),
}


@pytest.mark.parametrize("backend", ("cuda", "triton"))
@pytest.mark.parametrize("name", CALLS)
def test_a_named_backend_that_cannot_serve_says_why(name, backend):
    fn, call = CALLS[name]
    with pytest.raises(fastformer.BackendError, match=backend) as raised:
        fn(**call(), backend=backend)
    assert len(str(raised.value).split()) > 4
    with fastformer.use_backend(backend), pytest.raises(fastformer.BackendError, match=backend):
        fn(**call())


@pytest.mark.parametrize("name", CALLS)
def test_explain_tells_the_choice_and_every_refusal(name):
    fn, call = CALLS[name]
    explanation = fastformer.explain(fn, **call())
    assert explanation.backend == ("cpu" if HAS_EXTENSION else "reference")
    assert explanation.backend in str(explanation)
    forward, backward = sorted(explanation.refusals, reverse=True)
    assert forward.endswith("_fwd") and backward.endswith("_bwd")
    assert explanation.backend not in explanation.refusals[forward]
    for direction, refusals in explanation.refusals.items():
        assert {"cuda", "triton"} <= refusals.keys()
        assert direction in str(explanation)
        for backend, reason in refusals.items():
            assert len(reason.split()) >= 3
            assert backend in str(explanation) and reason in str(explanation)


def test_explain_of_a_call_that_only_the_reference_serves():
    call = attention_inputs(D=300)
    explanation = fastformer.explain(fastformer.attention, **call)
    assert explanation.backend == "reference"
    assert re.search("256|300", explanation.refusals["attention_fwd"]["cpu"])
    explanation = fastformer.explain(fastformer.layer_norm, zeros(3, 16, dtype=torch.float64), (16,))
    assert explanation.backend == "reference" and "float64" in explanation.refusals["norm_fwd"]["cpu"]


WHAT_CPU_REFUSES = {
    "wide head": (fastformer.attention, lambda: attention_inputs(D=257), "256"),
    "wide value": (fastformer.attention, lambda: attention_inputs(D=8, D_v=257), "256"),
    "float64": (fastformer.attention, lambda: attention_inputs(dtype=torch.float64), "float64"),
    "float64 bias": (
        fastformer.attention,
        lambda: attention_inputs(M=5, N=7) | {"bias": zeros(5, 7, dtype=torch.float64)},
        "float64",
    ),
    "float64 rows": (
        fastformer.feed_forward,
        lambda: feed_forward_inputs(3, dtype=torch.float64),
        "float64",
    ),
}


@pytest.mark.parametrize("what", WHAT_CPU_REFUSES)
def test_what_the_cpu_backend_refuses_in_both_directions(what):
    skip_unless_built("cpu")
    fn, call, word = WHAT_CPU_REFUSES[what]
    with pytest.raises(fastformer.BackendError, match=word) as raised:
        fn(**call(), backend="cpu")
    assert "cpu" in str(raised.value)
    explanation = fastformer.explain(fn, **call())
    assert set(explanation.backends.values()) == {"reference"}
    assert all(word in reasons["cpu"] for reasons in explanation.refusals.values())


def test_explain_obeys_a_named_backend_and_use_backend():
    fn, call = CALLS["layer_norm"]
    assert fastformer.explain(fn, **call(), backend="reference").backend == "reference"
    with fastformer.use_backend("reference"):
        assert fastformer.explain(fn, **call()).backend == "reference"


def test_explain_of_scaled_dot_product_attention():
    q = zeros(2, 4, 5, 8)
    explanation = fastformer.explain(fastformer.scaled_dot_product_attention, q, q, q, is_causal=True)
    assert explanation.backend == ("cpu" if HAS_EXTENSION else "reference")


def test_explain_runs_nothing_and_draws_nothing():
    state = torch.get_rng_state()
    fastformer.explain(fastformer.attention, **changed(dropout_p=0.5)())
    assert torch.equal(torch.get_rng_state(), state)


def test_explain_refuses_what_the_call_would_refuse():
    with pytest.raises((ValueError, TypeError), match="mask"):
        fastformer.explain(fastformer.attention, **changed(mask=zeros(M, N))())


def test_use_backend_nests_and_is_undone_after_an_error():
    fn, call = CALLS["layer_norm"]
    chosen = lambda: fastformer.explain(fn, **call()).backend
    default = chosen()
    with fastformer.use_backend("reference"):
        assert chosen() == "reference"
        with fastformer.use_backend("auto"):
            assert chosen() == default
        assert chosen() == "reference"
        with pytest.raises(KeyError), fastformer.use_backend("auto"):
            raise KeyError
        assert chosen() == "reference"
    assert chosen() == default


def test_an_argument_goes_before_use_backend():
    fn, call = CALLS["layer_norm"]
    with fastformer.use_backend("cuda"):
        assert fn(**call(), backend="reference").shape == (3, 16)


def test_use_backend_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="quantum"), fastformer.use_backend("quantum"):
        pass


def test_auto_is_none():
    fn, call = CALLS["layer_norm"]
    assert torch.equal(fn(**call(), backend="auto"), fn(**call()))


def test_a_backend_error_is_a_runtime_error():
    assert issubclass(fastformer.BackendError, RuntimeError)
