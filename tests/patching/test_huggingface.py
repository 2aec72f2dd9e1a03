import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from transformers import AutoModel, BertLMHeadModel

from fastformer.patching import huggingface, huggingface_attention, huggingface_blocks, patch, unpatch
from fastformer.testing import assert_as_accurate
from tests.patching.tiny_models import (
    ARCHITECTURES,
    BERT_LIKE,
    LAYERS,
    WIDTH,
    outputs,
    ragged_inputs,
    shaken,
    stock_copies,
    tiny_config,
    tiny_model,
)

# One of each way in which the blocks are built.
STRUCTURES = ("bert", "albert", "distilbert", "mpnet")


def expected_report(architecture: str) -> tuple[set, set]:
    """(path, what runs there) of everything replaced, and the paths of everything left."""
    now, left = {("embeddings.LayerNorm", "layer_norm")}, set()
    if architecture in BERT_LIKE:
        for layer in (f"encoder.layer.{index}" for index in range(LAYERS)):
            now.add((f"{layer}.attention.self", "attention"))
            now.add((f"{layer}.attention.output", "add_norm"))
            now.add((layer, "feed_forward + add_norm"))
    elif architecture == "albert":
        layer = "encoder.albert_layer_groups.0.albert_layers.0"
        now |= {(f"{layer}.attention", "attention"), (f"{layer}.attention", "add_norm")}
        now.add((layer, "feed_forward + add_norm"))
    elif architecture == "distilbert":
        for layer in (f"transformer.layer.{index}" for index in range(LAYERS)):
            now |= {(f"{layer}.attention", "attention"), (layer, "add_norm + feed_forward + add_norm")}
    elif architecture == "mpnet":
        for layer in (f"encoder.layer.{index}" for index in range(LAYERS)):
            now |= {(f"{layer}.attention", "add_norm"), (layer, "feed_forward + add_norm")}
            left.add(f"{layer}.attention.attn")
    return now, left


def replaced_paths(report) -> set:
    return {(item.path, " + ".join(item.runs)) for item in report.replaced}


def everything_about(model: nn.Module) -> dict:
    """What unpatch must give back."""
    return {
        "classes": [(path, type(module)) for path, module in model.named_modules()],
        "attributes": [(path, sorted(module.__dict__)) for path, module in model.named_modules()],
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_of_ragged_batches_stay_accurate(architecture):
    model = tiny_model(architecture)
    stock, oracle = stock_copies(model)
    assert patch(model).model is model
    for inputs in (ragged_inputs(), ragged_inputs((5, 5)), {"input_ids": ragged_inputs()["input_ids"]}):
        assert_as_accurate(*(outputs(m, inputs) for m in (model, stock, oracle)), architecture)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("architecture", STRUCTURES)
def test_outputs_in_16_bits_stay_accurate(architecture, dtype):
    model = tiny_model(architecture).to(dtype)
    stock, oracle = stock_copies(model)
    patch(model)
    inputs = ragged_inputs()
    assert_as_accurate(*(outputs(m, inputs) for m in (model, stock, oracle)), architecture)


def test_outputs_under_autocast_stay_accurate():
    model = tiny_model("bert")
    stock, oracle = stock_copies(model)
    patch(model)
    inputs = ragged_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        actual, baseline = outputs(model, inputs), outputs(stock, inputs)
    assert_as_accurate(actual, baseline, outputs(oracle, inputs))


@pytest.mark.parametrize(
    "activation", ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "relu2")
)
def test_every_activation_of_feed_forward_is_recognised(activation):
    model = tiny_model("bert", hidden_act=activation)
    stock, oracle = stock_copies(model)
    assert not patch(model).left
    inputs = ragged_inputs()
    assert_as_accurate(*(outputs(m, inputs) for m in (model, stock, oracle)), activation)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_report_names_every_module(architecture):
    report = patch(tiny_model(architecture))
    now, left = expected_report(architecture)
    assert replaced_paths(report) == now
    assert {item.path for item in report.left} == left
    assert len(str(report).splitlines()) <= 8


