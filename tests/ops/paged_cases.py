"""What the tests of paged_attention share: caches in pages, and each argument in named cases."""

from __future__ import annotations

import torch

from fastformer.testing import laid_out

# What may stand in the table past a sequence's last page: no page's number, or that of another's page.
NO_PAGES = (-1, 2**31 - 1, -(2**31), 1 << 20, 0)

# How a cache may lie in memory: [P, S, H_kv, D] as it is, one layer of several, pages of [H_kv, S, D], keys
# beside values in one tensor, or a last dimension that is not contiguous.
LAYOUTS = ("plain", "layer", "heads first", "keys beside values", "last strided")


def placed(pages, layout):
    """`pages` [P, S, H_kv, D] with other strides, NaN around them."""
    if layout == "layer":
        around = torch.full_like(pages, torch.nan)
        return torch.stack([around, pages, around], 1)[:, 1]
    if layout == "heads first":
        return pages.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "last strided":
        return laid_out(pages, "last_strided")
    return pages


def table_of(lengths, S, P, generator, spare_columns=1):
    """int32 [B, pages]: pages in any order, none of them twice, and NO_PAGES past each sequence's last."""
    columns = max((-(-length // S) for length in lengths), default=0) + spare_columns
    table = torch.tensor(NO_PAGES).repeat(len(lengths), columns)[:, :columns].to(torch.int32)
    numbers = torch.randperm(P, generator=generator).tolist()
    for b, length in enumerate(lengths):
        used = -(-length // S)
        table[b, :used] = torch.tensor([numbers.pop() for _ in range(used)], dtype=torch.int32)
    return table


def paged_inputs(
    lengths,
    *,
    S=16,
    M=1,
    H=4,
    H_kv=2,
    D=16,
    D_v=None,
    dtype=torch.float32,
    layout="plain",
    wide_lengths=True,
    spare_pages=2,
    seed=0,
):
    """Arguments of paged_attention for sequences of these lengths; `spare_pages` belong to nobody."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    P = sum(-(-length // S) for length in lengths) + spare_pages
    D_v = D if D_v is None else D_v
    key_pages, value_pages = draw(P, S, H_kv, D), draw(P, S, H_kv, D_v)
    if layout == "keys beside values":
        key_pages, value_pages = torch.stack([key_pages, value_pages], 1).unbind(1)
    return {
        "query": draw(len(lengths), H, M, D),
        "key_pages": placed(key_pages, layout),
        "value_pages": placed(value_pages, layout),
        "page_table": table_of(lengths, S, P, generator),
        "lengths": torch.tensor(lengths, dtype=torch.int64 if wide_lengths else torch.int32),
    }


def real_places(page_table, lengths, P, S):
    """bool [P, S]: the places that hold some sequence's key."""
    real = torch.zeros(P, S, dtype=torch.bool)
    for pages, length in zip(page_table.tolist(), lengths.tolist(), strict=True):
        for n in range(length):
            real[pages[n // S], n % S] = True
    return real


def floats(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Name -> (arguments of paged_inputs, arguments of paged_attention; tensors are cast to the call's dtype).
CASES = {
    "page size 1": ({"lengths": (5, 33, 0), "S": 1}, {}),
    "page size 16": ({"lengths": (40, 16, 17, 0, 1)}, {}),
    "page size 17": ({"lengths": (40, 17, 34, 0, 1), "S": 17, "M": 3}, {}),
    "page size 256": ({"lengths": (300, 256, 3, 255), "S": 256}, {}),
    "one page": ({"lengths": (7,), "S": 8}, {}),
    "one key": ({"lengths": (1, 1)}, {}),
    "many keys": ({"lengths": (1500, 3, 700)}, {}),
    "many keys, three queries": ({"lengths": (1100, 3, 600), "M": 3}, {}),
    "three queries": ({"lengths": (40, 3, 4, 2, 0), "M": 3}, {}),
    "many queries": ({"lengths": (70, 20, 33), "M": 20}, {}),
    "fewer keys than queries": ({"lengths": (3, 0, 19, 20, 21), "M": 20}, {}),
    "a whole prompt": ({"lengths": (150, 150), "M": 150}, {}),
    "GQA": ({"lengths": (40, 33), "H": 6, "M": 3}, {}),
    "MQA": ({"lengths": (40, 33), "H": 5, "H_kv": 1}, {}),
    "no groups": ({"lengths": (40, 33), "H": 3, "H_kv": 3}, {}),
    "D_v differs": ({"lengths": (40, 33), "D": 24, "D_v": 40}, {}),
    "head dim 1": ({"lengths": (40, 33), "D": 1}, {}),
    "head dim 128": ({"lengths": (40, 33), "D": 128, "M": 2}, {}),
    "head dim 256": ({"lengths": (40, 33), "D": 256, "D_v": 200}, {}),
    "int32 lengths": ({"lengths": (40, 0, 33), "wide_lengths": False}, {}),
    "every key": ({"lengths": (40, 3, 0, 20), "M": 20}, {"causal": False}),
    "window": ({"lengths": (70, 20, 33, 4), "M": 20}, {"window": (7, None)}),
    "window of one query": ({"lengths": (70, 20, 3, 0)}, {"window": (7, None)}),
    "window (0, 0)": ({"lengths": (70, 4, 33), "M": 5}, {"window": (0, 0)}),
    "window of both sides": ({"lengths": (70, 20, 33, 4), "M": 20}, {"window": (5, 2), "causal": False}),
    "window, open left": ({"lengths": (70, 20, 4), "M": 20}, {"window": (None, 3), "causal": False}),
    "wide window": ({"lengths": (70, 20), "M": 3}, {"window": (10_000, None)}),
    "softcap": ({"lengths": (40, 33, 0), "M": 3}, {"softcap": 2.0}),
    "sink": ({"lengths": (40, 3, 0), "M": 5}, {"sink": floats(4)}),
    "scale": ({"lengths": (40, 33)}, {"scale": 0.5}),
    "negative scale": ({"lengths": (40, 33)}, {"scale": -0.5}),
    "everything": (
        {"lengths": (90, 33, 0, 17), "S": 17, "M": 20, "H": 6, "D": 24, "D_v": 40, "layout": "layer"},
        {"window": (30, 0), "softcap": 5.0, "sink": floats(6), "scale": 0.3},
    ),
    **{layout: ({"lengths": (40, 16, 5), "M": 3, "layout": layout}, {}) for layout in LAYOUTS[1:]},
}


def paged_call(name, dtype, **more):
    shape, arguments = CASES[name]
    cast = lambda value: value.to(dtype) if isinstance(value, torch.Tensor) else value
    inputs = paged_inputs(**shape, dtype=dtype) | {"return_lse": True} | more
    return inputs | {argument: cast(value) for argument, value in arguments.items()}
