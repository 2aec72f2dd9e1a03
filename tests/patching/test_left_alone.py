"""What patch must not touch, and what must keep working around it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModel, BertModel, GPT2Model
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

from fastformer.patching import huggingface_blocks, patch, unpatch
from fastformer.testing import assert_as_accurate
from tests.patching.tiny_models import outputs, ragged_inputs, shaken, stock_copies, tiny_model


class AdaptedLinear(nn.Linear):
    """A linear layer with something more in it, as LoRA has."""

    def forward(self, input):
        return super().forward(input) + 0.1 * input.mean(-1, keepdim=True)


def adapt(parent: nn.Module, name: str) -> None:
    getattr(parent, name).__class__ = AdaptedLinear


def reasons(report) -> dict[str, str]:
    return {item.path: item.reason for item in report.left}


def assert_still_right(model: nn.Module, stock: nn.Module, oracle: nn.Module) -> None:
    inputs = ragged_inputs()
    assert_as_accurate(*(outputs(m, inputs) for m in (model, stock, oracle)))


@pytest.mark.parametrize(
    ("architecture", "parent", "child", "left", "still_fused"),
    [
        ("bert", "encoder.layer.1.intermediate", "dense", "encoder.layer.1", "encoder.layer.1.output"),
        ("bert", "encoder.layer.0.output", "dense", "encoder.layer.0", "encoder.layer.0.output"),
        # The projections of attention are called, not read: any class of linear does.
        ("bert", "encoder.layer.0.attention.self", "query", None, "encoder.layer.0.attention.self"),
        ("bert", "encoder.layer.0.attention.output", "dense", None, "encoder.layer.0.attention.output"),
        ("albert", "encoder.albert_layer_groups.0.albert_layers.0", "ffn", "same", None),
        ("distilbert", "transformer.layer.0.ffn", "lin2", "transformer.layer.0", None),
        ("mpnet", "encoder.layer.1.intermediate", "dense", "encoder.layer.1", "encoder.layer.1.output"),
    ],
)
@pytest.mark.parametrize("when", ("before", "after"))
def test_exchanged_linears_are_called(architecture, parent, child, left, still_fused, when):
    model = tiny_model(architecture)
    if when == "after":
        patch(model)
    adapt(model.get_submodule(parent), child)
    unpatched = unpatch(model) if when == "before" else model
    stock, oracle = stock_copies(unpatched)
    if when == "before":
        report = patch(model)
        left = parent if left == "same" else left
        if left:
            assert "AdaptedLinear, not exactly torch.nn.Linear" in reasons(report)[left]
        if still_fused:
            assert still_fused in {item.path for item in report.replaced}
    assert_still_right(model, unpatch(stock), unpatch(oracle))


@pytest.mark.parametrize("architecture", ("bert", "albert", "distilbert", "mpnet"))
@pytest.mark.parametrize("when", ("before", "after"))
def test_hooks_on_inner_modules_run(architecture, when):
    model = tiny_model(architecture)
    stock, oracle = stock_copies(model)

    def watched(m):
        called = []
        handles = [
            module.register_forward_hook(lambda module, args, out, path=path: called.append(path))
            for path, module in m.named_modules()
            if path
        ]
        return called, handles

    if when == "after":
        patch(model)
    (called, handles), (called_by_stock, _) = watched(model), watched(stock)
    if when == "before":
        assert any("has hooks" in reason for reason in reasons(patch(model)).values())
    assert_still_right(model, stock, oracle)
    assert called == called_by_stock

    for handle in handles:
        handle.remove()
    assert not any("hooks" in reason for reason in reasons(patch(model)).values())
    called.clear()
    assert_still_right(model, stock, oracle)
    assert not called


def test_hooks_on_replaced_modules_run():
    model = tiny_model("bert")
    patch(model)
    seen = []
    model.encoder.layer[0].register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    model.embeddings.LayerNorm.register_forward_hook(lambda module, args, out: out * 0)
    result = outputs(model, ragged_inputs())
    assert seen == ["BertLayer"]
    assert not torch.equal(
        result["last_hidden_state"], outputs(tiny_model("bert"), ragged_inputs())["last_hidden_state"]
    )


def test_replaced_forward_methods_are_called():
    model = tiny_model("bert")
    own = ("encoder.layer.0.output.dense", "encoder.layer.1.attention.output", "embeddings.LayerNorm")
    for path in own:
        module = model.get_submodule(path)
        module.forward = lambda *args, forward=module.forward: forward(*args) * 2
    stock = outputs(model, ragged_inputs())
    left = reasons(patch(model))
    assert left.keys() == {"encoder.layer.0", *own[1:]}
    assert all("forward of its own" in reason for reason in left.values())
    torch.testing.assert_close(outputs(model, ragged_inputs()), stock)


def test_activations_that_feed_forward_lacks():
    model = tiny_model("bert", hidden_act="quick_gelu")
    stock, oracle = stock_copies(model)
    report = patch(model)
    assert "QuickGELUActivation, which feed_forward does not have" in reasons(report)["encoder.layer.0"]
    assert {"encoder.layer.0.output", "encoder.layer.1.output"} <= {item.path for item in report.replaced}
    assert_still_right(model, stock, oracle)


@pytest.mark.parametrize("architecture", ("bert", "albert", "distilbert"))
def test_chunked_feed_forward(architecture):
    model = tiny_model(architecture, chunk_size_feed_forward=1)
    stock, oracle = stock_copies(model)
    left = reasons(patch(model))
    assert bool(left) == (architecture != "bert")
    assert all(reason == "chunk_size_feed_forward is set" for reason in left.values())
    assert_still_right(model, stock, oracle)


@pytest.mark.parametrize("architecture", ("bert", "albert"))
def test_output_attentions_in_the_config_keeps_eager_attention(architecture):
    model = tiny_model(architecture, attn_implementation="eager", output_attentions=True)
    stock, oracle = stock_copies(model)
    report = patch(model)
    assert any("config.output_attentions" in item.reason for item in report.left)
    assert model.config._attn_implementation == "eager"
    assert_still_right(model, stock, oracle)


def test_subclasses_are_not_taken_for_what_they_derive_from():
    class Louder(BertSelfAttention):
        pass

    class OtherLayer(BertLayer):
        pass

    model = tiny_model("bert")
    model.encoder.layer[0].attention.self.__class__ = Louder
    model.encoder.layer[1].__class__ = OtherLayer
    stock, oracle = stock_copies(model)
    report = patch(model)
    left = reasons(report)
    assert "only BertSelfAttention itself is in the table" in left["encoder.layer.0.attention.self"]
    assert "encoder.layer.0.attention.self [Louder]" in left["encoder.layer.1.attention.self"]
    assert "only BertLayer itself is in the table" in left["encoder.layer.1"]
    assert model.config._attn_implementation == "sdpa"
    assert_still_right(model, stock, oracle)


def test_patching_again_follows_what_changed():
    model = tiny_model("bert")
    patch(model)
    model.encoder.layer[0].attention.self.__class__ = type("Louder", (BertSelfAttention,), {})
    adapt(model.encoder.layer[1].output, "dense")
    stock, oracle = (unpatch(m) for m in stock_copies(model))
    left = reasons(patch(model))
    assert left.keys() == {
        "encoder.layer.0.attention.self",
        "encoder.layer.1.attention.self",
        "encoder.layer.1",
    }
    assert model.config._attn_implementation == "sdpa"
    assert_still_right(model, stock, oracle)


def test_global_hooks_run():
    model = tiny_model("bert")
    patch(model)
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.add(module))
    try:
        outputs(model, ragged_inputs())
        assert {model.encoder.layer[0].output.dense, model.encoder.layer[1].intermediate} <= seen
        assert "global module hooks" in reasons(patch(model))["encoder.layer.0"]
    finally:
        handle.remove()


def test_blocks_without_their_model():
    encoder = tiny_model("bert").encoder
    report = patch(encoder)
    assert "no model around it has its config" in reasons(report)["layer.0.attention.self"]
    assert "layer.0" in {item.path for item in report.replaced}
    assert encoder.config._attn_implementation == "sdpa"


def test_models_without_a_table_are_named():
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    model = nn.ModuleDict({"decoder": shaken(GPT2Model(config)), "encoder": tiny_model("bert")})
    report = patch(model)
    assert reasons(report) == {"decoder": "there is no table for 'gpt2' models"}
    assert "GPT2Model" in str(report)


def test_models_that_hold_nothing_to_replace():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    report = patch(model)
    assert (report.replaced, report.left) == ((), ())
    assert "no model that fastformer knows" in str(report)
    assert unpatch(model) is model
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        patch("bert-base-uncased")


def test_other_releases_of_transformers_are_refused(monkeypatch):
    model = tiny_model("bert")
    monkeypatch.setattr("transformers.__version__", "6.1.0")
    report = patch(model)
    assert reasons(report) == {"": "the tables follow transformers 5, not 6.1.0"}
    assert not report.replaced and type(model.encoder.layer[0]) is BertLayer


def test_user_defined_models_on_a_known_base():
    class Regressor(BertModel):
        def __init__(self, config):
            super().__init__(config)
            self.norm = nn.LayerNorm(config.hidden_size)

    model = shaken(Regressor(AutoModel.from_config(tiny_model("bert").config).config))
    report = patch(model)
    assert not report.left
    assert isinstance(model.norm, huggingface_blocks.LayerNorm)


def test_patching_needs_no_transformers():
    code = (
        "import sys, torch, fastformer.patching as p; p.unpatch(p.patch(torch.nn.Linear(2, 2)).model);"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
