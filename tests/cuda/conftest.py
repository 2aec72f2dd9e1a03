import pytest
from torch.library import Library

from fastformer.backends import cuda
from tests.ptxvm import nvcc

from .emulated import Emulator
from .emulated_attention import AttentionEmulator
from .emulated_attention_backward import AttentionBackwardEmulator
from .emulated_feed_forward import FeedForwardEmulator


@pytest.fixture(scope="session", autouse=True)
def ptx_cache(request):
    nvcc.cache_folder = request.config.cache.mkdir("ptx")


@pytest.fixture
def serve(monkeypatch):
    """Lets the cuda backend serve CPU tensors by an emulator's raw operators of these names, on ptxvm."""
    monkeypatch.setattr(cuda, "why_not", lambda op, spec, tensors: None)
    library = Library("fastformer", "IMPL")

    def serve(running, *ops):
        for op in ops:
            library.impl(f"{op}_cuda", getattr(running, op), "CPU")
        return running

    yield serve
    library._destroy()


@pytest.fixture
def emulator(serve):
    return serve(Emulator(), "norm_fwd", "norm_bwd")


@pytest.fixture
def attention_emulator(serve):
    """Of attention's forward."""
    return serve(AttentionEmulator(), "attention_fwd", "paged_attention_fwd")


@pytest.fixture
def gradient_emulator(serve):
    """Of both directions of attention, and of its weights."""
    return serve(AttentionBackwardEmulator(), "attention_fwd", "attention_weights", "attention_bwd")


@pytest.fixture
def feed_forward_emulator(serve):
    """Of both directions of feed_forward."""
    return serve(FeedForwardEmulator(), "feed_forward_fwd", "feed_forward_bwd")
