import os

import pytest
import torch

# Read when transformers is imported: nothing here may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny models lose more to a thread pool than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
