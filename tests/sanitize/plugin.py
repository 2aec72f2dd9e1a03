"""What pytest does in a run under a sanitizer; run.py loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--sanitize-folder", type=Path, help="build/sanitize/<sanitizer> of this run")


def pytest_configure(config):
    from fastformer import _C

    folder = config.getoption("--sanitize-folder")
    if not Path(_C.__file__).is_relative_to(folder):
        raise pytest.UsageError(f"the sanitised extension must be tested, and {_C.__file__} was loaded")
    if folder.name == "thread":
        never_on_one_thread()
    config.pluginmanager.register(CurrentTest(folder / "current-test"))


def never_on_one_thread():
    """Tests ask for one thread because their calls are small; on one thread there is no race to find."""
    set_num_threads = torch.set_num_threads
    torch.set_num_threads = lambda count: set_num_threads(max(count, 2))
    torch.set_num_threads(2)


class CurrentTest:
    """A report ends the process, and run.py tells by this file which test it was."""

    def __init__(self, path: Path):
        self.path = path
        path.write_text("no test: nothing had begun")

    def pytest_runtest_logstart(self, nodeid):
        self.path.write_text(nodeid)
