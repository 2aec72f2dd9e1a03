"""Swap fastformer's operators into a model that already exists, and take them out again."""

from __future__ import annotations

import sys

from torch import nn

from fastformer.patching.report import Left, PatchReport, Replaced

__all__ = ["Left", "PatchReport", "Replaced", "patch", "unpatch"]


def patch(model: nn.Module) -> PatchReport:
    """Make `model` run fastformer's operators wherever the tables know how; it is changed in place.

    Every module of `model` is looked at, so the model may be a Hugging Face one, hold some (as a
    sentence-transformers model does), or hold none: then the report says so. Parameters, their names,
    buffers, hooks and the modules' `isinstance` relations stay as they are, so `state_dict`,
    `save_pretrained`, optimizers and checkpoints do not notice. Known today: the BERT family in
    transformers 5 (see `fastformer.patching.huggingface`). Inference and training, dropout included.

    A module that cannot be served exactly is left as it was, with its reason in the report: one whose inner
    modules were exchanged (LoRA, quantised linears) or carry hooks, or one with an activation that
    fastformer lacks. What comes after patching is noticed too: such a module then runs its stock forward.

    transformers keeps the choice of attention in a model's config: other models built from the same config
    *object* follow it.

    Patching twice is the same as patching once. Returns a PatchReport.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    replaced: list[Replaced] = []
    left: list[Left] = []
    if _may_hold_huggingface_models():
        from fastformer.patching import huggingface

        huggingface.patch(model, replaced, left)
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    return PatchReport(
        model,
        tuple(sorted(replaced, key=lambda item: order[item.path])),
        tuple(sorted(left, key=lambda item: order[item.path])),
    )


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`: classes and attention choice as they were, in place; returns `model`.

    Works on copies and on unpickled models too. A model that was not patched stays as it is.
    """
    if _may_hold_huggingface_models():
        from fastformer.patching import huggingface

        huggingface.unpatch(model)
    return model


def _may_hold_huggingface_models() -> bool:
    # A model of theirs cannot exist before this module does, and importing it takes seconds.
    return "transformers.modeling_utils" in sys.modules
