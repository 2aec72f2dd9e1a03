import pytest
from torch.library import Library

from fastformer.backends import cuda
from tests.ptxvm import nvcc

from .emulated import Emulator
from .emulated_attention import AttentionEmulator
from .emulated_attention_backward import AttentionBackwardEmulator


@pytest.fixture(scope="session", autouse=True)
def ptx_cache(request):
    nvcc.cache_folder = request.config.cache.mkdir("ptx")


@pytest.fixture
def emulator(monkeypatch):
    """The cuda backend serves CPU tensors, by way of its raw operators and ptxvm."""
    running = Emulator()
    library = Library("fastformer", "IMPL")
    library.impl("norm_fwd_cuda", running.norm_fwd, "CPU")
    library.impl("norm_bwd_cuda", running.norm_bwd, "CPU")
    monkeypatch.setattr(cuda, "why_not", lambda op, spec, tensors: None)
    yield running
    library._destroy()


@pytest.fixture
def attention_emulator(monkeypatch):
    """The same for attention's forward, of which the cuda backend asks for 16-bit types."""
    running = AttentionEmulator()
    library = Library("fastformer", "IMPL")
    library.impl("attention_fwd_cuda", running.attention_fwd, "CPU")
    monkeypatch.setattr(cuda, "why_not", lambda op, spec, tensors: None)
    yield running
    library._destroy()


@pytest.fixture
def gradient_emulator(monkeypatch):
    """The same for both directions of attention."""
    running = AttentionBackwardEmulator()
    library = Library("fastformer", "IMPL")
    library.impl("attention_fwd_cuda", running.attention_fwd, "CPU")
    library.impl("attention_bwd_cuda", running.attention_bwd, "CPU")
    monkeypatch.setattr(cuda, "why_not", lambda op, spec, tensors: None)
    yield running
    library._destroy()
