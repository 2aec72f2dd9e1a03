"""Bytes that attention's kernels ask of DRAM, whole sectors of it, and bank conflicts: the emulator's counts.

A tile of queries reads its rows once and its keys' once, and a tile of keys those of the queries that see it;
out, gradients and row statistics are written once.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastformer.triton_kernels import configs
from fastformer.triton_kernels.attention_bwd import attention_bwd
from fastformer.triton_kernels.attention_fwd import attention_fwd

from fastformer.testing import attention_inputs

from .offline import Emulation

H, H_KV, LENGTH = 2, 1, 256
SIZE, FLOAT = 2, 4  # bytes of bfloat16, and of float32
WIDTHS = (64, *(pytest.param(D, marks=pytest.mark.slow) for D in (128, 256)))


@pytest.fixture(params=["sm_80", "sm_90"])
def emulation(request, monkeypatch):
    return Emulation(monkeypatch, request.param)


def arguments(D, causal=False, M=LENGTH, N=LENGTH):
    """Those of the raw operators."""
    tensors = attention_inputs(1, H, M, N, D, H_kv=H_KV, dtype=torch.bfloat16).values()
    return *tensors, *(None,) * 9, D**-0.5, None, 0 if causal else None, False, None, 0.0, None, None


def keys_read(block_m, block_n, causal):
    """By all tiles of queries of one head, in whole blocks."""
    ends = range(block_m, LENGTH + 1, block_m)
    return sum(-(-end // block_n) * block_n if causal else LENGTH for end in ends)


def queries_read(block_m, block_n, causal):
    """By all tiles of keys, of one query head."""
    starts = range(0, LENGTH, block_n)
    return sum(LENGTH - start // block_m * block_m if causal else LENGTH for start in starts)


def assert_whole(counters):
    assert counters.load_efficiency == counters.store_efficiency == 1.0
    assert counters.bank_conflicts == 0


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("D", WIDTHS)
def test_forward(monkeypatch, emulation, D, causal):
    monkeypatch.setattr(configs, "_MOST_SPLITS", 1)
    attention_fwd(*arguments(D, causal))
    config = configs.attention_fwd_config(emulation.target, SIZE, D, "plain", int(causal), LENGTH)
    keys = keys_read(config.block_m, config.block_n, causal)
    counters = emulation.counters["_attention_fwd_kernel"]
    assert counters.global_load_bytes == H * (LENGTH + 2 * keys) * D * SIZE
    # out; lse, the largest score and the sum.
    assert counters.global_store_bytes == H * LENGTH * (D * SIZE + 3 * FLOAT)
    assert_whole(counters)


@pytest.mark.parametrize("D", WIDTHS)
def test_one_query_of_many_keys(monkeypatch, emulation, D):
    """Keys are split among programs, so that each is read once, for all the heads that read it. What the
    shares hold is read once, in whole sectors: the statistics of eight fill one, and of wide heads several
    lanes ask for it, of which DRAM sees the first."""
    monkeypatch.setattr(configs, "_LEAST_BLOCKS", 1)
    config = configs.attention_fwd_config(emulation.target, SIZE, D, "plain", 0, 1)
    splits, keys = 8, 8 * config.block_n
    attention_fwd(*arguments(D, M=1, N=keys))
    counters, combining = (emulation.counters[f"_{name}_kernel"] for name in ("attention_fwd", "combine"))
    assert counters.ctas == splits * H_KV == config.splits(H_KV, keys) * H_KV
    assert counters.global_load_bytes == (H * splits + H_KV * 2 * keys) * D * SIZE
    assert counters.load_efficiency == 1.0
    assert counters.bank_conflicts == combining.bank_conflicts == 0
    shares = splits * H * (D + 2) * FLOAT
    again = 0 if D == 64 else 4 * 2 * H  # sectors, of both statistics
    assert counters.global_store_bytes == 32 * (combining.global_load_sectors - again) == shares
    assert combining.global_store_bytes == H * (D * SIZE + 3 * FLOAT)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("D", WIDTHS)
def test_backward(emulation, D, causal):
    """5 % are for what is read of each row beside query and grad_out."""
    given = arguments(D, causal)
    out, _, row_max, row_sum = attention_fwd(*given)
    attention_bwd(out, None, None, out, row_max, row_sum, *given, False, False, False)
    keys, queries = configs.attention_bwd_config(emulation.target, SIZE, D, True, False)
    row = 2 * D * SIZE  # of query and grad_out, of key and value, of out and grad_out
    of_queries = H * (LENGTH + keys_read(queries.block_m, queries.block_n, causal)) * row
    of_keys = (H_KV * LENGTH + H * queries_read(keys.block_m, keys.block_n, causal)) * row
    warps = configs.ATTENTION_SUMS.num_warps  # each of which asks for the statistics of its tile's rows
    of_rows = H * LENGTH * (row + 2 * FLOAT * warps)
    expected = {
        "query_gradients": (of_queries, H * LENGTH * D * SIZE),
        "key_gradients": (of_keys, 2 * H_KV * LENGTH * D * SIZE),
        "rows": (of_rows, H * LENGTH * 4 * FLOAT),
    }
    for name, (loaded, stored) in expected.items():
        counters = emulation.counters[f"_{name}_kernel"]
        assert loaded <= 32 * counters.global_load_sectors <= 1.05 * loaded, name
        assert counters.global_store_bytes == stored, name
        assert counters.load_efficiency >= 1.0 and counters.store_efficiency == 1.0, name
        assert counters.bank_conflicts == 0, name
