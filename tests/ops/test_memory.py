"""Peak memory of forward and backward: attention's grows with M + N, feed_forward's with what it saves."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import memory_probe
from .judging import skip_unless_built

ROOT = Path(__file__).parents[2]
ATTENTION = (
    "plain", "causal", "key bias", "row bias", "relative bias", "dropout", "padding", "window", "lse",
    "softcap and sink",
)  # fmt: skip
SHORT, LONG = 256, 2048
# Pages that come and go whatever runs: of one call in several processes the peaks differ by up to 0.4 MB.
PAGES = 1 << 20
# Rows of feed_forward from where on scratch has its full size, so that what grows further is what is saved.
FEW_ROWS, MANY_ROWS = 2048, 4096

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


@functools.cache
def peaks(backend, calls, lengths):
    """(call, length) -> bytes, all measured in one fresh process."""
    asked = [(call, length) for call in calls for length in lengths]
    command = [sys.executable, "-m", "tests.ops.memory_probe", backend, json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, json.loads(done.stdout), strict=True))


def assert_grows_with_the_length(found, call, short, long):
    small, large = found[call, short], found[call, long]
    allowed = small * long / short + PAGES
    assert large <= allowed, (
        f"{call}: {small} bytes at {short}, {large} at {long}: wanted at most {allowed:.0f}"
    )


@pytest.mark.parametrize("call", ATTENTION)
def test_attentions_peak_grows_with_the_length(call):
    skip_unless_built("cpu")
    found = peaks("cpu", ATTENTION, (SHORT, LONG))
    assert_grows_with_the_length(found, call, SHORT, LONG)
    a_mask_of_bytes = memory_probe.B * memory_probe.H * LONG * LONG
    assert found[call, LONG] < a_mask_of_bytes / 4


def test_the_reference_which_holds_all_scores_would_not_pass():
    found = peaks("reference", ("plain",), (SHORT, 2 * SHORT))
    with pytest.raises(AssertionError, match="wanted at most"):
        assert_grows_with_the_length(found, "plain", SHORT, 2 * SHORT)


FEED_FORWARD = (
    "feed_forward",
    "feed_forward swiglu",
    "feed_forward recompute",
    "feed_forward swiglu recompute",
)


def growth_in_hidden_rows(found, call):
    """Bytes that a row adds, in float32 rows of the hidden width."""
    growth = (found[call, MANY_ROWS] - found[call, FEW_ROWS]) / (MANY_ROWS - FEW_ROWS)
    return growth / (4 * memory_probe.F)


@pytest.mark.parametrize("call", FEED_FORWARD)
def test_feed_forward_keeps_its_pre_activations_or_nothing(call):
    """The contract's "saved for backward: x and the pre-activation; with recompute=True, x alone"."""
    skip_unless_built("cpu")
    saved = 0 if "recompute" in call else 2 if "swiglu" in call else 1
    found = growth_in_hidden_rows(peaks("cpu", FEED_FORWARD, (FEW_ROWS, MANY_ROWS)), call)
    # Half a row beside them: x, out and their gradients are 4 E / F of one, and scratch differs from process
    # to process by up to a third.
    assert saved - 0.5 < found < saved + 0.5


def test_the_reference_keeps_more_hidden_rows():
    found = peaks("reference", ("feed_forward",), (FEW_ROWS, MANY_ROWS))
    assert growth_in_hidden_rows(found, "feed_forward") > 2
