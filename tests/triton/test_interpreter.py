"""Starts a process in which Triton interprets its kernels, and in it the tests that need that."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).parents[2]
# Cases of tests/ops/paged_cases.py: keys of many pages, more queries than keys, and a window.
PAGED = ("page size 17-torch.float16", "fewer keys than queries-torch.bfloat16", "window-torch.float32")


def run_interpreted(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


def run_contract(*arguments):
    """The tests of every backend, on this one."""
    run_interpreted("-p", "tests.triton.contract_plugin", *arguments)


def test_kernels():
    run_interpreted("tests/triton/interpreted", "-m", "not slow")


def test_some_of_the_contract():
    hidden = "tests/ops/test_attention_hidden.py::test_keys_hidden_from_every_query_change_no_bit"
    some = [f"{hidden}[{how}-nan-triton]" for how in ("lengths", "mask per head")]
    paged = "tests/ops/test_paged_attention.py::test_every_case"
    some += [f"{paged}[triton-{case}]" for case in PAGED]
    run_contract(*some)


@pytest.mark.slow
def test_kernels_at_length():
    run_interpreted("tests/triton/interpreted", "-m", "slow")


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen, names",
    [
        ("tests/ops/test_paged_attention.py", "paged"),
        ("tests/ops/test_attention_hidden.py", "attention or hidden or dead or nan or scores"),
        ("tests/ops/test_opcheck.py", "opcheck"),
        ("tests/ops/test_norm.py", "norm"),
        ("tests/ops/test_dropout.py", "norm or feed_forward or recompute"),
        ("tests/ops/test_feed_forward.py", "feed_forward"),
    ],
)
def test_the_operators_contract(chosen, names):
    """Slow for the norms' 65539 columns in every dtype."""
    run_contract(chosen, "-k", f"({names}) and triton")
