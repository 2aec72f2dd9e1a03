"""fastformer's attention as transformers' models call it."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from fastformer.patching import huggingface_attention, patch
from fastformer.patching.huggingface_attention import attention_forward, make_mask
from fastformer.testing import assert_as_accurate, attention_inputs, in_float64
from tests.patching.tiny_models import outputs, ragged_inputs, stock_copies, tiny_model


def plainly(query, key, value, allowed=None, added=0.0, scaling=None, softcap=None, sink=None):
    """What the interface asks for, [B, M, H, D], and the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + added
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), weights


def check(tensors, plain_options=None, **options):
    """`options` are the interface's, `plain_options` the same thing for `plainly`."""
    out, weights = attention_forward(nn.Identity(), **tensors, output_attentions=True, **options)
    assert out.is_contiguous()
    plain_options = plain_options or {}
    baseline = plainly(**tensors, **plain_options)
    oracle = plainly(**in_float64(tensors), **in_float64(plain_options))
    assert_as_accurate((out, weights), baseline, oracle)


def ragged(B=2, N=33):
    return torch.arange(N) < torch.tensor([N, N // 2])[:B, None]


def test_grouped_heads_and_padding():
    padding = ragged()[:, None, None, :]
    check(attention_inputs(H=4, H_kv=2), {"allowed": padding}, attention_mask=padding, scaling=None)


@pytest.mark.parametrize("M", (1, 7))
def test_causal_only_without_a_mask_and_with_several_queries(M):
    tensors = attention_inputs(M=M, N=9)
    lower = torch.ones(M, 9, dtype=torch.bool).tril() if M > 1 else None
    check(tensors, {"allowed": lower}, attention_mask=None, is_causal=True)
    check(tensors, {"allowed": lower}, attention_mask=None)
    check(tensors, {}, attention_mask=None, is_causal=False)
    everything = torch.ones(2, 1, M, 9, dtype=torch.bool)
    check(tensors, {}, attention_mask=everything, is_causal=True)


def test_modules_say_whether_they_are_causal():
    module = nn.Identity()
    module.is_causal = False
    tensors = attention_inputs(M=5)
    out, weights = attention_forward(module, **tensors, attention_mask=None)
    assert weights is None
    torch.testing.assert_close(out, plainly(**tensors)[0])


def test_added_scores_softcap_and_sinks():
    tensors = attention_inputs(M=6, N=8)
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(1, 4, 6, 8, generator=generator)
    added = torch.randn(2, 1, 6, 8, generator=generator)
    sink = torch.randn(4, generator=generator)
    allowed = torch.rand(2, 1, 6, 8, generator=generator) > 0.3
    allowed[..., 0] = True
    check(tensors, {"added": added}, attention_mask=added)
    check(
        tensors,
        {"added": bias, "scaling": 1.0},
        attention_mask=None,
        is_causal=False,
        position_bias=bias,
        scaling=1.0,
    )
    check(tensors, {"added": bias, "allowed": allowed}, attention_mask=allowed, position_bias=bias)
    check(tensors, {"added": bias + added}, attention_mask=added, position_bias=bias)
    check(tensors, {"softcap": 2.0, "allowed": allowed}, attention_mask=allowed, softcap=2.0)
    check(tensors, {"sink": sink, "allowed": allowed}, attention_mask=allowed, s_aux=sink)


def test_paged_caches_are_refused():
    with pytest.raises(NotImplementedError, match="paged"):
        attention_forward(nn.Identity(), **attention_inputs(), attention_mask=None, cache=object())


def test_registered_under_its_name():
    assert AttentionInterface()["fastformer"] is attention_forward
    assert AttentionMaskInterface()["fastformer"] is make_mask


def test_padding_alone_is_not_expanded():
    padding = ragged()
    options = {"batch_size": 2, "q_length": 33, "kv_length": 33, "mask_function": bidirectional_mask_function}
    skip = {"allow_is_bidirectional_skip": True}
    assert make_mask(**options, **skip, attention_mask=None) is None
    mask = make_mask(**options, **skip, attention_mask=padding)
    assert mask.shape == (2, 1, 1, 33) and mask.data_ptr() == padding.data_ptr()
    # Whoever forbids skipping wants to work on the whole mask.
    whole = make_mask(**options, attention_mask=padding)
    assert torch.equal(whole, sdpa_mask(**options, attention_mask=padding)) and whole.shape == (2, 1, 33, 33)
    shorter = make_mask(**options, **skip, attention_mask=padding[:, :20])
    assert torch.equal(shorter, sdpa_mask(**options, **skip, attention_mask=padding[:, :20]))
    causal = {**options, "mask_function": causal_mask_function, "attention_mask": padding}
    assert torch.equal(make_mask(**causal), sdpa_mask(**causal))


def test_padding_reaches_attention_as_key_padding(monkeypatch):
    asked = []

    def attention(*args, **kwargs):
        asked.append((kwargs["key_padding_mask"], kwargs["mask"], kwargs["causal"]))
        return original(*args, **kwargs)

    original = huggingface_attention.attention
    monkeypatch.setattr(huggingface_attention, "attention", attention)
    model = tiny_model("bert")
    patch(model)
    inputs = ragged_inputs()
    outputs(model, inputs)
    assert len(asked) == model.config.num_hidden_layers
    for padding, mask, causal in asked:
        assert torch.equal(padding, inputs["attention_mask"].bool()) and mask is None and causal is False


@pytest.mark.parametrize("form", ("bool", "float"))
def test_masks_that_users_prepared(form):
    model = tiny_model("bert")
    stock, oracle = stock_copies(model)
    patch(model)
    inputs = ragged_inputs()
    allowed = inputs["attention_mask"].bool()[:, None, None, :] & torch.ones(19, 19, dtype=torch.bool).tril(3)

    def run(m):
        added = torch.zeros(allowed.shape, dtype=m.dtype).masked_fill(~allowed, torch.finfo(m.dtype).min)
        return outputs(m, {**inputs, "attention_mask": allowed if form == "bool" else added})

    assert_as_accurate(*map(run, (model, stock, oracle)))


def test_rows_without_a_single_token():
    model = tiny_model("bert")
    stock, oracle = stock_copies(model)
    patch(model)
    inputs = ragged_inputs()
    inputs["attention_mask"][1] = 0
    assert_as_accurate(*(outputs(m, inputs) for m in (model, stock, oracle)))
