"""Tile sizes and warp counts, by target, operator and width, each with its reason; fixed, never autotuned.

`norm_configs` and `COLUMN_SUM` are everything that can be chosen, so that tests can compile it all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple


class NormConfig(NamedTuple):
    rows: int  # rows of a tile
    block_c: int  # columns of a tile
    num_warps: int
    wide: bool  # rows are wider than the tile: the kernel loops over column chunks


class ColumnSumConfig(NamedTuple):
    block_p: int  # partial sums of a tile
    block_c: int  # columns of a tile
    num_warps: int


# Tiles of whole rows: {operator: {tile width: (rows, warps of 32 threads)}}. Rows wider than the last entry
# take the operator's entry in _WIDE.
_WHOLE_ROWS = {
    # 16 elements a thread, 32 at 1024 columns: 40 to 80 registers, and two to four 16-byte loads in flight
    # from each input. One warp up to 1024 columns, because its reductions are shuffles and wait for no
    # barrier; from there on two barriers a reduction are cheaper than the registers of a longer row.
    "norm_fwd": {
        8: (64, 1),
        16: (32, 1),
        32: (16, 1),
        64: (8, 1),
        128: (4, 1),
        256: (2, 1),
        512: (1, 1),
        1024: (1, 1),
        2048: (1, 4),
        4096: (1, 8),
        8192: (1, 16),
        16384: (1, 32),
    },
    # 16 elements a thread: grad_out, s, ds and two accumulators are live, 128 registers. At least four warps,
    # because all rows of a program share one row of partial sums, and those are traffic too.
    "norm_bwd": {
        8: (256, 4),
        16: (128, 4),
        32: (64, 4),
        64: (32, 4),
        128: (16, 4),
        256: (8, 4),
        512: (4, 4),
        1024: (2, 4),
        2048: (1, 4),
        4096: (1, 8),
        8192: (1, 16),
    },
}
_WIDE = {
    "norm_fwd": NormConfig(1, 8192, 16, True),
    # 16 rows share a row of partial sums, 512 columns are 1 KiB of each row at a time.
    "norm_bwd": NormConfig(16, 512, 16, True),
}
# 128-byte pieces of 64 partial rows: enough programs at small widths, few steps at the usual 264 rows.
COLUMN_SUM = ColumnSumConfig(64, 32, 4)
# Enough backward programs to fill a multiprocessor's registers at 16 warps (128 registers a thread).
_BWD_WARPS_PER_SM = 16


@functools.cache
def norm_config(target: str, op: str, width: int) -> NormConfig:
    """The tile for rows of `width` columns; target is "cuda" or "hip", op "norm_fwd" or "norm_bwd"."""
    tiles = _WHOLE_ROWS[op]
    block_c = max(8, 1 << (width - 1).bit_length())  # dropout decides eight columns at a time
    config = (
        NormConfig(*tiles[block_c][:1], block_c, tiles[block_c][1], False) if block_c in tiles else _WIDE[op]
    )
    if target == "hip":  # the same threads are half as many warps of 64
        config = config._replace(num_warps=max(1, config.num_warps // 2))
    return config


def norm_configs(target: str, op: str) -> Iterator[NormConfig]:
    """Every tile that `norm_config` can return."""
    widths = list(_WHOLE_ROWS[op])
    for width in [*widths, widths[-1] + 1]:
        yield norm_config(target, op, width)


def bwd_programs(target: str, config: NormConfig, sm_count: int) -> int:
    """How many programs share the rows of a backward pass that keeps whole rows in registers."""
    threads = config.num_warps * (64 if target == "hip" else 32)
    return sm_count * max(1, _BWD_WARPS_PER_SM * 32 // threads)
