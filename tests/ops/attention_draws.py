"""Calls of attention as hypothesis draws them: any set of its arguments, in any shape, layout and dtype."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from fastformer.testing import LAYOUTS, laid_out

from . import philox
from .attention_cases import cumulated

# Where tiles, key blocks and panels of kernels may end, and one to either side.
EDGES = tuple(edge + step for edge in (12, 16, 32, 64, 96, 128, 256) for step in (-1, 0, 1))
LENGTHS = st.integers(1, 40) | st.sampled_from((*EDGES, 300)) | st.integers(1, 300)
LONG = st.integers(200, 600) | st.sampled_from((511, 512, 513))
HEAD_DIMS = st.integers(1, 40) | st.sampled_from((63, 64, 65, 80, 96, 127, 128, 129, 200, 255, 256))
# Scores of one call, B * H * M * N, beyond which it has one batch element and one group of heads.
MANY_SCORES = 1 << 14
BROADCAST = st.tuples(*(st.booleans(),) * 4)


@dataclass
class Drawn:
    """One call, apart from its dtype. Printed whole when hypothesis reports it."""

    B: int
    H: int
    H_kv: int
    M: int
    N: int
    D: int
    D_v: int
    layout: str
    seed: int
    # Of each packed sequence; M and N are then the longest.
    sizes_q: tuple[int, ...] = ()
    sizes_k: tuple[int, ...] = ()
    choices: dict = field(default_factory=dict)

    def inputs(self, dtype):
        """The call's arguments, then what fastformer alone takes and what the plain formula alone takes."""
        self.generator, self.dtype = torch.Generator().manual_seed(self.seed), dtype
        found = self.tensors()
        for name, choice in self.choices.items():
            if name in BUILDERS:
                found |= BUILDERS[name](self, choice)
        only = self.dropout(**self.choices["dropout"]) if "dropout" in self.choices else ({}, {})
        return found, *only

    def floats(self, *shape, dtype=None):
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def bools(self, *shape, p=0.7):
        return torch.rand(shape, generator=self.generator) < p

    def tensors(self):
        if self.sizes_q:
            M, N = sum(self.sizes_q), sum(self.sizes_k)
            shapes = {"query": (M, self.H, self.D), "key": (N, self.H_kv, self.D)}
            shapes["value"] = (N, self.H_kv, self.D_v)
        else:
            shapes = {"query": (self.B, self.H, self.M, self.D), "key": (self.B, self.H_kv, self.N, self.D)}
            shapes["value"] = (self.B, self.H_kv, self.N, self.D_v)
        found = {
            name: laid_out(self.floats(*shape), self.layout).requires_grad_()
            for name, shape in shapes.items()
        }
        if self.sizes_q:
            found["cu_seqlens_q"] = cumulated(*self.sizes_q)
            found["cu_seqlens_k"] = cumulated(*self.sizes_k)
        return found

    def scores_shape(self, broadcast):
        sizes = (self.B, self.H, self.M, self.N)
        return tuple(1 if one else size for one, size in zip(broadcast, sizes, strict=True))

    def placed(self, tensor, layout):
        """A mask or bias [b, h, m, n] in another layout, of the same values or, expanded, of more rows."""
        if layout == "transposed":
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        if layout == "every second":
            return torch.stack([tensor, tensor], -1).flatten(3)[..., ::2]
        if layout == "expanded":
            return tensor.expand(self.B, self.H, self.M, self.N)
        return tensor

    def mask(self, broadcast, layout, dead_rows):
        mask = self.bools(*self.scores_shape(broadcast))
        if dead_rows:
            mask[..., ::3, :] = False
        return {"mask": self.placed(mask, layout)}

    def padding(self, transposed):
        found = self.bools(self.N, self.B).t() if transposed else self.bools(self.B, self.N)
        return {"key_padding_mask": found}

    def lengths(self, dtype):
        return {"key_lengths": torch.randint(0, self.N + 1, (self.B,), generator=self.generator).to(dtype)}

    def bias(self, broadcast, layout, wide, kind):
        dtype = torch.float32 if wide else self.dtype
        bias = self.floats(*self.scores_shape(broadcast), dtype=dtype)
        if kind == "holes":
            bias = bias.masked_fill(~self.bools(*bias.shape), -torch.inf)
        elif kind == "dead rows":
            bias[..., ::4, :] = -torch.inf
        elif kind == "lowest rows" and dtype != torch.float16:  # whose sum with a score may be -inf
            bias[..., ::4, :] = torch.finfo(dtype).min
        return {"bias": self.placed(bias, layout).detach().requires_grad_()}

    def relative_bias(self, rows, wide):
        shape = (1 if rows == "one" else self.H, max(self.M + self.N - 1, 0))
        return {"relative_bias": self.floats(*shape, dtype=torch.float32 if wide else None).requires_grad_()}

    def sink(self, wide, absent):
        sink = self.floats(self.H, dtype=torch.float32 if wide else None)
        if absent:
            sink[0] = -torch.inf
        return {"sink": sink.requires_grad_()}

    def dropout(self, p, seed):
        draw = functools.partial(philox.attention_keep, seed=seed, p=p)
        if self.sizes_q:
            sizes = enumerate(zip(self.sizes_q, self.sizes_k, strict=True))
            keep = [draw(1, self.H, m, n, first_batch=b) for b, (m, n) in sizes]
        else:
            keep = draw(self.B, self.H, self.M, self.N)
        # Not rounded to float32, since the reference in float64 does not round it either.
        scale = 65536 / (65536 - philox.threshold(p))
        return {"dropout_p": p, "seed": seed}, {"keep": keep, "keep_scale": scale}


