"""Fused Transformer kernels for PyTorch: masked attention, add-and-norm and feed-forward, on every device."""

from .dispatch import Explanation, explain, use_backend
from .errors import BackendError
from .ops.attention import attention, scaled_dot_product_attention
from .ops.feed_forward import feed_forward
from .ops.norm import add_norm, layer_norm, rms_norm
from .ops.paged_attention import paged_attention
from .patching import patch, unpatch

__all__ = [
    "BackendError",
    "Explanation",
    "add_norm",
    "attention",
    "explain",
    "feed_forward",
    "layer_norm",
    "paged_attention",
    "patch",
    "rms_norm",
    "scaled_dot_product_attention",
    "unpatch",
    "use_backend",
]
__version__ = "0.1.0"
