"""Attention in every tile that configs.py can choose for any target, in PTX of sm_80 or sm_90, run by ptxvm.

Tiles of other targets are emulated in the code of sm_80: what they divide is the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from fastformer.triton_kernels import attention_bwd, attention_fwd, configs

from fastformer.testing import attention_inputs
from tests.ops.attention_cases import Draw
from tests.ops.attention_judge import judge_attention

from .offline import TARGETS, Emulation

pytestmark = pytest.mark.slow

F32, BF16 = torch.float32, torch.bfloat16
# The entries' modes: as many sides of a query's keys are bounded as the mode's number, and then more.
MODES = ("plain", "causal", "window", "light", "more", "masked")
N = 300


class Call(NamedTuple):
    told: str  # the target that the launcher chooses tiles for
    dtype: torch.dtype
    D: int
    mode: str
    M: int

    @property
    def target(self) -> str:
        """What is emulated."""
        return "sm_90" if self.told == "sm_90" else "sm_80"

    def forward_tile(self) -> configs.AttentionFwdConfig:
        kind = self.mode if MODES.index(self.mode) > 2 else "plain"
        of_target, sides = (self.told, self.dtype.itemsize, self.D), min(MODES.index(self.mode), 2)
        return configs.attention_fwd_config(*of_target, kind, sides, self.M)

    def backward_tiles(self) -> tuple[configs.AttentionBwdConfig, configs.AttentionBwdConfig]:
        plain, packed = self.mode != "more", self.mode == "packed"
        return configs.attention_bwd_config(self.told, self.dtype.itemsize, self.D, plain, packed)

    def inputs(self, requires_grad: bool) -> dict[str, Any]:
        d = Draw(self.dtype)
        rows = attention_inputs(
            1, 2, self.M, N, self.D, H_kv=1, dtype=self.dtype, requires_grad=requires_grad
        )
        bias = d.floats(1, 1, self.M, N)
        more = {
            "plain": {},
            "causal": {"causal": "lower_right"},
            "window": {"window": (90, 40), "corner": "lower_right"},
            "light": {"softcap": 5.0},
            "more": {"bias": bias if requires_grad else bias.detach(), "softcap": 5.0},
            "masked": {"mask": d.bools(1, 1, self.M, N)},
        }
        return rows | more[self.mode] | {"return_lse": True}


def packed_inputs(call: Call) -> dict[str, Any]:
    """Two sequences, of queries that read keys of their own sequence."""
    rows = attention_inputs(1, 2, call.M, call.M, call.D, H_kv=1, dtype=call.dtype)
    rows = {name: t[0].transpose(0, 1).contiguous().requires_grad_() for name, t in rows.items()}
    starts = torch.tensor([0, 30, call.M], dtype=torch.int32)
    return rows | {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "return_lse": True}


def different(tiles_of, modes, lengths):
    """The first call for each tile, width, type and mode on each target that is emulated.

    Neither bounds nor packing choose a tile of float32. Packing chooses none but those of _IRREGULAR_BWD.
    """
    first = {}
    of_one_mode = {"packed": configs._IRREGULAR_BWD}
    for told in ("sm_80", "sm_90", *TARGETS):
        for dtype in (BF16, F32):
            for D in (64, 128, 256):
                of_type = [mode for mode in modes if dtype is BF16 or mode in ("plain", "more")]
                of_type = [m for m in of_type if m not in of_one_mode or D in of_one_mode[m].get(told, {})]
                for call in (Call(told, dtype, D, mode, M) for mode in of_type for M in lengths):
                    tile = tiles_of(call)
                    first.setdefault((tile, dtype, D, call.mode, call.M, call.target), call)
    return [pytest.param(call, id="-".join(map(str, call)).replace("torch.", "")) for call in first.values()]


@pytest.fixture
def chosen(monkeypatch):
    """Tiles that the launchers were given, by the name of configs.py's function."""
    found: dict[str, list] = {"attention_fwd_config": [], "attention_bwd_config": []}
    for module, name in zip((attention_fwd, attention_bwd), found, strict=True):

        def recorded(choose, name, *arguments):
            found[name].append(choose(*arguments))
            return found[name][-1]

        monkeypatch.setattr(module, name, partial(recorded, getattr(configs, name), name))
    return found


def emulate(monkeypatch, call, requires_grad):
    Emulation(monkeypatch, call.target)
    for module in (attention_fwd, attention_bwd):
        monkeypatch.setattr(module, "arch", lambda device: call.told)
    if call.mode == "packed":
        longest = {"max_seqlen_q": call.M, "max_seqlen_k": call.M}
        judge_attention(packed_inputs(call), backend="triton", fn_only=longest)
    else:
        judge_attention(call.inputs(requires_grad), backend="triton")


@pytest.mark.parametrize("call", different(Call.forward_tile, MODES, (140, 1)))
def test_forward(monkeypatch, chosen, call):
    emulate(monkeypatch, call, requires_grad=False)
    assert set(chosen["attention_fwd_config"]) == {call.forward_tile()}


@pytest.mark.parametrize("call", different(Call.backward_tiles, ("plain", "packed", "more"), (140,)))
def test_backward(monkeypatch, chosen, call):
    emulate(monkeypatch, call, requires_grad=True)
    assert set(chosen["attention_bwd_config"]) == {call.backward_tiles()}
