"""What the tests of attention share: each argument of docs/contract.md in named cases."""

from __future__ import annotations

import torch

from fastformer.testing import attention_inputs

from .judging import without_grad

# The widest head that kernels take; wider ones go to the reference.
MAX_HEAD_DIM = 256


class Draw:
    """Arguments of one call, drawn in its dtype."""

    def __init__(self, dtype, seed=11):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def floats(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype).requires_grad_()

    def bools(self, *shape, p=0.7):
        return torch.rand(shape, generator=self.generator) < p

    def with_minus_inf(self, *shape):
        """A bias with -inf in it, the whole first row included."""
        hidden = ~self.bools(*shape)
        hidden[..., 0, :] = True
        return self.floats(*shape).detach().masked_fill(hidden, -torch.inf).requires_grad_()

    def dead_rows(self, *shape):
        mask = self.bools(*shape)
        mask[..., ::3, :] = False
        return mask


def lengths(*values):
    return lambda d: {"key_lengths": torch.tensor(values)}


def fixed(**arguments):
    return lambda d: arguments


# Name -> (arguments of attention_inputs, arguments of attention).
CASES = {
    **{f"head dim {D}": ({"D": D, "M": 19, "N": 37}, fixed()) for D in (1, 3, 40, 64, 80, 96, 128, 200, 256)},
    "head dim 300": ({"D": 300, "M": 5}, fixed()),
    "D_v differs": ({"D": 24, "D_v": 40}, fixed()),
    "one query": ({"M": 1, "N": 65}, fixed()),
    "one key": ({"M": 65, "N": 1}, fixed()),
    "one element": ({"B": 1, "H": 1, "M": 1, "N": 1, "D": 1}, fixed()),
    "M > N": ({"M": 130, "N": 70}, fixed()),
    "many tiles": ({"B": 1, "H": 2, "M": 257, "N": 389, "D": 32}, fixed()),
    "scale": ({}, fixed(scale=0.5)),
    "scale 0": ({}, fixed(scale=0.0)),
    "negative scale": ({}, fixed(scale=-1.0)),
    "GQA": ({"H": 6, "H_kv": 2, "N": 50}, fixed()),
    "MQA causal": ({"H": 5, "H_kv": 1}, fixed(causal=True)),
    "mask": ({"N": 45}, lambda d: {"mask": d.bools(2, 4, 33, 45)}),
    "mask [M, N]": ({"N": 45}, lambda d: {"mask": d.bools(33, 45)}),
    "mask [B, 1, 1, N]": ({"N": 45}, lambda d: {"mask": d.bools(2, 1, 1, 45)}),
    "mask [1, H, M, 1]": ({"N": 45}, lambda d: {"mask": d.bools(1, 4, 33, 1)}),
    "mask of one element": ({}, lambda d: {"mask": torch.tensor(True)}),
    "mask, dead rows": ({"N": 45}, lambda d: {"mask": d.dead_rows(2, 4, 33, 45)}),
    "mask, nothing visible": ({}, lambda d: {"mask": torch.zeros(33, 33, dtype=torch.bool)}),
    "mask and causal": ({}, lambda d: {"mask": d.bools(2, 1, 33, 33), "causal": True}),
    "padding": ({"N": 100}, lambda d: {"key_padding_mask": d.bools(2, 100)}),
    "padding and GQA": (
        {"H": 6, "H_kv": 3, "N": 100},
        lambda d: {"key_padding_mask": d.bools(2, 100), "causal": "lower_right"},
    ),
    "lengths": ({"B": 4, "N": 130}, lengths(130, 64, 1, 0)),
    "lengths and causal": ({"B": 4, "M": 70}, lambda d: {**lengths(70, 64, 1, 0)(d), "causal": True}),
    "lengths, int32": ({"B": 2}, lambda d: {"key_lengths": torch.tensor([3, 33], dtype=torch.int32)}),
    "mask, padding and lengths": (
        {"N": 80},
        lambda d: {"mask": d.bools(4, 33, 80), "key_padding_mask": d.bools(2, 80), **lengths(70, 20)(d)},
    ),
    "causal": ({"M": 70}, fixed(causal=True)),
    "upper left, M < N": ({"M": 20, "N": 90}, fixed(causal="upper_left")),
    "upper left, M > N": ({"M": 90, "N": 20}, fixed(causal="upper_left")),
    "lower right, M < N": ({"M": 20, "N": 90}, fixed(causal="lower_right")),
    "lower right, M > N": ({"M": 90, "N": 20}, fixed(causal="lower_right")),
    "window": ({"M": 90, "N": 70}, fixed(window=(5, 3))),
    "window (0, 0)": ({}, fixed(window=(0, 0))),
    "window, open left": ({"M": 90, "N": 70}, fixed(window=(None, 2))),
    "window, open right": ({"M": 90, "N": 70}, fixed(window=(2, None))),
    "window, open": ({"M": 90, "N": 70}, fixed(window=(None, None))),
    "window wider than N": ({}, fixed(window=(1000, 1000))),
    "window, lower right": ({"M": 20, "N": 90}, fixed(window=(4, 6), corner="lower_right")),
    "window, lower right, M > N": ({"M": 90, "N": 20}, fixed(window=(4, 6), corner="lower_right")),
    "window, upper left": ({"M": 20, "N": 90}, fixed(window=(4, 6), corner="upper_left")),
    "window and causal": ({"M": 90}, fixed(window=(16, None), causal=True)),
    "window and causal, right cut": ({"M": 90}, fixed(window=(16, 3), causal=True)),
    "window and lower right": ({"M": 20, "N": 90}, fixed(window=(16, 0), causal="lower_right")),
    "bias": ({"N": 45}, lambda d: {"bias": d.floats(2, 4, 33, 45)}),
    "bias [H, M, N]": ({"N": 45}, lambda d: {"bias": d.floats(4, 33, 45)}),
    "bias [B, 1, 1, N]": ({"N": 45}, lambda d: {"bias": d.floats(2, 1, 1, 45)}),
    "bias [H, 1, 1]": ({"N": 45}, lambda d: {"bias": d.floats(4, 1, 1)}),
    "bias and causal": ({}, lambda d: {"bias": d.floats(33, 33), "causal": True}),
    "bias with -inf": ({"N": 45}, lambda d: {"bias": d.with_minus_inf(4, 33, 45)}),
    "bias of -inf and mask": ({}, lambda d: {"bias": d.with_minus_inf(33, 33), "mask": d.bools(33, 33)}),
    "relative bias": ({"M": 40, "N": 70}, lambda d: {"relative_bias": d.floats(4, 109)}),
    "relative bias, one row": ({"M": 40, "N": 20}, lambda d: {"relative_bias": d.floats(1, 59)}),
    "relative bias, causal, padding": (
        {"M": 70, "H": 4, "H_kv": 2},
        lambda d: {"relative_bias": d.floats(4, 139), "causal": True, "key_padding_mask": d.bools(2, 70)},
    ),
    "softcap": ({"N": 45}, fixed(softcap=2.0)),
    "softcap and causal": ({}, fixed(softcap=0.5, causal=True)),
    "softcap, bias, mask": (
        {"N": 45},
        lambda d: {"softcap": 3.0, "bias": d.floats(4, 33, 45), "mask": d.dead_rows(33, 45)},
    ),
    "sink": ({"N": 45}, lambda d: {"sink": d.floats(4)}),
    "sink, dead rows": ({"N": 45}, lambda d: {"sink": d.floats(4), "mask": d.dead_rows(2, 1, 33, 45)}),
    "sink of -inf": ({}, lambda d: {"sink": torch.tensor([0.0, -torch.inf, 1.0, 2.0], dtype=d.dtype)}),
    "everything": (
        {"M": 40, "N": 70, "H": 4, "H_kv": 2, "D": 24, "D_v": 40},
        lambda d: {
            "mask": d.dead_rows(4, 40, 70),
            "key_padding_mask": d.bools(2, 70),
            "key_lengths": torch.tensor([70, 33]),
            "window": (30, 10),
            "corner": "lower_right",
            "bias": d.floats(2, 1, 40, 70),
            "relative_bias": d.floats(4, 109),
            "softcap": 5.0,
            "sink": d.floats(4),
            "scale": 0.3,
        },
    ),
    "no batch": ({"B": 0}, fixed()),
    "no heads": ({"H": 0}, fixed()),
    "no queries": ({"M": 0, "N": 5}, fixed()),
    "no keys": ({"M": 5, "N": 0}, fixed()),
    "no keys, sink": ({"M": 5, "N": 0}, lambda d: {"sink": d.floats(4)}),
}


