"""The biases of attention: every shape that broadcasts, other dtypes, the largest negative number."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastformer
from fastformer.testing import attention_inputs

from .attention_cases import Draw
from .attention_judge import judge_attention
from .judging import DTYPES, skip_unless_built

B, H, M, N = 2, 4, 20, 150
BROADCASTS = tuple(itertools.product((False, True), repeat=4))
NARROW = (torch.bfloat16, torch.float16)

each_backend = pytest.mark.parametrize("backend", ("reference", "cpu"))


def call(dtype, **shape):
    inputs = attention_inputs(**{"B": B, "H": H, "M": M, "N": N, **shape}, dtype=dtype, requires_grad=True)
    return inputs | {"return_lse": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "broadcast", BROADCASTS, ids=lambda b: "".join(n for n, one in zip("BHMN", b, strict=True) if one)
)
@each_backend
def test_gradient_of_every_broadcast_shape(backend, broadcast, dtype):
    shape = [1 if one else size for one, size in zip(broadcast, (B, H, M, N), strict=True)]
    # The sink keeps what is constant over the keys from cancelling out of every result.
    d = Draw(dtype)
    inputs = call(dtype, H_kv=2) | {"bias": d.floats(*shape), "sink": d.floats(H)}
    judge_attention(inputs, backend=backend)


@pytest.mark.parametrize("shape", ((), (1,), (N,), (M, 1), (H, 1, N), (1, M, N)), ids=str)
@each_backend
def test_bias_of_fewer_dimensions(backend, shape):
    d = Draw(torch.float32)
    inputs = call(torch.float32) | {"bias": d.floats(*shape), "sink": d.floats(H), "causal": "lower_right"}
    judge_attention(inputs, backend=backend)


@pytest.mark.parametrize("stride", ("rows", "columns", "batch", "all", "transposed", "every second", "heads"))
@each_backend
def test_bias_in_every_layout(backend, stride):
    """A bias that repeats by stride 0 has a gradient of its whole shape."""
    d = Draw(torch.float32)
    bias = {
        "rows": lambda: d.floats(H, 1, N).expand(H, M, N),
        "columns": lambda: d.floats(H, M, 1).expand(H, M, N),
        "batch": lambda: d.floats(1, H, M, N).expand(B, H, M, N),
        "all": lambda: d.floats(1).expand(B, H, M, N),
        "transposed": lambda: d.floats(H, N, M).transpose(1, 2),
        "every second": lambda: d.floats(M, 2 * N)[:, ::2],
        "heads": lambda: d.floats(M, N, H).permute(2, 0, 1),
    }[stride]()
    inputs = call(torch.float32) | {"bias": bias.detach().requires_grad_(), "sink": d.floats(H)}
    judge_attention(inputs, backend=backend)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("argument", ("bias", "broadcast bias", "relative_bias", "sink"))
@each_backend
def test_float32_beside_16_bits(backend, argument, dtype):
    """Its gradient is float32 too. A position table is often kept in float32."""
    wide = Draw(torch.float32)
    more = {
        "bias": {"bias": wide.floats(H, M, N)},
        "broadcast bias": {"bias": wide.floats(B, 1, 1, N)},
        "relative_bias": {"relative_bias": wide.floats(H, M + N - 1)},
        "sink": {"sink": wide.floats(H)},
    }[argument]
    judge_attention(call(dtype) | more, backend=backend)


@pytest.mark.parametrize("rows", (1, H))
@pytest.mark.parametrize("shape", ((1, 1), (1, 300), (300, 1), (13, 65), (130, 70), (70, 130)), ids=str)
@each_backend
def test_relative_bias(backend, shape, rows):
    m, n = shape
    for dtype in (torch.float32, torch.bfloat16):
        d = Draw(dtype)
        inputs = call(dtype, M=m, N=n, H_kv=2)
        inputs |= {"relative_bias": d.floats(rows, m + n - 1), "sink": d.floats(H)}
        judge_attention(inputs, backend=backend)


@pytest.mark.parametrize("layout", ("one row by stride", "every second", "transposed"))
@each_backend
def test_relative_bias_in_every_layout(backend, layout):
    d = Draw(torch.float32)
    row = {
        "one row by stride": lambda: d.floats(1, M + N - 1).expand(H, M + N - 1),
        "every second": lambda: d.floats(H, 2 * (M + N - 1))[:, ::2],
        "transposed": lambda: d.floats(M + N - 1, H).t(),
    }[layout]()
    inputs = call(torch.float32) | {"relative_bias": row.detach().requires_grad_()}
    judge_attention(inputs, backend=backend)


@pytest.mark.parametrize("H_kv", (1, 2, 4))
@each_backend
def test_a_toeplitz_row_is_a_bias(backend, H_kv):
    """relative_bias [H, M + N - 1] means what the [H, M, N] tensor gathered from it means."""
    skip_unless_built(backend)
    dtype = torch.float32 if backend == "cpu" else torch.float64
    inputs = attention_inputs(M=30, N=50, H_kv=H_kv, dtype=dtype)
    row = Draw(dtype).floats(4, 79)
    index = torch.arange(50)[None, :] - torch.arange(30)[:, None] + 29
    gathered = fastformer.attention(**inputs, bias=row[:, index], backend=backend)
    found = fastformer.attention(**inputs, relative_bias=row, backend=backend)
    torch.testing.assert_close(found, gathered)


@pytest.mark.parametrize("n", (1, 20, 129, 700))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("argument", ("bias", "broadcast bias", "relative_bias"))
@each_backend
def test_the_largest_negative_number_is_no_mask(backend, argument, dtype, n):
    """A row of finfo.min gives the mean of v; scaled by log2(e) carelessly it becomes -inf and gives 0.

    Of 129 keys and more the row's lse, log(N) beyond a number that float32 cannot add it to, loses more than
    any weight may.
    """
    inputs = call(dtype, M=8, N=n) | {"return_weights": True}
    lowest = torch.finfo(dtype).min
    if argument == "bias":
        bias = torch.zeros(8, n, dtype=dtype)
        bias[3] = lowest
        inputs["bias"] = bias.requires_grad_()
        row = 3
    elif argument == "broadcast bias":
        bias = torch.full((B, 1, 1, n), lowest, dtype=dtype)
        bias[1] = 0
        inputs["bias"] = bias.requires_grad_()
        row = slice(None)
    else:
        # Row 0 reads the last n entries.
        relative = torch.zeros(1, 8 + n - 1, dtype=dtype)
        relative[:, 7:] = lowest
        inputs["relative_bias"] = relative.requires_grad_()
        row = 0
    judge_attention(inputs, backend=backend)
    out, _, weights = fastformer.attention(**inputs, backend=backend)
    torch.testing.assert_close(weights[0, :, row], torch.full_like(weights[0, :, row], 1 / n))
    mean = inputs["value"][0].float().mean(1).to(dtype)
    found = out[0, :, row]
    torch.testing.assert_close(found, (mean if found.dim() == 2 else mean[:, None]).expand(found.shape))
