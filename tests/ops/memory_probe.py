"""Bytes that calls need at their peak, beyond what stood before them, in a process of their own.

`python -m tests.ops.memory_probe cpu '[["causal", 4096], ["dropout", 4096]]'` prints a list of them.

The peak of the resident set counts what every allocator in the process takes, scratch of kernels and of
libraries too, which torch's own counters do not see. It counts pages, and a few hundred kilobytes come and go
by themselves: a call should need megabytes.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import torch

import fastformer

SELF = Path("/proc/self")
B, H, D = 1, 16, 16
E, F = 64, 4096


def status_bytes(name):
    lines = (SELF / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def attention_call(name, length):
    query, key, value = (torch.randn(B, H, length, D, requires_grad=True) for _ in range(3))
    more = {
        "plain": dict,
        "causal": lambda: {"causal": True},
        "key bias": lambda: {"bias": torch.randn(1, 1, 1, length, requires_grad=True)},
        "row bias": lambda: {"bias": torch.randn(1, H, length, 1, requires_grad=True)},
        "relative bias": lambda: {"relative_bias": torch.randn(H, 2 * length - 1, requires_grad=True)},
        "dropout": lambda: {"dropout_p": 0.1, "seed": 3},
        "padding": lambda: {"key_padding_mask": torch.rand(B, length) < 0.7},
        "window": lambda: {"window": (100, 100)},
        "softcap and sink": lambda: {"softcap": 5.0, "sink": torch.randn(H, requires_grad=True)},
        "lse": lambda: {"return_lse": True},
    }[name]()
    return fastformer.attention, {"query": query, "key": key, "value": value} | more


def feed_forward_call(name, length):
    """`length` rows; the hidden ones are F wide, so that the weights' share is small beside them."""
    draw = lambda *shape: (torch.randn(shape) * 0.02).requires_grad_()
    arguments = {"x": draw(length, E), "w1": draw(F, E), "b1": None, "w2": draw(E, F), "b2": None}
    if "swiglu" in name:
        arguments |= {"w_gate": draw(F, E), "activation": "swiglu"}
    return fastformer.feed_forward, arguments | {"recompute": "recompute" in name}


def run(fn, arguments, backend):
    result = fn(**arguments, backend=backend)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])


def peak_bytes(backend, call, length):
    make = feed_forward_call if call.startswith("feed_forward") else attention_call
    # The first call loads code, starts threads and sets up what is never given back.
    run(*make(call, 64), backend)
    fn, arguments = make(call, length)
    # What malloc holds of the first call's would hide as much of what comes.
    ctypes.CDLL(None).malloc_trim(0)
    (SELF / "clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    run(fn, arguments, backend)
    return status_bytes("VmHWM") - before


if __name__ == "__main__":
    # Every thread has scratch of its own.
    torch.set_num_threads(1)
    print(json.dumps([peak_bytes(sys.argv[1], call, length) for call, length in json.loads(sys.argv[2])]))
