"""A pytest plugin (`-p tests.ops.gpu_plugin --gpu-backend NAME`): what the tests judge runs on a GPU.

Every call that they make of a backend other than the reference is made with its tensors on the device, as the
user's choice of backend ("auto") or by one that is named, which may refuse a call: the test is then skipped.
Baselines and oracles stay on the CPU, so that the rule is the same one everywhere.
"""

from __future__ import annotations

import pytest
import torch

import fastformer
from fastformer.testing import outputs_and_gradients

from . import judging


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-backend", default="auto", help="auto, triton or cuda")
    parser.addoption("--gpu-device", default="cuda")


def pytest_configure(config: pytest.Config) -> None:
    backend, device = (config.getoption(name) for name in ("--gpu-backend", "--gpu-device"))
    judging.BACKENDS = (None,)
    judging.outputs_and_gradients = on_device(device, None if backend == "auto" else backend)


def on_device(device, named):
    """`outputs_and_gradients` that makes calls of fast backends on `device`, and answers on the CPU."""

    def run(fn, **arguments):
        if "backend" not in arguments or arguments["backend"] == "reference":
            return outputs_and_gradients(fn, **arguments)
        there: dict[int, torch.Tensor] = {}  # what is given twice stays one tensor

        def on_the_device(value):
            if isinstance(value, (tuple, list)):
                return type(value)(map(on_the_device, value))
            if isinstance(value, torch.Tensor):
                return there.setdefault(id(value), moved(value, device))
            return value

        arguments = {name: on_the_device(value) for name, value in arguments.items()}
        try:
            results = outputs_and_gradients(fn, **(arguments | {"backend": named}))
        except fastformer.BackendError as refusal:
            if named is None:
                raise
            pytest.skip(str(refusal))
        return {name: result.cpu() for name, result in results.items()}

    return run


def moved(tensor, device):
    """A copy on `device` with the same strides, the same offset, and all that lies around it in memory."""
    if tensor.is_nested:
        return tensor.detach().to(device).requires_grad_(tensor.requires_grad)
    storage = tensor.untyped_storage()
    whole = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.itemsize,), (1,))
    copy = whole.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return copy.requires_grad_(tensor.requires_grad)
