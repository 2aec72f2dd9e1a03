"""torch.library.opcheck of every raw operator that runs on CPU tensors: schema, fake, aliasing, dispatch."""

from __future__ import annotations

import pytest
import torch

from fastformer.testing import attention_inputs, feed_forward_inputs, norm_inputs

from .attention_cases import Draw, cumulated
from .judging import BACKENDS, skip_unless_built
from .paged_cases import floats, paged_inputs

KERNELS = [backend for backend in BACKENDS if backend not in ("reference", None)]

SEED = torch.tensor([3])
B, H, H_KV, M, N, D, D_V = 2, 4, 2, 5, 9, 8, 6
# scale, left, right, lower_right, softcap, dropout_p, max_seqlen_q, max_seqlen_k
PLAIN_SPEC = (0.3, None, None, False, None, 0.0, None, None)
CAUSAL_SPEC = (0.3, None, 0, True, None, 0.0, None, None)
FULL_SPEC = (0.3, 3, 2, True, 5.0, 0.25, None, None)


def attention_tensors():
    """Name -> the twelve tensors of the schema, with the spec."""
    drawn = attention_inputs(B, H, M, N, D, D_v=D_V, H_kv=H_KV)
    query, key, value = drawn.values()
    padding = torch.arange(N) < torch.tensor([[N], [4]])
    d = Draw(torch.float32)
    floats = lambda *shape: d.floats(*shape).detach()
    full = (d.bools(B, 1, M, N), padding, torch.tensor([N, 7]), floats(1, H, M, N), floats(H, M + N - 1))
    packed = tuple(t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    bounds = cumulated(2, 3), cumulated(5, 4)
    none = (None,) * 9
    return {
        "plain": ((query, key, value, *none), PLAIN_SPEC),
        "causal, padding": ((query, key, value, None, padding, *(None,) * 7), CAUSAL_SPEC),
        "everything": ((query, key, value, *full, floats(H), SEED, None, None), FULL_SPEC),
        "packed": (
            (*packed, *(None,) * 4, floats(1, 3 + 5 - 1), None, None, *bounds),
            (*PLAIN_SPEC[:-2], 3, 5),
        ),
    }


def attention_calls(op, backend):
    run = lambda name, *arguments: getattr(torch.ops.fastformer, f"{name}_{backend}")(*arguments)
    for tensors, spec in attention_tensors().values():
        out, lse, row_max, row_sum = run("attention_fwd", *tensors, *spec)
        packed = tensors[10] is not None
        if op == "attention_fwd":
            yield (*tensors, *spec)
        elif op == "attention_weights":
            for mean in (False, True):
                yield (row_max, row_sum, *tensors, *spec, mean)
        else:
            weights = run("attention_weights", row_max, row_sum, *tensors, *spec, False)
            saved = (out, row_max, row_sum, *tensors, *spec)
            everything = (tensors[6] is not None, tensors[7] is not None, tensors[8] is not None)
            yield (torch.ones_like(out), torch.ones_like(lse), torch.ones_like(weights), *saved, *everything)
            yield (torch.ones_like(out), None, None, *saved, False, False, False)
            if not packed:
                yield (None, torch.ones_like(lse), None, *saved, *everything)


def paged_attention_calls(op, backend):
    shape = {"S": 4, "M": 3, "H": H, "H_kv": H_KV, "D": D}
    tensors = tuple(paged_inputs((9, 2, 0), D_v=D_V, **shape).values())
    yield (*tensors, None, 0.3, None, 0, None)
    strided = paged_inputs((9, 2, 0), layout="heads first", wide_lengths=False, **shape)
    yield (*strided.values(), floats(H), 0.3, 3, 2, 5.0)


def norm_calls(op, backend):
    x, residual, weight, bias = norm_inputs(3, 4, 16).values()
    if op == "norm_fwd":
        yield (x, residual, weight, bias, SEED, False, 1e-5, 0.1)
        yield (x, None, weight, None, None, True, 1e-5, 0.0)
        return
    mean, rstd = torch.randn(3, 4), torch.rand(3, 4) + 0.5
    yield (x, residual, x, weight, mean, rstd, SEED, False, 0.1, True, True)
    yield (x, None, x, None, torch.empty(0), rstd, None, True, 0.0, False, False)


def feed_forward_calls(op, backend):
    forward = getattr(torch.ops.fastformer, f"feed_forward_fwd_{backend}")
    f = feed_forward_inputs(3, 7, gated=True)
    gated = (f["x"], f["w1"], f["b1"], f["w_gate"], f["b_gate"], f["w2"], f["b2"], SEED)
    plain = (f["x"], f["w1"], None, None, None, f["w2"], None, None)
    calls = ((gated, "silu", 0.1), (plain, "gelu", 0.0))
    for tensors, activation, p in calls:
        if op == "feed_forward_fwd":
            for save_pre in (False, True):
                yield (*tensors, activation, p, save_pre)
            continue
        given = tuple(tensor is not None for tensor in tensors[:-1])
        for save_pre in (False, True):
            out, pre, pre_gate = forward(*tensors, activation, p, save_pre)
            saved = (torch.ones_like(out), pre, pre_gate, *tensors, activation, p)
            yield (*saved, *given)
            yield (*saved, True, *(False,) * 6)


CALLS = {
    **dict.fromkeys(("attention_fwd", "attention_weights", "attention_bwd"), attention_calls),
    "paged_attention_fwd": paged_attention_calls,
    **dict.fromkeys(("norm_fwd", "norm_bwd"), norm_calls),
    **dict.fromkeys(("feed_forward_fwd", "feed_forward_bwd"), feed_forward_calls),
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op, backend):
    skip_unless_built(backend)
    operator = getattr(torch.ops.fastformer, f"{op}_{backend}").default
    for arguments in CALLS[op](op, backend):
        torch.library.opcheck(operator, arguments)