@pytest.mark.parametrize("architecture", STRUCTURES)
def test_what_the_report_says_is_what_runs(architecture, monkeypatch):
    ran = Counter()

    def counted(module, name):
        operator = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kw: ran.update([name]) or operator(*args, **kw))

    counted(huggingface_attention, "attention")
    for name in ("add_norm", "feed_forward", "layer_norm"):
        counted(huggingface_blocks, name)
    model = tiny_model(architecture)
    report = patch(model)
    outputs(model, ragged_inputs())
    reported = Counter(run for item in report.replaced for run in item.runs)
    # ALBERT's one layer runs once for each of its layers.
    times = LAYERS if architecture == "albert" else 1
    assert ran == Counter(
        {name: count * (1 if name == "layer_norm" else times) for name, count in reported.items()}
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unpatch_restores_everything(architecture):
    model = tiny_model(architecture)
    inputs = ragged_inputs()
    before, values = everything_about(model), outputs(model, inputs)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())

    patch(model)
    assert model.state_dict().keys() == state.keys()
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert everything_about(model)["classes"] != before["classes"]
    outputs(model, inputs)

    assert unpatch(model) is model
    assert everything_about(model) == before
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    torch.testing.assert_close(outputs(model, inputs), values, rtol=0, atol=0)


def test_patching_twice_is_patching_once():
    model = tiny_model("albert")
    before = everything_about(model)
    first = patch(model)
    classes = everything_about(model)
    second = patch(model)
    assert (first.replaced, first.left) == (second.replaced, second.left)
    assert everything_about(model) == classes
    unpatch(model)
    assert everything_about(model) == before
    assert everything_about(unpatch(model)) == before


def test_eager_attention_comes_back_after_unpatch():
    model = tiny_model("bert", attn_implementation="eager")
    patch(model)
    assert model.config._attn_implementation == huggingface_attention.NAME
    assert unpatch(model).config._attn_implementation == "eager"


def with_dropout(architecture: str, p: float) -> dict:
    if architecture == "distilbert":
        return {"dropout": p, "attention_dropout": p}
    return {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}


