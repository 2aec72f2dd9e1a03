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


def run_interpreted(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


def test_kernels():
    run_interpreted("tests/triton/interpreted", "-m", "not slow")


@pytest.mark.slow
def test_kernels_at_length():
    run_interpreted("tests/triton/interpreted", "-m", "slow")


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen, names",
    [
        ("tests/ops/test_norm.py", "norm"),
        ("tests/ops/test_dropout.py", "norm or feed_forward or recompute"),
        ("tests/ops/test_feed_forward.py", "feed_forward"),
    ],
)
def test_the_operators_contract(chosen, names):
    """The tests of every backend, on this one: slow for its 65539 columns in every dtype."""
    run_interpreted("-p", "tests.triton.contract_plugin", chosen, "-k", f"({names}) and triton")
