"""Every test here runs at every ISA level that was built and that the machine has, on one thread."""

from __future__ import annotations

import pytest
import torch

from fastformer.backends import cpu

LEVELS = ["none"]
if cpu.ready() is None:
    from fastformer import _C

    LEVELS = _C.build_info()["isa_levels"]


@pytest.fixture(params=LEVELS, autouse=True)
def isa(request):
    best = _C.isa()
    if not _C.set_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(threads)
    _C.set_isa(best)
