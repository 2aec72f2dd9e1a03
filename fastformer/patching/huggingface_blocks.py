"""Fused forwards for the building blocks that transformers' BERT family shares.

Each class here is mixed in before a stock class: it reads the stock module's submodules and parameters by
their stock names, and owns no state. A block whose `obstacle` is not None runs the stock forward instead,
decided at every call, since hooks and adapters may come and go after patching.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers import activations

from fastformer.ops.feed_forward import feed_forward
from fastformer.ops.norm import add_norm, layer_norm
from fastformer.patching import huggingface_attention

# Below half of the dropout generator's resolution a probability would silently drop nothing.
SMALLEST_DROPOUT = 2.0**-17

# accelerate puts forwards on instances to move weights between devices.
OWN_FORWARD = "it has a forward of its own, which its class's forward would not reach"

ACTIVATIONS: dict[Any, str] = {
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.SiLUActivation: "silu",
    activations.ReLUSquaredActivation: "relu2",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    F.gelu: "gelu",
    F.relu: "relu",
    F.silu: "silu",
}


def activation_name(act: Any) -> str | None:
    """fastformer's name for an activation module or function; None if it has none."""
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate]
    return ACTIVATIONS.get(type(act) if isinstance(act, nn.Module) else act)


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module` before it was patched."""
    return getattr(type(module), "fastformer_stock", type(module))


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _unlike(child: Any, kind: Any, owner: type[nn.Module]) -> str | None:
    """Why `child` is not what a fused forward of `owner` takes it for; None if it is."""
    if kind == "activation":
        if activation_name(child) is None:
            return f"is {getattr(child, '__name__', type(child).__name__)}, which feed_forward does not have"
    elif kind == "container":
        if stock_class(child).__module__ != owner.__module__:
            return f"is {type(child).__module__}.{type(child).__qualname__}, not one of transformers' own"
    elif stock_class(child) is not kind:
        return f"is {type(child).__module__}.{type(child).__qualname__}, not exactly torch.nn.{kind.__name__}"
    elif kind is nn.Dropout:
        if 0 < child.p < SMALLEST_DROPOUT:
            return f"has p = {child.p}, finer than fastformer's dropout"
    elif hasattr(type(child._parameters.get("weight")), "__tensor_flatten__"):
        return f"has a {type(child.weight).__name__} as its weight"
    elif kind is nn.LayerNorm and len(child.normalized_shape) != 1:
        return "normalises more than the last dimension"
    if isinstance(child, nn.Module):
        if "forward" in child.__dict__:
            return "has a forward of its own, which a fused call would skip"
        if _hooked(child):
            return "has hooks, which a fused call would skip"
    return None


class FusedBlock:
    """Base of every class that a patched module gets.

    `runs` is for the report. `inside` names each submodule that the fused forward reads and does not call,
    with what it must be: exactly an nn class, an "activation" that feed_forward has, or a "container".
    """

    fastformer_stock: ClassVar[type[nn.Module]]
    runs: ClassVar[tuple[str, ...]]
    inside: ClassVar[dict[str, Any]] = {}
    # `inside` with its paths split: `obstacle` runs at every call.
    _inside: ClassVar[tuple[tuple[str, tuple[str, ...], Any], ...]] = ()

    if TYPE_CHECKING:
        # The stock class's part: it follows this one in every fused class.
        def forward(self, *args: Any, **kwargs: Any) -> Any: ...
        def feed_forward_chunk(self, *args: Any, **kwargs: Any) -> Any: ...
        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._inside = tuple((path, tuple(path.split(".")), kind) for path, kind in cls.inside.items())

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        """Why the fused forward would not do exactly what `module`'s stock forward does; None if it would."""
        if "forward" in module.__dict__:
            return OWN_FORWARD
        if _has_any_global_hook():
            return "global module hooks are registered, which a fused call would skip"
        for path, names, kind in cls._inside:
            child: Any = module
            for name in names:
                # Straight from the dict: nn.Module.__getattr__ takes several times as long.
                child = child._modules.get(name) or getattr(child, name, None)
            reason = "is missing" if child is None else _unlike(child, kind, stock_class(module))
            if reason:
                return f"its {path} {reason}"
        return None

    def _get_name(self) -> str:
        # For print(model). The class keeps its stock __name__, by which FSDP and accelerate find layers.
        return f"fastformer.{type(self).__name__}"


def _dropout_p(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _feed_forward(x: Tensor, first: nn.Linear, act: Any, second: nn.Linear) -> Tensor:
    activation = activation_name(act)
    assert activation is not None  # an obstacle else
    return feed_forward(x, first.weight, first.bias, second.weight, second.bias, activation=activation)


def _add_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout | None = None) -> Tensor:
    dropout_p = 0.0 if dropout is None else _dropout_p(dropout)
    return add_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=dropout_p)[0]


def _post_norm_feed_forward(intermediate: Any, output: Any, x: Tensor) -> Tensor:
    hidden = _feed_forward(x, intermediate.dense, intermediate.intermediate_act_fn, output.dense)
    return _add_norm(hidden, x, output.LayerNorm, output.dropout)


class LayerNorm(FusedBlock, nn.LayerNorm):
    """nn.LayerNorm over one or more last dimensions."""

    fastformer_stock = nn.LayerNorm
    runs = ("layer_norm",)

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return OWN_FORWARD if "forward" in module.__dict__ else None

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class PostNormOutput(FusedBlock):
    """LayerNorm(input_tensor + dropout(dense(hidden_states))): BertSelfOutput, BertOutput."""

    runs = ("add_norm",)
    inside: ClassVar = {"dropout": nn.Dropout, "LayerNorm": nn.LayerNorm}

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if self.obstacle(self):
            return super().forward(hidden_states, input_tensor)
        return _add_norm(self.dense(hidden_states), input_tensor, self.LayerNorm, self.dropout)


class PostNormLayer(FusedBlock):
    """The second half of BertLayer: intermediate and output, add-and-norm included, in two calls."""

    runs = ("feed_forward", "add_norm")
    inside: ClassVar = {
        "intermediate": "container",
        "intermediate.dense": nn.Linear,
        "intermediate.intermediate_act_fn": "activation",
        "output": "container",
        "output.dense": nn.Linear,
        "output.dropout": nn.Dropout,
        "output.LayerNorm": nn.LayerNorm,
    }

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        if self.obstacle(self):
            return super().feed_forward_chunk(attention_output)
        return _post_norm_feed_forward(self.intermediate, self.output, attention_output)


class UnchunkedBlock(FusedBlock):
    """A block whose fused forward does not split its input into chunks."""

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        for part in (module, getattr(module, "ffn", None)):
            if getattr(part, "chunk_size_feed_forward", 0):
                return "chunk_size_feed_forward is set"
        return super().obstacle(module)


class AlbertLayer(UnchunkedBlock):
    runs = ("feed_forward", "add_norm")
    inside: ClassVar = {
        "ffn": nn.Linear,
        "activation": "activation",
        "ffn_output": nn.Linear,
        "full_layer_layer_norm": nn.LayerNorm,
    }

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.obstacle(self):
            return super().forward(hidden_states, attention_mask, **kwargs)
        attention_output, _ = self.attention(hidden_states, attention_mask, **kwargs)
        hidden = _feed_forward(attention_output, self.ffn, self.activation, self.ffn_output)
        return _add_norm(hidden, attention_output, self.full_layer_layer_norm)


class AlbertAttention(FusedBlock):
    """Attention through the interface, with its output projection and add-and-norm in the same module."""

    runs = ("add_norm",)
    inside: ClassVar = {"output_dropout": nn.Dropout, "LayerNorm": nn.LayerNorm}

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if module.config._attn_implementation != huggingface_attention.NAME:
            return "its attention is not fastformer's"
        return super().obstacle(module)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.obstacle(self):
            return super().forward(hidden_states, attention_mask, **kwargs)
        heads = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (
            project(hidden_states).view(heads).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        out, weights = huggingface_attention.attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        out = self.dense(out.flatten(2))
        return _add_norm(out, hidden_states, self.LayerNorm, self.output_dropout), weights


class DistilBertBlock(UnchunkedBlock):
    """DistilBERT's TransformerBlock."""

    runs = ("add_norm", "feed_forward", "add_norm")
    inside: ClassVar = {
        "sa_layer_norm": nn.LayerNorm,
        "ffn": "container",
        "ffn.lin1": nn.Linear,
        "ffn.activation": "activation",
        "ffn.lin2": nn.Linear,
        "ffn.dropout": nn.Dropout,
        "output_layer_norm": nn.LayerNorm,
    }

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.obstacle(self):
            return super().forward(hidden_states, attention_mask, **kwargs)
        attention_output, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        attention_output = _add_norm(attention_output, hidden_states, self.sa_layer_norm)
        ffn = self.ffn
        hidden = _feed_forward(attention_output, ffn.lin1, ffn.activation, ffn.lin2)
        return _add_norm(hidden, attention_output, self.output_layer_norm, ffn.dropout)


class MPNetAttention(FusedBlock):
    """The add-and-norm of MPNetAttention; its scores stay MPNetSelfAttention's own."""

    runs = ("add_norm",)
    inside: ClassVar = {"dropout": nn.Dropout, "LayerNorm": nn.LayerNorm}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        if self.obstacle(self):
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)
        out, *weights = self.attn(
            hidden_states, attention_mask, position_bias, output_attentions=output_attentions
        )
        return _add_norm(out, hidden_states, self.LayerNorm, self.dropout), *weights


class MPNetLayer(FusedBlock):
    runs = ("feed_forward", "add_norm")
    inside: ClassVar = PostNormLayer.inside

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        if self.obstacle(self):
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)
        attention_output, *weights = self.attention(
            hidden_states, attention_mask, position_bias=position_bias, output_attentions=output_attentions
        )
        return _post_norm_feed_forward(self.intermediate, self.output, attention_output), *weights
