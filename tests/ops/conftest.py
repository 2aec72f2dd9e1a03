"""One thread: the calls are tiny, and threads that wait for each other would take most of the time.

test_determinism and test_dropout ask for more, and that these change no bit.
"""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
