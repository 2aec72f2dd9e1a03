"""Small random models of every architecture in the tables, and inputs for them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

LAYERS = 2
WIDTH = 32
VOCABULARY = 96

BERT_LIKE = (
    "bert",
    "bert-generation",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "layoutlm",
    "markuplm",
    "roberta",
    "roc_bert",
    "splinter",
    "xlm-roberta",
)
ARCHITECTURES = (*BERT_LIKE, "albert", "distilbert", "mpnet")

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_OF_ITS_OWN = {
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": WIDTH,
        "hidden_dim": 56,
        "n_layers": LAYERS,
        "n_heads": 4,
    },
    "albert": {**_SIZES, "embedding_size": 16, "hidden_act": "gelu_new"},
    "electra": {**_SIZES, "embedding_size": 16},
    "markuplm": {**_SIZES, "max_depth": 4},
    "roc_bert": {
        **_SIZES,
        "shape_vocab_size": 8,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": 8,
        "pronunciation_embed_dim": 8,
    },
}


def tiny_config(architecture: str, **options):
    return AutoConfig.for_model(architecture, **{**_OF_ITS_OWN.get(architecture, _SIZES), **options})


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode with parameters large enough to matter, LayerNorm's too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tiny_model(architecture: str, **options) -> PreTrainedModel:
    return shaken(AutoModel.from_config(tiny_config(architecture, **options)))


def stock_copies(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Two copies of an unpatched model: one as it is, and the float64 oracle."""
    return copy.deepcopy(model), copy.deepcopy(model).double()


def ragged_inputs(lengths: tuple[int, ...] = (11, 1, 6, 19)) -> dict[str, Tensor]:
    """Token ids [B, N] and the padding mask of sequences of these lengths."""
    generator = torch.Generator().manual_seed(7)
    size = (len(lengths), max(lengths))
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, VOCABULARY, size, generator=generator)
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def outputs(model: nn.Module, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    with torch.no_grad():
        result = model(**inputs, **options)
    return {name: value for name, value in result.items() if value is not None}