def trained(model: nn.Module, steps: int = 3) -> dict:
    inputs, target = ragged_inputs(), torch.linspace(-1, 1, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    losses = []
    for _ in range(steps):
        hidden = model(**inputs).last_hidden_state
        loss = ((hidden - target.to(hidden)) ** 2 * inputs["attention_mask"][..., None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **dict(model.named_parameters())}


@pytest.mark.parametrize("architecture", STRUCTURES)
def test_three_training_steps_stay_accurate(architecture):
    model = tiny_model(architecture, **with_dropout(architecture, 0.0))
    stock, oracle = stock_copies(model)
    patch(model)
    assert_as_accurate(*map(trained, (model, stock, oracle)), architecture)


@pytest.mark.parametrize("architecture", STRUCTURES)
def test_dropout_is_drawn_from_torchs_generator(architecture):
    model = tiny_model(architecture, **with_dropout(architecture, 0.1))
    patch(model)
    inputs = ragged_inputs()

    def run(seed):
        torch.manual_seed(seed)
        return outputs(model, inputs)["last_hidden_state"]

    still = run(0)
    assert torch.equal(still, run(1))
    model.train()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert not torch.equal(run(0), still)


@pytest.mark.parametrize("where", ("hidden", "attention"))
def test_each_dropout_is_applied(where):
    probabilities = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    probabilities["hidden_dropout_prob" if where == "hidden" else "attention_probs_dropout_prob"] = 0.5
    model = tiny_model("bert", **probabilities)
    patch(model)
    # The embeddings' own dropout is stock.
    model.train().embeddings.eval()
    first, second = (outputs(model, ragged_inputs())["last_hidden_state"] for _ in range(2))
    assert not torch.equal(first, second)


def test_gradient_checkpointing_repeats_the_same_dropout():
    model = tiny_model("bert").train()
    patch(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(3)
        model(**ragged_inputs()).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", STRUCTURES)
def test_attention_weights_and_hidden_states_on_request(architecture):
    model = tiny_model(architecture, attn_implementation="eager")
    stock, oracle = stock_copies(model)
    patch(model)
    inputs = ragged_inputs()
    options = {"output_attentions": True, "output_hidden_states": True}
    results = [outputs(m, inputs, **options) for m in (model, stock, oracle)]
    assert len(results[0]["attentions"]) == LAYERS
    assert len(results[0]["hidden_states"]) == LAYERS + 1
    assert_as_accurate(*results, architecture)


def test_copies_and_pickles_stay_patched_and_can_be_unpatched():
    model = tiny_model("distilbert")
    inputs = ragged_inputs()
    stock = outputs(model, inputs)
    patch(model)
    expected = outputs(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        torch.testing.assert_close(outputs(twin, inputs), expected, rtol=0, atol=0)
        torch.testing.assert_close(outputs(unpatch(twin), inputs), stock, rtol=0, atol=0)
    assert model.config._attn_implementation == huggingface_attention.NAME


@pytest.mark.parametrize("dotted", sorted(huggingface.BLOCKS))
def test_every_fused_class_can_be_imported_by_name(dotted):
    # Unpickling in a fresh process starts here.
    fused = getattr(huggingface, huggingface._fused_name(dotted))
    stock = fused.fastformer_stock
    assert f"{stock.__module__}.{stock.__qualname__}" == dotted
    assert pickle.loads(pickle.dumps(fused)) is fused
    assert issubclass(fused, stock) and fused.__name__ == stock.__name__


def test_saved_model_is_a_stock_model(tmp_path):
    model = tiny_model("roberta")
    inputs = ragged_inputs()
    expected = outputs(model, inputs)
    patch(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(outputs(loaded, inputs), expected, rtol=0, atol=0)
    assert "fastformer" not in (tmp_path / "config.json").read_text()


def test_compiled_model_gives_the_same():
    model = tiny_model("bert")
    stock, oracle = stock_copies(model)
    patch(model)
    inputs = ragged_inputs()
    compiled = torch.compile(model, backend="aot_eager")
    assert_as_accurate(outputs(compiled, inputs), outputs(stock, inputs), outputs(oracle, inputs))


def test_decoder_with_cache_and_cross_attention():
    config = tiny_config("bert", is_decoder=True, add_cross_attention=True)
    model = shaken(BertLMHeadModel(config))
    stock, oracle = stock_copies(model)
    report = patch(model)
    assert {item.path for item in report.replaced if item.runs == ("attention",)} == {
        f"bert.encoder.layer.{index}.{kind}.self"
        for index in range(LAYERS)
        for kind in ("attention", "crossattention")
    }
    inputs = ragged_inputs()
    source = torch.randn(4, 9, WIDTH, generator=torch.Generator().manual_seed(1))
    source_mask = (torch.arange(9) < torch.tensor([9, 2, 5, 7])[:, None]).long()

    @torch.no_grad()
    def decode(m):
        given = {"encoder_hidden_states": source.to(m.dtype), "encoder_attention_mask": source_mask}
        first = m(**inputs, **given, use_cache=True)
        logits, past = [first.logits], first.past_key_values
        mask = inputs["attention_mask"]
        for token in (7, 8, 9):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            step = m(input_ids=torch.full((4, 1), token), attention_mask=mask, past_key_values=past, **given)
            logits.append(step.logits)
        return [*logits, m(inputs["input_ids"], **given).logits]

    assert_as_accurate(*map(decode, (model, stock, oracle)))


def test_model_inside_other_modules():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = nn.ModuleList([tiny_model("bert"), tiny_model("distilbert")])
            self.head = nn.LayerNorm(WIDTH)

        def forward(self, inputs):
            return self.head(sum(tower(**inputs).last_hidden_state for tower in self.towers))

    model = Wrapper()
    stock, oracle = stock_copies(model)
    report = patch(model)
    assert replaced_paths(report) == {
        (f"towers.{index}.{path}", runs)
        for index, name in enumerate(("bert", "distilbert"))
        for path, runs in expected_report(name)[0]
    }
    inputs = ragged_inputs()
    assert_as_accurate(model(inputs), stock(inputs), oracle(inputs))
    unpatch(model.towers[0])
    assert model.towers[0].config._attn_implementation == "sdpa"
    assert model.towers[1].config._attn_implementation == huggingface_attention.NAME
