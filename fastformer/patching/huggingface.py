"""Which modules of transformers' BERT family run what, and how they are switched over and back.

Attention goes through transformers' own attention interface, chosen in the model's config. Feed-forward,
add-and-norm and LayerNorm are swapped by giving a module a subclass of its class (`fused_class`): parameters,
buffers, hooks and names are the module's own and stay. The subclasses are attributes of this module, so that
patched models can be pickled and copied.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from fastformer.patching import huggingface_attention
from fastformer.patching import huggingface_blocks as blocks
from fastformer.patching.report import Left, Replaced

# The tables follow the forwards of this major version.
TRANSFORMERS_MAJOR = 5

# Package (and modelling file, where it is named otherwise) -> prefix of its classes, all copies of BERT's.
BERT_COPIES = {
    "bert": "Bert",
    "bert_generation": "BertGeneration",
    "camembert": "Camembert",
    "data2vec.modeling_data2vec_text": "Data2VecText",
    "electra": "Electra",
    "ernie": "Ernie",
    "layoutlm": "LayoutLM",
    "markuplm": "MarkupLM",
    "roberta": "Roberta",
    "roc_bert": "RoCBert",
    "splinter": "Splinter",
    "xlm_roberta": "XLMRoberta",
}


def _modelling(package: str) -> str:
    file = "" if "." in package else f".modeling_{package}"
    return f"transformers.models.{package}{file}"


# Stock class -> the fused forward mixed in before it.
BLOCKS: dict[str, type[blocks.FusedBlock]] = {
    f"{_modelling('albert')}.AlbertAttention": blocks.AlbertAttention,
    f"{_modelling('albert')}.AlbertLayer": blocks.AlbertLayer,
    f"{_modelling('distilbert')}.TransformerBlock": blocks.DistilBertBlock,
    f"{_modelling('mpnet')}.MPNetAttention": blocks.MPNetAttention,
    f"{_modelling('mpnet')}.MPNetLayer": blocks.MPNetLayer,
    f"{_modelling('mpnet')}.MPNetOutput": blocks.PostNormOutput,
}
# Attention classes that ask transformers' attention interface.
ATTENTION = {
    f"{_modelling('albert')}.AlbertAttention",
    f"{_modelling('distilbert')}.DistilBertSelfAttention",
}
for _package, _prefix in BERT_COPIES.items():
    BLOCKS[f"{_modelling(_package)}.{_prefix}SelfOutput"] = blocks.PostNormOutput
    BLOCKS[f"{_modelling(_package)}.{_prefix}Output"] = blocks.PostNormOutput
    BLOCKS[f"{_modelling(_package)}.{_prefix}Layer"] = blocks.PostNormLayer
    ATTENTION |= {f"{_modelling(_package)}.{_prefix}{kind}Attention" for kind in ("Self", "Cross")}

# Attention classes of these models that compute their scores by themselves.
OWN_SCORES = {f"{_modelling('mpnet')}.MPNetSelfAttention"}

PACKAGES = {name.split(".")[2] for name in BLOCKS}

# On each model whose config was switched: the attention implementation it had.
STOCK_ATTENTION = "_fastformer_stock_attention"


def patch(root: nn.Module, replaced: list[Replaced], left: list[Left]) -> None:
    """Switch every Hugging Face model inside `root`; append to the lists what was done and what was not."""
    models = [(path, module) for path, module in root.named_modules() if isinstance(module, PreTrainedModel)]
    if int(transformers.__version__.split(".")[0]) != TRANSFORMERS_MAJOR:
        reason = f"the tables follow transformers {TRANSFORMERS_MAJOR}, not {transformers.__version__}"
        left += [Left(path, type(module).__name__, reason) for path, module in _outermost(models)]
        return
    _switch_attention(root, models, replaced, left)
    taken = _fuse_blocks(root, replaced, left)
    _fuse_layer_norms(root, models, taken, replaced, left)

    known = {item.path for item in replaced} | {item.path for item in left}
    unknown = [
        (path, module)
        for path, module in models
        if not any(inner == path or inner.startswith(f"{path}." if path else "") for inner in known)
    ]
    left += [
        Left(path, type(module).__name__, f"there is no table for {module.config.model_type!r} models")
        for path, module in _outermost(unknown)
    ]


def unpatch(root: nn.Module) -> None:
    """Give every module inside `root` its stock class, and every config its attention implementation back."""
    for module in root.modules():
        _set_class(module, blocks.stock_class(module))
        _restore_attention(module)


def _restore_attention(model: Any) -> None:
    if STOCK_ATTENTION in model.__dict__:
        stock = model.__dict__.pop(STOCK_ATTENTION)
        if model.config._attn_implementation == huggingface_attention.NAME:
            model.config._attn_implementation = stock


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if type(module) is not cls:
        module.__class__ = cls


def _outermost(models: list[tuple[str, PreTrainedModel]]) -> Iterator[tuple[str, PreTrainedModel]]:
    for path, module in models:
        if not any(path != other and path.startswith(f"{other}." if other else "") for other, _ in models):
            yield path, module


def _switch_attention(
    root: nn.Module, models: list[tuple[str, PreTrainedModel]], replaced: list[Replaced], left: list[Left]
) -> None:
    # One config selects the attention of every module that holds it, so they go together or not at all.
    by_config: dict[int, list[tuple[str, Any]]] = {}
    module: Any
    for path, module in root.named_modules():
        stock = blocks.stock_class(module)
        if _dotted(stock) in ATTENTION:
            by_config.setdefault(id(module.config), []).append((path, module))
        elif _dotted(stock) in OWN_SCORES:
            own = "it computes its scores by itself, not through transformers' attention interface"
            left.append(Left(path, stock.__name__, own))
    for attentions in by_config.values():
        config = attentions[0][1].config
        sharing = [(path, module) for path, module in models if module.config is config]
        reason = _attention_obstacle(root, attentions, sharing)
        for path, module in attentions:
            name = blocks.stock_class(module).__name__
            if reason is not None:
                left.append(Left(path, name, reason))
            else:
                replaced.append(Replaced(path, name, ("attention",)))
        if reason is not None:
            for _, model in sharing:
                _restore_attention(model)
        elif config._attn_implementation != huggingface_attention.NAME:
            for _, model in sharing:
                model.__dict__[STOCK_ATTENTION] = config._attn_implementation
            # The innermost: set_attn_implementation changes the configs of all models within it as well.
            sharing[-1][1].set_attn_implementation(huggingface_attention.NAME)


def _attention_obstacle(
    root: nn.Module, attentions: list[tuple[str, nn.Module]], sharing: list[tuple[str, PreTrainedModel]]
) -> str | None:
    if not sharing:
        return "no model around it has its config, which selects the attention and makes its masks"
    config = sharing[-1][1].config
    if not sharing[-1][1]._can_set_attn_implementation():
        return f"{type(sharing[-1][1]).__name__} does not let its attention implementation be set"
    if config.output_attentions:
        return "config.output_attentions is set, which transformers allows with eager attention only"
    known = {id(module) for _, module in attentions}
    for path, module in root.named_modules():
        if getattr(module, "config", None) is not config or id(module) in known:
            continue
        stock = blocks.stock_class(module)
        if "Attention" in stock.__name__ or any(_dotted(base) in ATTENTION for base in stock.__mro__):
            return f"its config also selects the attention of {path} [{stock.__name__}], which has no table"
    return None


def _fuse_blocks(root: nn.Module, replaced: list[Replaced], left: list[Left]) -> set[int]:
    """Give modules in the table their fused class; return the ids of all that those take over inside."""
    taken: set[int] = set()
    for path, module in root.named_modules():
        stock: Any = blocks.stock_class(module)
        if _dotted(stock) not in BLOCKS:
            known = [
                base for base in stock.__mro__[1:] if _dotted(base) in BLOCKS or _dotted(base) in ATTENTION
            ]
            if known:
                left.append(Left(path, stock.__name__, f"only {known[0].__name__} itself is in the table"))
            continue
        block = BLOCKS[_dotted(stock)]
        reason = None if id(module) in taken else block.obstacle(module)
        if id(module) in taken or reason:
            # Its class may be fused from an earlier call, when things were otherwise.
            _set_class(module, stock)
            left += [Left(path, stock.__name__, reason)] if reason else []
            continue
        _set_class(module, fused_class(stock))
        inside = {name: child for name, child in module.named_modules() if name in block.inside}
        taken.update(map(id, inside.values()))
        replaced.append(Replaced(path, stock.__name__, block.runs, tuple(inside)))
    return taken


def _fuse_layer_norms(
    root: nn.Module,
    models: list[tuple[str, PreTrainedModel]],
    taken: set[int],
    replaced: list[Replaced],
    left: list[Left],
) -> None:
    """Replace what nn.LayerNorms the models of the family hold beside those `taken`."""
    family = [module for _, module in models if _package_of(type(module)) in PACKAGES]
    within = {id(child) for module in family for child in module.modules()}
    for path, module in root.named_modules():
        if id(module) not in within or blocks.stock_class(module) is not nn.LayerNorm:
            continue
        reason = blocks.LayerNorm.obstacle(module)
        free = id(module) not in taken and reason is None
        _set_class(module, blocks.LayerNorm if free else nn.LayerNorm)
        if free:
            replaced.append(Replaced(path, "LayerNorm", blocks.LayerNorm.runs))
        elif reason is not None:
            left.append(Left(path, "LayerNorm", reason))


def _package_of(model: type) -> str | None:
    """The package of transformers.models that `model`, or the class it derives from, is defined in."""
    for cls in model.__mro__:
        if cls.__module__.startswith("transformers.models."):
            return cls.__module__.split(".")[2]
    return None


@functools.cache
def fused_class(stock: Any) -> Any:
    """The subclass of `stock` that runs fastformer's operators; one for each class in BLOCKS."""
    name = _fused_name(_dotted(stock))
    body = {"__module__": __name__, "__qualname__": name, "__doc__": stock.__doc__, "fastformer_stock": stock}
    return type(stock.__name__, (BLOCKS[_dotted(stock)], stock), body)


def _fused_name(dotted: str) -> str:
    parts = dotted.split(".")
    return f"{parts[2]}_{parts[-1]}"


_FUSED_NAMES = {_fused_name(dotted): dotted for dotted in BLOCKS}


def __getattr__(name: str) -> type[nn.Module]:
    # Unpickling looks fused classes up here, before anything was patched in its process.
    if name not in _FUSED_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, stock = _FUSED_NAMES[name].rpartition(".")
    return fused_class(getattr(importlib.import_module(module), stock))
