"""Tile sizes and warp counts of the norms, as configs.py has them of the other operators.

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


# Tiles of whole rows: {operator: {tile width: (rows, warps of 32 threads)}}. Wider rows take _WIDE, and so do
# unaligned rows of the last width, because with dropout those spill (32 to 96 bytes a thread).
_WHOLE_ROWS = {
    # 32 elements a thread: 60 to 100 registers, and every warp has four 16-byte loads in flight from each
    # input. One warp up to 1024 columns, because its reductions are shuffles and wait for no barrier. At 16
    # elements ptxas aims at 48 registers on sm_90, and with mixed dtypes spills 8 bytes to get there. 16 at 8
    # columns: 32 of float32 with dropout spill 16 bytes on sm_100.
    "norm_fwd": {
        8: (64, 1),
        16: (64, 1),
        32: (32, 1),
        64: (16, 1),
        128: (8, 1),
        256: (4, 1),
        512: (2, 1),
        1024: (1, 1),
        2048: (1, 2),
        4096: (1, 4),
        8192: (1, 8),
        16384: (1, 16),
    },
    # 16 elements a thread: grad_out, s, ds and two accumulators are live, about 128 registers. At least four
    # warps, because the rows of a program share one row of partial sums, and those are traffic too. Eight at
    # 256 columns: with four, unaligned bfloat16 spills 8 bytes on sm_90.
    "norm_bwd": {
        8: (256, 4),
        16: (128, 4),
        32: (64, 4),
        64: (32, 4),
        128: (16, 4),
        256: (8, 8),
        512: (4, 4),
        1024: (2, 4),
        2048: (1, 4),
        4096: (1, 8),
        8192: (1, 16),
    },
}
# The fewest warps where rows are not aligned. Their elements are loaded one by one, each from an address of
# its own, and ptxas stops short of 255 registers: twice the elements a thread spill 8 to 32 bytes on sm_86,
# 89 and 120.
_UNALIGNED_WARPS = {"norm_fwd": 2, "norm_bwd": 8}
_WIDE = {
    "norm_fwd": NormConfig(1, 8192, 16, True),
    # 16 rows share a row of partial sums. With 512 columns in 16 warps float32 spills at 128 registers.
    "norm_bwd": NormConfig(16, 256, 8, True),
}
# 128-byte pieces of 64 partial rows: enough programs at small widths, few steps at the usual 264 rows.
COLUMN_SUM = ColumnSumConfig(64, 32, 4)
# Enough backward programs to fill a multiprocessor's registers at 16 warps (128 registers a thread).
_BWD_WARPS_PER_SM = 16


@functools.cache
def norm_config(target: str, op: str, width: int, align: int) -> NormConfig:
    """The tile for rows of `width` columns.

    target is "cuda" or "hip", op "norm_fwd" or "norm_bwd"; align, 8 at most, divides every row's offset.
    """
    tiles = _WHOLE_ROWS[op]
    block_c = max(8, 1 << (width - 1).bit_length())  # dropout decides eight columns at a time
    if block_c < max(tiles) or (block_c == max(tiles) and align == 8):
        rows, num_warps = tiles[block_c]
        if align < 8:
            num_warps = max(num_warps, _UNALIGNED_WARPS[op])
        config = NormConfig(rows, block_c, num_warps, False)
    else:
        config = _WIDE[op]
    if target == "hip":  # the same threads are half as many warps of 64
        config = config._replace(num_warps=max(1, config.num_warps // 2))
    return config


def norm_configs(target: str, op: str) -> Iterator[tuple[int, int, NormConfig]]:
    """(width, align, tile) for every tile that `norm_config` can return, at every alignment of its rows."""
    widths = list(_WHOLE_ROWS[op])
    for width in [*widths, 2 * widths[-1]]:
        for align in (8, 1):
            yield width, align, norm_config(target, op, width, align)


def bwd_programs(target: str, config: NormConfig, sm_count: int) -> int:
    """How many programs share the rows of a backward pass that keeps whole rows in registers."""
    threads = config.num_warps * (64 if target == "hip" else 32)
    return sm_count * max(1, _BWD_WARPS_PER_SM * 32 // threads)
