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


# Tiles of whole rows: {operator: {tile width: (rows, warps of 32 threads)}}. Wider rows take _WIDE, and so do
# unaligned rows of the last width, because with dropout those spill (32 to 96 bytes a thread).
_WHOLE_ROWS = {
    # 32 elements a thread: 60 to 100 registers, and every warp has four 16-byte loads in flight from each
    # input. One warp up to 1024 columns, because its reductions are shuffles and wait for no barrier. At 16
    # elements ptxas aims at 48 registers on sm_90, and with mixed dtypes spills 8 bytes to get there.
    "norm_fwd": {
        8: (128, 1),
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


class GemmConfig(NamedTuple):
    block_m: int  # rows of a tile of the result
    block_n: int  # columns
    block_k: int  # of both operands, a step
    num_warps: int
    num_stages: int  # steps of operands in shared memory at a time
    programs_per_sm: int  # that take turns at the tiles
    rate: float  # share of the peak that its loop over k reaches, judged by the machine code


class SumsConfig(NamedTuple):
    block_r: int  # rows of a tile
    block_c: int  # columns
    num_warps: int


# Rows of tiles that run side by side: 8 rows of 128 read 8 tiles of a and few of b at a time.
GEMM_GROUP = 8
# Columns of a hidden tile that are finished at a time. With 64 backward of a gate spills 728 bytes on sm_90.
HIDDEN_SLICE = 32
COLUMN_SUMS = SumsConfig(32, 64, 4)

# Few rows are bound by reading the weights: many programs, each with two long steps in flight. With steps of
# 64 ptxas stops at 80 registers on sm_90 and spills 8 bytes.
_FEW_ROWS = GemmConfig(16, 64, 128, 4, 3, 2, 0.15)
# mma.sync: eight warps share 128 x 128 sums, 64 registers of a thread. With four warps, or twice the sums,
# epilogues spill 170 to 580 bytes.
_MMA = (GemmConfig(128, 128, 64, 8, 3, 1, 0.98), GemmConfig(64, 64, 64, 4, 3, 2, 0.65), _FEW_ROWS)
# wgmma: shared memory bounds it, of which a 128 x 256 tile reads least.
_WGMMA = (
    GemmConfig(128, 256, 64, 8, 3, 1, 0.95),
    GemmConfig(128, 128, 64, 8, 4, 1, 0.74),
    GemmConfig(64, 64, 64, 4, 4, 2, 0.45),
    _FEW_ROWS,
)
# FMA of float32: 13 or 11 FFMA to a 16-byte load of shared memory. The two sums of a gate and of the chunk
# that is being added up take eight warps: four spill 190 bytes.
_FMA = (GemmConfig(128, 128, 16, 8, 2, 1, 0.9), GemmConfig(64, 64, 16, 4, 2, 2, 0.8))
_FMA_GATED = (GemmConfig(64, 64, 16, 8, 2, 2, 0.7),)

# Rows that are not aligned to 16 bytes go in small pieces, 16-bit ones through registers. Larger tiles spill:
# 128 x 256 of bfloat16 704 bytes on sm_90.
_UNALIGNED: dict[int, dict[str, tuple[GemmConfig, ...]]] = {
    2: {"": (GemmConfig(64, 64, 32, 8, 2, 2, 0.3),)},
    4: {
        "": (GemmConfig(64, 64, 16, 8, 2, 2, 0.6),),
        "hidden_gated": (GemmConfig(32, 64, 16, 8, 2, 2, 0.4),),
    },
}

# {family of targets: {bytes of an element: {kind of product, "" for any other: tiles}}}
_GEMM: dict[str, dict[int, dict[str, tuple[GemmConfig, ...]]]] = {
    "mma": {
        2: {"": _MMA, "hidden_gated": (GemmConfig(128, 64, 32, 4, 4, 2, 0.95), *_MMA[1:])},
        4: {"": _FMA, "hidden_gated": _FMA_GATED},
    },
    "wgmma": {
        2: {"": _WGMMA, "hidden_gated": _WGMMA[1:], "hidden_bwd_gated": _WGMMA[1:]},
        4: {"": _FMA, "hidden_gated": _FMA_GATED},
    },
}
_FAMILY = {"sm_90": "wgmma", "sm_100": "wgmma", "sm_103": "wgmma"}
# Columns of k below which another part costs more than it brings.
_LEAST_DEPTH = 512


@functools.cache
def gemm_config(
    arch: str, kind: str, itemsize: int, align: int, M: int, N: int, K: int, sm_count: int
) -> tuple[GemmConfig, int]:
    """The tile of a product [M, N], and into how many parts to divide K; K is 0 where it may not be divided.
    align, in elements, divides every row's offset.

    Chosen by the share of all multiprocessors' peak that is useful: not spent on rows and columns past the
    end, nor on waiting for the last tiles.
    """
    tiles = gemm_tiles(arch, itemsize, align)

    def parts(config: GemmConfig) -> int:
        return max(1, min(_slots(config, sm_count) // _tiles(config, M, N), K // _LEAST_DEPTH))

    def useful(config: GemmConfig) -> float:
        slots, work = _slots(config, sm_count), parts(config) * _tiles(config, M, N)
        in_all_slots = -(-work // slots) * slots * config.block_m * config.block_n
        return config.rate * parts(config) * M * N / in_all_slots

    best = max(tiles.get(kind, tiles[""]), key=useful)
    return best, parts(best)


def _tiles(config: GemmConfig, M: int, N: int) -> int:
    return max(1, -(-M // config.block_m) * -(-N // config.block_n))


def _slots(config: GemmConfig, sm_count: int) -> int:
    return sm_count * config.programs_per_sm


def gemm_tiles(arch: str, itemsize: int, align: int) -> dict[str, tuple[GemmConfig, ...]]:
    """Everything that `gemm_config` can choose, by kind of product; "" is any other kind."""
    if align * itemsize < 16:
        return _UNALIGNED[itemsize]
    tiles = _GEMM[_FAMILY.get(arch, "mma")][itemsize]
    if arch.startswith("gfx"):  # whose 64 KB hold two stages
        tiles = {k: tuple(c._replace(num_stages=2) for c in of_kind) for k, of_kind in tiles.items()}
    return tiles