def as_given(name):
    return lambda drawn, choice: {name: choice}


def from_choices(method):
    return lambda drawn, choices: getattr(drawn, method)(**choices)


# Feature -> how its arguments are made. The other features change the call's shape, or go with others.
BUILDERS = {
    "mask": from_choices("mask"),
    "padding": from_choices("padding"),
    "lengths": from_choices("lengths"),
    "upper_left": lambda drawn, choice: {"causal": "upper_left"},
    "lower_right": lambda drawn, choice: {"causal": "lower_right"},
    "window": lambda drawn, choice: choice,
    "bias": from_choices("bias"),
    "relative_bias": from_choices("relative_bias"),
    "softcap": as_given("softcap"),
    "sink": from_choices("sink"),
    "scale": as_given("scale"),
    "weights": as_given("return_weights"),
    "lse": as_given("return_lse"),
}
PLACES = st.sampled_from(("contiguous", "transposed", "every second", "expanded"))
SIDES = st.none() | st.integers(0, 20) | st.integers(0, 300)
CHOICES = {
    "mask": st.fixed_dictionaries({"broadcast": BROADCAST, "layout": PLACES, "dead_rows": st.booleans()}),
    "padding": st.fixed_dictionaries({"transposed": st.booleans()}),
    "lengths": st.fixed_dictionaries({"dtype": st.sampled_from((torch.int64, torch.int32))}),
    "upper_left": st.just(True),
    "lower_right": st.just(True),
    "window": st.fixed_dictionaries({"window": st.tuples(SIDES, SIDES)}),
    "bias": st.fixed_dictionaries(
        {
            "broadcast": BROADCAST,
            "layout": PLACES,
            "wide": st.booleans(),
            "kind": st.sampled_from(("plain", "holes", "dead rows", "lowest rows")),
        }
    ),
    "relative_bias": st.fixed_dictionaries({"rows": st.sampled_from(("one", "H")), "wide": st.booleans()}),
    "softcap": st.sampled_from((0.5, 3.0, 30.0)),
    "sink": st.fixed_dictionaries({"wide": st.booleans(), "absent": st.booleans()}),
    "dropout": st.fixed_dictionaries(
        {"p": st.sampled_from((0.1, 0.5, 0.75)), "seed": st.integers(-(2**63), 2**63 - 1)}
    ),
    "scale": st.sampled_from((0.0, 1.0, 0.3, -0.5)),
    "weights": st.sampled_from(("per_head", "mean")),
    "lse": st.just(True),
    "packed": st.just(True),
    "GQA": st.integers(2, 3),
    "D_v": HEAD_DIMS,
    "decode": st.integers(1, 4),
}
FEATURES = tuple(CHOICES)
# What the contract does not let meet.
APART = (
    {"upper_left", "lower_right"},
    {"packed", "padding"},
    {"packed", "lengths"},
)


def together(features):
    """Whether one call may have all of these."""
    return not any(pair <= set(features) for pair in APART)


@st.composite
def calls(draw, features):
    features = [name for name in FEATURES if name in features]
    choices = {name: draw(CHOICES[name]) for name in features}
    if "window" in choices and not {"upper_left", "lower_right"} & set(features):
        choices["window"]["corner"] = draw(st.sampled_from((None, "upper_left", "lower_right")))
    rows = st.integers(1, choices["decode"]) if "decode" in choices else LENGTHS
    columns = LONG if "decode" in choices else LENGTHS
    sizes_q = sizes_k = ()
    if "packed" in choices:
        B = draw(st.integers(1, 4))
        sizes_q, sizes_k = (
            tuple(draw(st.lists(st.just(0) | lengths, min_size=B, max_size=B))) for lengths in (rows, columns)
        )
        M, N = max(sizes_q), max(sizes_k)
    else:
        B, M, N = draw(st.integers(1, 3)), draw(rows), draw(columns)
    H_kv = draw(st.integers(1, 2))
    if B * H_kv * M * N > MANY_SCORES:
        B, H_kv = (B if sizes_q else 1), 1
    D = draw(HEAD_DIMS)
    return Drawn(
        B=B,
        H=H_kv * choices.get("GQA", 1),
        H_kv=H_kv,
        M=M,
        N=N,
        D=D,
        D_v=choices.get("D_v", D),
        # Packed, "broadcast" would make all tokens the same one, and the scores' gradients cancel.
        layout=draw(st.sampled_from(LAYOUTS).filter(lambda layout: not (sizes_q and layout == "broadcast"))),
        seed=draw(st.integers(0, 2**31)),
        sizes_q=sizes_q,
        sizes_k=sizes_k,
        choices=choices,
    )


def sets_of_features():
    return st.sets(st.sampled_from(FEATURES), max_size=8).filter(together)
