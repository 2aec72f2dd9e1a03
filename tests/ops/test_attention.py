"""attention: every argument of docs/contract.md, on every backend that CPU tensors can go to."""

from __future__ import annotations

import pytest
import torch

import fastformer
from fastformer.testing import attention_inputs

from . import plain
from .attention_cases import CASES, Draw, call, kernels_serve
from .attention_judge import judge_attention
from .judging import BACKENDS, DTYPES, assert_reference_means_plain, judge, skip_unless_built, without_grad


@pytest.mark.parametrize("weights", (False, "per_head"), ids=("", "weights"))
@pytest.mark.parametrize("name", CASES)
def test_reference_means_the_plain_formula(name, weights):
    inputs = call(name, torch.float64, return_lse=True, return_weights=weights)
    assert_reference_means_plain(fastformer.attention, plain.attention, inputs)


@pytest.mark.parametrize("name", CASES)
def test_auto_forward_and_backward(name):
    judge_attention(call(name, torch.float32, return_lse=True), backend=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cpu_forward_and_backward(name, dtype):
    inputs = call(name, dtype, return_lse=True)
    served = judge_attention(inputs, backend="cpu", must_serve=kernels_serve(inputs))
    assert served == kernels_serve(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cpu_forward_alone(name, dtype):
    """Nothing is saved for a backward that nobody asks for, which may be another way through the kernel."""
    inputs = call(name, dtype, requires_grad=False, return_lse=True)
    judge_attention(inputs, backend="cpu", must_serve=kernels_serve(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("everything", "bias with -inf", "sink, dead rows", "lower right, M > N"))
def test_reference_in_narrow_dtypes(name, dtype):
    inputs = call(name, dtype, return_lse=True)
    judge_attention(inputs, backend="reference")


@pytest.mark.parametrize("name", CASES)
def test_auto_goes_to_cpu_in_both_directions(name):
    skip_unless_built("cpu")
    inputs = call(name, torch.float32)
    wanted = "cpu" if kernels_serve(inputs) else "reference"
    for weights in (False, "per_head", "mean"):
        chosen = fastformer.explain(fastformer.attention, **inputs, return_weights=weights)
        assert chosen.backends == {"attention_fwd": wanted, "attention_bwd": wanted}, str(chosen)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ("transposed", "sliced", "unaligned", "last_strided", "broadcast"))
def test_layouts(layout, backend):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = attention_inputs(N=45, D=20, dtype=dtype, layout=layout, requires_grad=True)
        judge_attention(inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_masks_and_heads_that_share_storage(backend):
    d = Draw(torch.float32)
    inputs = attention_inputs(M=20, N=45, requires_grad=True)
    inputs["key"] = inputs["key"][:, :1].detach().expand(2, 4, 45, 16).requires_grad_()
    inputs["mask"] = d.bools(45, 4, 20).permute(1, 2, 0)
    inputs["key_padding_mask"] = d.bools(45, 2).t()
    judge_attention(inputs, backend=backend)


def test_explain_tells_of_the_copy_of_a_strided_last_dimension():
    skip_unless_built("cpu")
    inputs = attention_inputs(layout="last_strided")
    assert "cop" in str(fastformer.explain(fastformer.attention, **inputs))
    assert "cop" not in str(fastformer.explain(fastformer.attention, **attention_inputs()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", (True, "mean"), ids=str)
@pytest.mark.parametrize("name", ("GQA", "mask, dead rows", "lengths", "sink", "everything", "no keys"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_lse_with_gradients(backend, name, weights, dtype):
    inputs = call(name, dtype, return_lse=True, return_weights=weights)
    judge_attention(inputs, backend=backend)


@pytest.mark.parametrize("size", ("B", "H", "M", "N"))
@pytest.mark.parametrize("weights", (False, "per_head", "mean"))
def test_everything_of_nothing(size, weights):
    """Every argument, of no batch, no heads, no queries or no keys."""
    sizes = {"B": 2, "H": 4, "M": 40, "N": 70} | {size: 0}
    B, H, M, N = sizes.values()
    d = Draw(torch.float32)
    inputs = attention_inputs(**sizes, requires_grad=True) | {
        "mask": d.bools(B, 1, M, N),
        "key_padding_mask": d.bools(B, N),
        "key_lengths": torch.full((B,), N),
        "window": (30, 10),
        "corner": "lower_right",
        "bias": d.floats(1, H, M, N),
        "relative_bias": d.floats(H, M + N - 1),
        "sink": d.floats(H),
        "softcap": 5.0,
        "return_lse": True,
        "return_weights": weights,
    }
    judge_attention(inputs, backend="cpu")


@pytest.mark.parametrize("name", CASES)
def test_weights_of_every_call(name):
    """After the named cases of the first test, the second pass over lse alone."""
    inputs = call(name, torch.float32, return_weights="mean")
    judge_attention(inputs, backend="cpu", must_serve=kernels_serve(inputs))


@pytest.mark.parametrize("needs", ("query", "key", "value", "bias", "relative_bias", "sink"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_input_alone(backend, needs):
    inputs = without_grad(call("everything", torch.float32, return_lse=True))
    inputs[needs].requires_grad_()
    judge_attention(inputs, backend=backend)


@pytest.mark.parametrize("which", (0, 1, 2), ids=("out", "lse", "weights"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_one_output_alone(backend, which):
    """Backward gets None for the others."""

    def one(fn):
        return lambda **arguments: fn(**arguments, return_lse=True, return_weights=True)[which]

    inputs = call("everything", torch.float32)
    judge(one(fastformer.attention), one(plain.attention), inputs, backend=backend)


def test_what_is_returned_and_its_shapes():
    inputs = attention_inputs(B=2, H=4, M=5, N=7, D=8, D_v=6, dtype=torch.bfloat16)
    out, lse, weights = fastformer.attention(**inputs, return_lse=True, return_weights="mean")
    assert (out.shape, lse.shape, weights.shape) == ((2, 4, 5, 6), (2, 4, 5), (2, 5, 7))
    assert lse.dtype == torch.float32 and out.dtype == weights.dtype == torch.bfloat16
    assert out.is_contiguous()
    out, weights = fastformer.attention(**inputs, return_weights="per_head")
    assert weights.shape == (2, 4, 5, 7)
    assert torch.equal(fastformer.attention(**inputs, return_weights=True)[1], weights)
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(2, 4, 5), rtol=0, atol=2e-2)
    assert isinstance(fastformer.attention(**inputs), torch.Tensor)
