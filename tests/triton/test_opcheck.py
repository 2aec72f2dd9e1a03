"""The _triton operators as torch sees them, without their kernels: what launchers allocate is what the fakes
say, on fake CUDA tensors too. With their kernels tests/ops/test_opcheck.py checks them, interpreted."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from tests.ops.operators import as_tuple
from tests.ops.test_opcheck import CALLS

from .offline import catch_launches

# test_aot_dispatch_dynamic compares values, and nothing writes them here.
WITHOUT_VALUES = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.fixture(params=["sm_80", "sm_90"])
def launches(request, monkeypatch):
    """What is launched, in place of running it."""
    caught = []
    catch_launches(monkeypatch, request.param, caught.append)
    return caught


def operator(op):
    return getattr(torch.ops.fastformer, f"{op}_triton").default


@pytest.mark.parametrize("op", CALLS)
def test_opcheck(launches, op):
    for arguments in CALLS[op](op, "triton"):
        launches.clear()
        torch.library.opcheck(operator(op), arguments, test_utils=WITHOUT_VALUES)
        assert launches


def on_cuda(argument):
    if not isinstance(argument, torch.Tensor):
        return argument
    return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="cuda")


@pytest.mark.parametrize("op", CALLS)
def test_fake_cuda_tensors(launches, op):
    facts = lambda outputs: [(t.shape, t.stride(), t.dtype) for t in as_tuple(outputs)]
    for arguments in CALLS[op](op, "triton"):
        wanted = facts(operator(op)(*arguments))
        launches.clear()
        with FakeTensorMode():
            outputs = operator(op)(*map(on_cuda, arguments))
        assert facts(outputs) == wanted
        assert all(t.device.type == "cuda" for t in as_tuple(outputs))
        assert not launches
