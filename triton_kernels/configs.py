"""Tile sizes and warp counts, by target, operator and width, each with its reason; fixed, never autotuned.

Those of the norms are in norm_configs.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple


class AttentionFwdConfig(NamedTuple):
    block_m: int  # queries of a tile
    block_n: int  # keys of a block
    num_warps: int
    num_stages: int
    edge_stages: int  # stages of the loops over blocks in which some keys are hidden
    ahead: bool  # by descriptors, a block's products issued before the softmax of the block before

    def splits(self, programs: int, keys: int) -> int:
        """Over how many programs the keys of a tile are divided: enough to fill a GPU, none without work."""
        return max(1, min(_FILL // max(programs, 1), keys // (_LEAST_BLOCKS * self.block_n), _MOST_SPLITS))


# Two programs for each of an H100's 132 multiprocessors. A constant, so that a GPU's size changes no bit.
_FILL = 264
# A share of fewer blocks costs more in being written and added than its program saves.
_LEAST_BLOCKS = 4
_MOST_SPLITS = 64
# Numbers of shares that the one warp of a row loads at a time: 16 loads of 16 bytes of each thread in flight.
_COMBINED = 2048

# {target: {width, of heads padded to a power of two: one tile for each number of sides that a window or
# causality bounds}}, for 16-bit calls in which nothing but a scale lies between product and weight and hidden
# keys lie in ranges.
_PLAIN = {
    "sm_80": {
        # 4 warps read K and V half as often from shared memory as 8 do, and 32 KB let several programs share
        # a multiprocessor; with a bounded side they spill 32 bytes. A block takes 1820 cycles by its stall
        # counts, and 1925 with edges in one stage. With a bounded side edges in two stages spill 8 bytes.
        64: (
            AttentionFwdConfig(128, 64, 4, 2, 2, False),
            AttentionFwdConfig(128, 128, 8, 2, 1, False),
            AttentionFwdConfig(128, 128, 8, 2, 1, False),
        ),
        # 8 warps: 4 spill 200 bytes. 128 keys spill 40, and so do 64 where edges are masked.
        128: (
            AttentionFwdConfig(128, 64, 8, 2, 2, False),
            AttentionFwdConfig(128, 32, 8, 2, 2, False),
            AttentionFwdConfig(128, 32, 8, 2, 2, False),
        ),
        256: (AttentionFwdConfig(64, 32, 8, 2, 2, False),) * 3,
    },
    "sm_90": {
        # As an H100 timed them, bfloat16, 4096 keys: small tiles, of which several share a multiprocessor and
        # hide each other's exponentials. 455 TFLOP/s, and 128 x 128 in 8 warps, ahead, 341; of causality 410,
        # not ahead 402, 128 x 128 287.
        64: (
            AttentionFwdConfig(64, 64, 4, 2, 1, False),
            AttentionFwdConfig(64, 64, 4, 3, 1, True),
            AttentionFwdConfig(64, 64, 4, 3, 1, False),
        ),
        # 540 TFLOP/s, and 128 keys a block 506; of causality 451 and 445.
        128: (
            AttentionFwdConfig(128, 64, 8, 3, 1, True),
            AttentionFwdConfig(64, 64, 4, 3, 1, False),
            AttentionFwdConfig(64, 64, 4, 3, 1, False),
        ),
        256: (AttentionFwdConfig(64, 32, 8, 2, 2, False),) * 3,
    },
}
# ptxas spills 32 bytes and more with 4 warps there.
for _target in ("sm_86", "sm_89", "sm_120"):
    _PLAIN[_target] = _PLAIN["sm_80"] | {64: (AttentionFwdConfig(128, 64, 8, 2, 2, False),) * 3}
# Edges in two stages spill 8 bytes there of packed calls, and of the widest heads that do not fill a tile.
for _target in ("sm_86", "sm_89"):
    _of_128, _of_256 = (_PLAIN["sm_80"][_width] for _width in (128, 256))
    _edges = _of_128[1]._replace(edge_stages=1)
    _PLAIN[_target] |= {
        128: (_of_128[0], _edges, _edges),
        256: (_of_256[0]._replace(edge_stages=1),) * 3,
    }
# There edges in two stages spill 424 bytes, and 128 keys of two bounded sides 32.
for _target in ("sm_100", "sm_103"):
    _narrow = AttentionFwdConfig(128, 64, 4, 2, 1, False)
    _PLAIN[_target] = _PLAIN["sm_80"] | {
        64: (_narrow, _PLAIN["sm_80"][64][1], _narrow._replace(num_warps=8)),
    }
# The same for calls with more in a score's way, whose tiles need registers for it.
_MORE = {
    "any": {
        64: AttentionFwdConfig(64, 64, 4, 2, 2, False),
        128: AttentionFwdConfig(64, 64, 8, 2, 2, False),
        256: AttentionFwdConfig(64, 32, 8, 2, 2, False),
    }
}
# There two stages spill 8 bytes with every argument, and of edges under a softcap with causality.
_MORE["sm_80"] = _MORE["any"] | {
    64: AttentionFwdConfig(64, 64, 4, 2, 1, False),
    256: AttentionFwdConfig(64, 32, 8, 3, 3, False),
}
# There edges in two stages spill 8 bytes under a softcap.
for _target in ("sm_86", "sm_89"):
    _MORE[_target] = _MORE["any"] | {128: AttentionFwdConfig(64, 64, 8, 2, 1, False)}
_MORE["sm_120"] = _MORE["any"] | {64: AttentionFwdConfig(64, 32, 4, 2, 2, False)}  # 64 keys spill 24 bytes
# There two stages spill 16 bytes beside a key mask.
for _target in ("sm_100", "sm_103"):
    _MORE[_target] = _MORE["any"] | {128: AttentionFwdConfig(64, 64, 8, 3, 3, False)}
# In place of those, of more than FEW_QUERIES queries, by what lies between products and weights. Warps that
# find no queries and columns of their own repeat each other's products: 64 x 32 at 256 runs them 1.5 times,
# and a useful one takes 7.3 instructions on sm_80 and 6.7 on sm_90, where these take 4.1 and 2.9. (On sm_90,
# whose warps multiply four together, 64 queries in 8 do so at 128 too, and compute every score twice.) Edges
# in two stages spill 16 bytes there with a window; two of 64 keys 16 on sm_80, and other chips lack room.
_wide = {"sm_90": AttentionFwdConfig(128, 32, 8, 2, 1, False)}
for _target in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_103", "sm_120"):
    _wide[_target] = AttentionFwdConfig(64, 64, 8, 1, 1, False)
_MANY = {"plain": {_target: {256: _config} for _target, _config in _wide.items()}}
# Nothing but what is known of a query or a key: else these spill 8 to 300 bytes.
_MANY["light"] = _MANY["plain"] | {
    "sm_90": {128: AttentionFwdConfig(128, 64, 8, 2, 2, False), 256: _wide["sm_90"]}
}
_MANY["more"] = {"sm_90": {128: AttentionFwdConfig(128, 32, 8, 2, 2, False)}}
# A mask of single scores, and no dropout: there 64 queries spill 24 bytes, of 10.9 instructions a product,
# where these take 9.9. (16 keys spill nothing, run products 2.5 times, and take 15.4.)
_MANY["masked"] = _MANY["more"] | {"sm_120": {256: AttentionFwdConfig(32, 32, 4, 3, 3, False)}}
# {width: tiles of plain calls whose heads fill the width, and of others, which spill up to 136 bytes in the
# former}. Products of single numbers hold rows of both operands in registers: 4 warps spill 256 bytes. At 64
# one stage spills 16 bytes on sm_100.
_FLOAT32 = {
    64: (AttentionFwdConfig(64, 32, 8, 2, 2, False), AttentionFwdConfig(32, 32, 8, 1, 1, False)),
    128: (AttentionFwdConfig(32, 32, 8, 1, 1, False), AttentionFwdConfig(16, 32, 8, 1, 1, False)),
    256: (AttentionFwdConfig(16, 32, 8, 1, 1, False),) * 2,
}
# The same of few queries on NVIDIA's chips. At 64 one stage spills 16 bytes of plain calls on sm_90, where
# ptxas stops at 128 registers. At 256 a tile of 16 spills 16 to 24 with every argument.
_FLOAT32_FEW = {
    64: (AttentionFwdConfig(16, 32, 8, 2, 2, False),) * 2,
    128: (AttentionFwdConfig(16, 32, 8, 1, 1, False),) * 2,
    256: (AttentionFwdConfig(8, 32, 8, 1, 1, False),) * 2,
}
FEW_QUERIES = 16


@functools.cache
def attention_fwd_config(
    target: str, itemsize: int, width: int, kind: str, sides: int, M: int
) -> AttentionFwdConfig:
    """The tile for heads of `width` columns, the larger of BLOCK_D and BLOCK_DV, and M queries.

    target is "sm_90", "gfx942", ...; kind is AttentionCall.kind, but "more" of float32 heads that do not fill
    their tiles; sides is how many ends of a query's keys a window or causality bounds.
    """
    width = max(width, 64)
    few, nvidia = M <= FEW_QUERIES, target.startswith("sm_")
    if itemsize == 4:
        config = (_FLOAT32_FEW if few and nvidia else _FLOAT32)[width][kind != "plain"]
    elif kind == "plain":
        config = _PLAIN.get(target, _PLAIN["sm_80"])[width][sides]
    else:
        config = _MORE.get(target, _MORE["any"])[width]
    if itemsize == 2 and not few:
        config = _MANY[kind].get(target, {}).get(width, config)
    if few:
        config = config._replace(block_m=min(16, config.block_m), ahead=False)
        if itemsize == 2:
            config = config._replace(num_warps=4)
    if not nvidia and config.num_warps == 8:
        config = config._replace(num_warps=4)  # of 64 threads, with up to 512 registers each
    return config


def combined_shares(width: int) -> int:
    """How many shares of a row of `width` columns are added up in a step; their statistics fill sectors."""
    return min(_COMBINED // width, _MOST_SPLITS)


class AttentionBwdConfig(NamedTuple):
    block_m: int  # queries of a tile
    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int


# As _PLAIN, _MORE and _FLOAT32, for the gradients of keys and for those of queries.
_PLAIN_BWD = {
    "sm_80": {
        64: (AttentionBwdConfig(64, 128, 8, 2), AttentionBwdConfig(128, 64, 8, 2)),
        # 16 keys a warp, so that weights stay in registers between two products. 64 queries a step spill 72
        # bytes, and so do 64 keys of queries (40).
        128: (AttentionBwdConfig(32, 128, 8, 2), AttentionBwdConfig(128, 32, 8, 2)),
        256: (AttentionBwdConfig(32, 32, 8, 1), AttentionBwdConfig(32, 64, 8, 1)),
    },
    "sm_90": {
        # As an H100 timed them, bfloat16, 4096 keys: 3.6 ms, and 4.9 with twice the keys and the queries in
        # 8 warps and two stages. 4 stages gain nothing. 64 queries a step of keys are as fast, and spill 24
        # to 104 bytes with causality or packed.
        64: (AttentionBwdConfig(32, 64, 4, 3), AttentionBwdConfig(64, 64, 4, 3)),
        # 3.3 ms, and 4.4 with 128 keys and two stages.
        128: (AttentionBwdConfig(32, 64, 4, 3), AttentionBwdConfig(128, 64, 8, 3)),
        256: (AttentionBwdConfig(32, 32, 8, 1), AttentionBwdConfig(32, 64, 8, 1)),
    },
}
# There the tile above spills 48 bytes of causal calls, and 152 where rows are not aligned; in 4 warps 64 keys
# spill 24 and 64. 32 queries and 64 keys in 8 run products 1.5 times.
_queries = _PLAIN_BWD["sm_80"][128][1]
_PLAIN_BWD["sm_120"] = _PLAIN_BWD["sm_80"] | {128: (AttentionBwdConfig(64, 64, 8, 2), _queries)}
# 64 keys of queries spill 2 KB there, beside 512 registers.
_keys = _PLAIN_BWD["sm_80"][256][0]
_PLAIN_BWD["gfx942"] = _PLAIN_BWD["sm_80"] | {256: (_keys, AttentionBwdConfig(32, 32, 8, 1))}
# Two stages spill 8 bytes of causal calls there.
_PLAIN_BWD["gfx950"] = _PLAIN_BWD["sm_80"] | {
    _width: (_keys._replace(num_stages=1), _queries)
    for _width, (_keys, _queries) in _PLAIN_BWD["sm_80"].items()
}
# With more shared memory than 99 KB 64 queries of keys multiply nothing twice, where 32 x 32 in 8 warps do so
# 1.5 times: a useful product takes 1.7 instructions on sm_80 and 2.5 on sm_90, and took 3.8 and 4.0. 64 keys
# spill 736 bytes on sm_90 and 336 on sm_100.
_queries = _PLAIN_BWD["sm_80"][256][1]
for _target in ("sm_86", "sm_89", "sm_100", "sm_103"):
    _PLAIN_BWD[_target] = dict(_PLAIN_BWD["sm_80"])
for _target, _block in (("sm_80", 64), ("sm_90", 32), ("sm_100", 32), ("sm_103", 32)):
    _PLAIN_BWD[_target][256] = (AttentionBwdConfig(64, _block, 8, 1), _queries)
# Of keys of irregular calls, where those of _PLAIN_BWD spill 64 bytes packed and 48 not aligned; 16 queries
# in 4 warps 0 and 24. These spill 16 with a bounded side. 64 keys spill nothing in 8 warps, run products 1.5
# times, and take 5.1 instructions a product, where these take 2.2.
_IRREGULAR_BWD = {
    "sm_90": {128: AttentionBwdConfig(32, 128, 8, 3)},
    "sm_120": {128: AttentionBwdConfig(32, 32, 4, 2)},  # that of _PLAIN_BWD spills 40 where not aligned
}
# There two stages spill 8 bytes packed.
for _target in ("sm_100", "sm_103"):
    _IRREGULAR_BWD[_target] = {64: AttentionBwdConfig(64, 128, 8, 3)}
_MORE_BWD = {
    "sm_80": {
        64: (AttentionBwdConfig(32, 32, 4, 1), AttentionBwdConfig(32, 64, 4, 1)),
        # Half of the keys, or of the rows, multiply the same 1.7 to 2.5 times: see _MANY. At 256 these spill
        # with every argument 16 bytes, of keys, on sm_80, and 8 on sm_86 and sm_89.
        128: (AttentionBwdConfig(32, 32, 4, 1), AttentionBwdConfig(32, 64, 8, 1)),
        256: (AttentionBwdConfig(32, 32, 8, 1), AttentionBwdConfig(16, 64, 8, 1)),
    }
}
# One stage spills there: 8 bytes with a bias of the scores' shape, or causality and a key mask; on sm_90 24
# with a key mask, and 16 of keys at 64 with dropout; on sm_100 8 of those, and 8 of queries with a softcap,
# which two stages make 16, and two of keys 24 of dropout, a relative bias and a key mask. Two spill 8 on
# sm_80 and 1304 on gfx942 with every argument.
_narrow_heads, _wide_heads = _MORE_BWD["sm_80"][64], _MORE_BWD["sm_80"][128]
_keys = AttentionBwdConfig(32, 32, 4, 2)
for _target in ("sm_86", "sm_89"):
    _MORE_BWD[_target] = _MORE_BWD["sm_80"] | {64: (_keys, AttentionBwdConfig(32, 64, 4, 2))}
_MORE_BWD["sm_90"] = _MORE_BWD["sm_80"] | {64: (_keys, _narrow_heads[1]), 128: (_keys, _wide_heads[1])}
for _target in ("sm_100", "sm_103"):
    _three = _keys._replace(num_stages=3)
    _MORE_BWD[_target] = _MORE_BWD["sm_80"] | {64: (_three, AttentionBwdConfig(32, 64, 4, 3))}
# One stage of queries spills 8 bytes there with every argument, or a mask and a bias; two do so on sm_80.
_MORE_BWD["sm_120"] = dict(_MORE_BWD["sm_80"])
for _target, _stages in (("sm_80", 3), ("sm_90", 2), ("sm_100", 2), ("sm_103", 2)):
    _keys, _queries = _MORE_BWD[_target][256]
    _MORE_BWD[_target][256] = (_keys, _queries._replace(num_stages=_stages))
# 32 keys in half of the warps spill 28 bytes there with a relative bias.
for _target in ("gfx942", "gfx950"):
    _MORE_BWD[_target] = _MORE_BWD["sm_80"] | {
        128: (AttentionBwdConfig(32, 64, 8, 1), AttentionBwdConfig(32, 32, 8, 1)),
        256: (AttentionBwdConfig(16, 32, 8, 1),) * 2,
    }
# 4 warps spill a kilobyte, and 32 queries 16 to 9200 bytes. At 64, of queries, one stage spills 16 bytes on
# sm_120, where ptxas stops at 128 registers, and plain calls take 176 of them; two take 98 and 110. At 128,
# of keys, one stage spills 16 bytes on sm_80 with every argument; three leave a plain call a program less.
_FLOAT32_BWD = {
    "sm_80": {
        64: (AttentionBwdConfig(16, 32, 8, 1), AttentionBwdConfig(32, 32, 8, 2)),
        128: (AttentionBwdConfig(16, 32, 8, 1),) * 2,
        256: (AttentionBwdConfig(16, 32, 8, 1),) * 2,
    }
}
# 16 queries spill 8 to 248 bytes there, of keys, and with a mask take 1 KB more shared memory than chips with
# 99 have; 8 run 1.13 times the instructions. In one stage 8 of keys spill 8 bytes on sm_86 and sm_89, where
# ptxas stops at 128 registers; 8 of queries on sm_80.
_few = (AttentionBwdConfig(8, 32, 8, 2), AttentionBwdConfig(8, 32, 8, 1))
for _target in ("sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120"):
    _FLOAT32_BWD[_target] = _FLOAT32_BWD["sm_80"] | {256: _few}
# There one stage of queries spills 8 bytes with a mask: ptxas stops at 64 registers.
_keys = _FLOAT32_BWD["sm_80"][128][0]
for _target in ("sm_86", "sm_89"):
    _FLOAT32_BWD[_target][128] = (_keys, AttentionBwdConfig(16, 32, 8, 2))
# One stage spills 112 and 428 bytes there with every argument.
_FLOAT32_BWD["gfx950"] = _FLOAT32_BWD["sm_80"] | {256: (AttentionBwdConfig(16, 32, 8, 2),) * 2}
# In place of those, for plain calls: half of the keys leave shared memory for two programs of a
# multiprocessor, with a tenth more instructions a key. Where dropout decides 32 at a time there must be 32.
_PLAIN_FLOAT32_BWD = {256: (AttentionBwdConfig(16, 16, 8, 1),) * 2}


@functools.cache
def attention_bwd_config(
    target: str, itemsize: int, width: int, plain: bool, irregular: bool
) -> tuple[AttentionBwdConfig, AttentionBwdConfig]:
    """Tiles of the gradients of keys, and of those of queries; arguments as of attention_fwd_config.

    irregular: packed, or of rows that are not aligned to 16 bytes, whose addresses take registers.
    """
    width = max(width, 64)
    amd = target.startswith("gfx")
    if itemsize == 4:
        configs = _FLOAT32_BWD.get(target, _FLOAT32_BWD["sm_80"])[width]
        if plain:
            configs = _PLAIN_FLOAT32_BWD.get(width, configs)
    elif plain:
        configs = _PLAIN_BWD.get(target, _PLAIN_BWD["sm_80"])[width]
        if irregular:
            configs = _IRREGULAR_BWD.get(target, {}).get(width, configs[0]), configs[1]
    else:
        configs = _MORE_BWD.get(target, _MORE_BWD["sm_80"])[width]
    if amd:  # whose warps have 64 threads, with up to 512 registers each
        keys, queries = (c._replace(num_warps=min(4, c.num_warps // 2)) for c in configs)
        configs = keys, queries
    return configs


class SumConfig(NamedTuple):
    block: int  # queries and keys of a tile
    num_warps: int


# Tiles of the returned weights, of the sums of biases, and of delta. With 4 warps a call with every argument
# spills 40 bytes at a width of 256, although 8 compute the products of 16 queries four times.
ATTENTION_SUMS = SumConfig(32, 8)


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
        # Of 64 x 64 two stages spill 8 and 16 bytes backward on sm_80 and sm_86.
        4: {"": (_FMA[0], _FMA[1]._replace(num_stages=3)), "hidden_gated": _FMA_GATED},
    },
    "wgmma": {
        2: {"": _WGMMA, "hidden_gated": _WGMMA[1:], "hidden_bwd_gated": _WGMMA[1:]},
        4: {"": _FMA, "hidden_gated": _FMA_GATED},
    },
}
# There sums come from tensor memory all at once: 128 x 256 spill up to 400 bytes of products without an
# epilogue, and 64 x 64 in four stages 8.
_plain = (_WGMMA[1], _WGMMA[2]._replace(num_stages=3), _FEW_ROWS)
_GEMM["tcgen05"] = {2: _GEMM["wgmma"][2] | {"plain": _plain}, 4: _GEMM["wgmma"][4]}
# There three stages of float32 spill 16 bytes.
_GEMM["mma of sm_120"] = {2: _GEMM["mma"][2], 4: _GEMM["wgmma"][4]}
_FAMILY = {"sm_90": "wgmma", "sm_100": "tcgen05", "sm_103": "tcgen05", "sm_120": "mma of sm_120"}
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