def call(name, dtype, requires_grad=True, **more):
    shape, arguments = CASES[name]
    inputs = attention_inputs(**{"dtype": dtype, "requires_grad": requires_grad, **shape})
    inputs |= arguments(Draw(dtype)) | more
    return inputs if requires_grad else without_grad(inputs)


def kernels_serve(inputs):
    """Every kernel backend takes every argument of the contract; only the head dims have an end."""
    return max(inputs["query"].shape[-1], inputs["value"].shape[-1]) <= MAX_HEAD_DIM


def cumulated(*sizes):
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


# Name -> (query lengths, key lengths, arguments).
PACKED = {
    "self": ((5, 33, 1, 70), (5, 33, 1, 70), fixed()),
    "cross": ((5, 33, 1), (40, 3, 64), fixed()),
    "empty sequences": ((0, 5, 3, 0), (4, 0, 3, 0), fixed()),
    "one sequence": ((40,), (40,), fixed(causal=True)),
    "causal": ((5, 33, 1, 70), (5, 33, 1, 70), fixed(causal=True)),
    "upper left": ((5, 33, 1), (40, 3, 64), fixed(causal="upper_left")),
    "lower right": ((5, 33, 1), (40, 3, 64), fixed(causal="lower_right")),
    "window": ((5, 33, 70), (40, 3, 70), fixed(window=(3, 5), corner="lower_right")),
    "relative bias": ((5, 33, 1), (40, 3, 64), lambda d: {"relative_bias": d.floats(4, 33 + 64 - 1)}),
    "softcap and sink": ((5, 33), (5, 33), lambda d: {"softcap": 2.0, "sink": d.floats(4)}),
    "mask and bias": (
        (5, 33, 1),
        (40, 3, 64),
        lambda d: {"mask": d.dead_rows(3, 1, 33, 64), "bias": d.floats(4, 33, 64)},
    ),
    "everything": (
        (5, 33, 1, 0, 70),
        (40, 3, 64, 7, 130),
        lambda d: {
            "mask": d.bools(5, 4, 1, 130),
            "bias": d.floats(5, 1, 70, 130),
            "relative_bias": d.floats(1, 199),
            "window": (40, 30),
            "corner": "lower_right",
            "softcap": 5.0,
            "sink": d.floats(4),
            "scale": 0.3,
        },
    ),
}


def packed_call(name, dtype):
    sizes_q, sizes_k, arguments = PACKED[name]
    inputs = attention_inputs(
        B=1, M=sum(sizes_q), N=sum(sizes_k), H=4, H_kv=2, dtype=dtype, requires_grad=True
    )
    inputs = {key: t.detach()[0].transpose(0, 1).contiguous().requires_grad_() for key, t in inputs.items()}
    starts_q = cumulated(*sizes_q)
    # causal=True asks for M = N in every sequence, and one tensor for both says so without a look at it.
    starts_k = starts_q if sizes_q == sizes_k else cumulated(*sizes_k)
    inputs |= {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "return_lse": True}
    return inputs | arguments(Draw(dtype)), {"max_seqlen_q": max(sizes_q), "max_seqlen_k": max(sizes_k)}
