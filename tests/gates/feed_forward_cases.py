"""feed_forward: every tile of its products, with everything that an epilogue can do."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from fastformer.triton_kernels import configs, feed_forward, feed_forward_bwd

from tests.triton.feed_forward_tiles import use_tile

from .case import Case

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# What divides every row's offset, E, F, E_out: every row is aligned, and steps of k are whole; nothing is.
SIZES = {"even": (8, 1024, 4096, 2048), "odd": (1, 1001, 4099, 2047)}
_ROWS = 5000


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _call(op: str, dtype: torch.dtype, sizes: str, gated: bool, tile: int) -> None:
    """The call where tile number `tile` of its kind is chosen for every product, and without a gate K is
    divided: with one, products are added to others, and hold more."""
    _, E, F, E_out = SIZES[sizes]
    x, w1, w2 = _empty(_ROWS, E, dtype=dtype), _empty(F, E, dtype=dtype), _empty(E_out, F, dtype=dtype)
    w_gate, b_gate = (w1, _empty(F, dtype=dtype)) if gated else (None, None)
    tensors = (x, w1, _empty(F, dtype=dtype), w_gate, b_gate, w2, _empty(E_out, dtype=dtype))
    seed, grad_out = _empty(1, dtype=torch.int64), _empty(_ROWS, E_out, dtype=dtype)
    pre = _empty(_ROWS, F, dtype=dtype)
    pre_gate = torch.empty_like(pre) if gated else _empty(0, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        use_tile(patch, tile, parts=1 if gated else 2)
        if op == "feed_forward_fwd":
            feed_forward.feed_forward_fwd(*tensors, seed, "gelu", 0.1, True)
        else:
            needs = (True,) * len(tensors)
            feed_forward_bwd.feed_forward_bwd(grad_out, pre, pre_gate, *tensors, seed, "gelu", 0.1, *needs)


def feed_forward_cases(op: str, target: str) -> Iterator[Case]:
    def case(dtype: torch.dtype, sizes: str, gated: bool, tile: int) -> Case:
        name = f"{str(dtype).removeprefix('torch.')} tile {tile} {sizes}{' gated' * gated}"
        return Case(op, name, partial(_call, op, dtype, sizes, gated, tile), tensor_cores=dtype is not F32)

    for dtype in (BF16, F32):
        for sizes, (align, *_) in SIZES.items():
            tiles = configs.gemm_tiles(target, dtype.itemsize, align)
            for tile in range(max(map(len, tiles.values()))):
                for gated in (False, True):
                    yield case(dtype, sizes, gated, tile)
    yield case(F16, "even", True, 0)  # whose tiles are bfloat16's
