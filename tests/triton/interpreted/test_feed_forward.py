"""feed_forward on the Triton backend, public function and raw operators, in Triton's interpreter."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from fastformer.triton_kernels import feed_forward, feed_forward_bwd, gemm

import fastformer
from fastformer.backends import triton as backend
from fastformer.specs import FEED_FORWARD_TENSORS, FeedForwardSpec
from fastformer.testing import LAYOUTS, feed_forward_inputs, laid_out, outputs_and_gradients
from tests.ops import philox, plain
from tests.ops.dropout_calls import assert_keeps, feed_forward_scaled_keep
from tests.ops.judging import assert_same_bits, judge, without_grad
from tests.triton.feed_forward_tiles import TILES, use_tile

F32, F16 = torch.float32, torch.float16
slow = partial(pytest.param, marks=pytest.mark.slow)
ACTIVATIONS = (*plain.ACTIVATIONS, *plain.GATED_ACTIVATIONS)
DIFFERENTIABLE = FEED_FORWARD_TENSORS[:7]


def call(activation, *rows, **more):
    gated = activation in plain.GATED_ACTIVATIONS
    return feed_forward_inputs(*rows, gated=gated, requires_grad=True, **more) | {"activation": activation}


def judge_call(inputs, **how):
    judge(fastformer.feed_forward, plain.feed_forward, inputs, backend="triton", **how)


def judge_dropped(inputs, p, seed, **fn_only):
    rows, F = inputs["x"].shape[:-1], inputs["w1"].shape[0]
    keep = philox.feed_forward_keep(rows.numel(), F, seed, p).view(*rows, F)
    judge_call(
        inputs,
        fn_only={"dropout_p": p, "seed": torch.tensor([seed]), **fn_only},
        plain_only={"keep": keep, "keep_scale": philox.keep_scale(p)},
    )


def raw_gradients(inputs, grad_out, p=0.0, seed=None, needs=DIFFERENTIABLE, recompute=False):
    """The raw operators' gradients by name."""
    activation = inputs["activation"]
    gated = activation in plain.GATED_ACTIVATIONS
    spec = FeedForwardSpec(plain.GATED_ACTIVATIONS.get(activation, activation), gated, p)
    named = without_grad(inputs) | {"seed": None if seed is None else torch.tensor([seed])}
    tensors = [named.get(name) for name in FEED_FORWARD_TENSORS]
    saved = backend.feed_forward_fwd(spec, *tensors, save_pre=not recompute)[1:]
    grads = backend.feed_forward_bwd(
        spec, tuple(n in needs for n in DIFFERENTIABLE), grad_out, *saved, *tensors
    )
    return {n: g for n, g in zip(DIFFERENTIABLE, grads, strict=True) if g is not None}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    """Saved or computed again, with biases or without; the operators' contract has every combination."""
    index = ACTIVATIONS.index(activation)
    inputs = call(activation, 3, 7, bias=index % 3 > 0, dtype=(F32, F16)[index % 2])
    judge_call(inputs, fn_only={"recompute": index % 2 > 0})


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("activation", ("silu", "geglu"))
def test_sizes_past_every_tile(monkeypatch, tile, activation):
    use_tile(monkeypatch, tile)
    for dtype in (F32, F16):
        judge_dropped(call(activation, 133, E=70, F=261, E_out=135, dtype=dtype), 0.25, -7)


@pytest.mark.parametrize(
    "sizes", (slow((1, 1, 1)), (3, 5, 7), (33, 65, 31), slow((64, 256, 64)), slow((384, 40, 1))), ids=str
)
def test_sizes(sizes):
    E, F, E_out = sizes
    for activation, rows in (("gelu", 1), ("swiglu", 21)):
        judge_call(call(activation, rows, E=E, F=F, E_out=E_out))


def test_many_tiles_of_rows(monkeypatch):
    """More rows of tiles than a group has, and a last group that is not full."""
    use_tile(monkeypatch, len(TILES) - 1)  # 16 rows
    judge_call(call("reglu", 16 * 9 + 3, E=8, F=70, E_out=9, dtype=F16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Everything outside the tensors' own elements is NaN."""
    dtype = (F32, F16)[LAYOUTS.index(layout) % 2]
    judge_call(call("swiglu", 3, 5, E=24, F=40, dtype=dtype, layout=layout))


def test_transposed_weights_are_read_as_they_lie():
    inputs = call("geglu", 9, E=24, F=40, E_out=18)
    for names in (("w1", "w_gate", "w2"), ("w_gate",)):  # one alone does not lie as the other does
        changed = {n: inputs[n].detach().t().contiguous().t().requires_grad_() for n in names}
        judge_call(inputs | changed)


@pytest.mark.parametrize(
    "name", ("x", slow("w1"), "w_gate", slow("w2"), slow("b1"), slow("b_gate"), slow("b2"))
)
def test_each_tensor_has_its_own_strides(name):
    inputs = call("reglu", 9, E=24, F=40, E_out=18)
    judge_call(inputs | {name: laid_out(inputs[name].detach(), "sliced").requires_grad_()})


def test_strided_gradients():
    inputs = call("gelu", 4, 5, E=24, F=40)
    for grad in (
        torch.ones(()).expand(4, 5, 24),
        torch.randn(24, 5, 4).permute(2, 1, 0),
        torch.randn(4, 5, 30)[..., 3:27],
    ):
        found, expected = (
            outputs_and_gradients(fastformer.feed_forward, **inputs, backend="triton", grad_outputs=[g])
            for g in (grad, grad.contiguous())
        )
        assert_same_bits(found, expected)


@pytest.mark.parametrize("sizes", ((0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)), ids=str)
def test_no_columns(sizes):
    E, F, E_out = sizes
    judge_call(call("swiglu", 3, E=E, F=F, E_out=E_out), fn_only={"recompute": True})


@pytest.mark.parametrize("rows", ((), (0,), (3, 0), (1,), (2, 3, 4)), ids=str)
def test_leading_dimensions(rows):
    judge_call(call("geglu", *rows))


@pytest.mark.parametrize("activation, p", (("reglu", 0.1), ("gelu_tanh", 0.1), ("reglu", 1.0)))
def test_dropout(activation, p):
    judge_dropped(call(activation, 2, 9, E=24, F=100), p, -0x123456789ABCDEF, recompute=activation == "reglu")


@pytest.mark.parametrize("p", (slow(2**-16), 0.3, slow(0.999)))
@pytest.mark.parametrize("seed", (0, 2**40 + 3, -(2**63)))
def test_dropout_keeps_what_the_map_says(p, seed):
    found = feed_forward_scaled_keep(70, 140, seed, p, backend="triton")
    assert_keeps(found, philox.feed_forward_keep(70, 140, seed, p), p)


def test_dropout_decides_each_hidden_gradient():
    """With w1 = w2 = 1 and positive x, dx is the hidden gradient: its zeros are the map, as cpu's are."""
    one, rows = torch.eye(140), 70
    x = torch.ones(rows, 140, requires_grad=True)
    keep = philox.feed_forward_keep(rows, 140, 11, 0.3)
    for name in ("triton", "cpu", "reference"):
        out = fastformer.feed_forward(
            x, one, None, one, None, activation="relu", dropout_p=0.3, seed=torch.tensor([11]), backend=name
        )
        (dx,) = torch.autograd.grad(out, x, torch.ones_like(x))
        assert torch.equal(dx != 0, keep), name


@pytest.mark.parametrize("activation", ("swiglu", slow("gelu")))
def test_needs(activation):
    """What else is wanted changes no bit of a gradient, and what is not wanted is not made."""
    inputs = call(activation, 9, E=24, F=40, E_out=18, dtype=F16)
    grad_out = torch.randn(9, 18).half()
    everything = raw_gradients(inputs, grad_out, 0.2, 3)
    for needs in [(name,) for name in DIFFERENTIABLE] + [("x", "b2"), ("w1", "b_gate"), ("w2", "b1")]:
        some = raw_gradients(inputs, grad_out, 0.2, 3, needs, recompute=True)
        assert some.keys() == set(needs)
        for name, grad in some.items():
            wanted = everything[name] if inputs.get(name) is not None else torch.empty(0, dtype=F16)
            assert torch.equal(grad, wanted), name


@pytest.mark.parametrize(
    "needs, kernels",
    [
        (("b2",), ["_column_sums_kernel"]),
        (("w2",), ["_hidden_bwd_kernel", "_gemm_kernel"]),
        (("b1",), ["_hidden_bwd_kernel", "_column_sums_kernel"]),
        (("x",), ["_hidden_bwd_kernel", "_gemm_kernel"]),
    ],
    ids=str,
)
def test_only_what_is_needed_runs(monkeypatch, needs, kernels):
    inputs = call("swiglu", 9, E=24, F=40)
    launched = []
    from fastformer.triton_kernels import column_sums

    for module in (feed_forward, feed_forward_bwd, gemm, column_sums):
        for name in [n for n in vars(module) if n.endswith("_kernel") and n != "gemm_kernel"]:
            kernel = getattr(module, name)

            class Recorder:
                def __init__(self, name, kernel):
                    self.name, self.kernel = name, kernel

                def __getitem__(self, grid):
                    launched.append(self.name)
                    return self.kernel[grid]

            monkeypatch.setattr(module, name, Recorder(name, kernel))
    raw_gradients(inputs, torch.randn(9, 24), needs=needs)
    assert launched[2:] == kernels  # after forward's two


@pytest.mark.parametrize("activation, dtype", (("geglu_tanh", F16), slow("gelu", F32)), ids=str)
def test_same_bits_twice_and_recomputed(activation, dtype):
    inputs = call(activation, 70, dtype=dtype) | {"dropout_p": 0.3, "seed": torch.tensor([5])}
    first, second, again = (
        outputs_and_gradients(fastformer.feed_forward, **inputs, recompute=recompute, backend="triton")
        for recompute in (False, False, True)
    )
    assert_same_bits(first, second)
    assert_same_bits(first, again)


@pytest.mark.parametrize("parts", (2, slow(3)))
def test_parts_of_k_are_added(monkeypatch, parts):
    use_tile(monkeypatch, len(TILES) - 1, parts)  # steps of 128 columns of k, the last of which is not whole
    judge_dropped(call("gelu", 9, E=300, F=290, E_out=9, dtype=F16), 0.3, 9)


def test_programs_share_the_tiles(monkeypatch):
    """However many programs there are, every tile is made once."""
    for module in (feed_forward, feed_forward_bwd, gemm):
        monkeypatch.setattr(module, "sm_count", lambda device: 2)
    use_tile(monkeypatch, len(TILES) - 1)  # 16 x 64
    judge_call(call("swiglu", 40, E=24, F=100, E_out=70, dtype=F16))


@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
def test_activation_and_slope_of_every_size(activation):
    """One column in and out: out is the activation and dx its slope; both tails, and what is not finite."""
    special = torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30, torch.nan, torch.inf, -torch.inf])
    one = torch.ones(1, 1)
    for x in (torch.linspace(-12, 12, 1001), special):
        x = x.clamp(-1e15, 1e15) if activation == "relu2" else x
        inputs = {"x": x[:, None].requires_grad_(), "w1": one, "b1": None, "w2": one, "b2": None}
        judge_call(inputs | {"activation": activation}, grad_outputs=[torch.ones(len(x), 1)])


@pytest.mark.parametrize("bad", (torch.nan, torch.inf), ids=str)
def test_nonfinite_values_stay_in_their_row(bad):
    inputs = call("gelu", 40)
    inputs["x"].data[17, 3] = bad
    clean = without_grad(call("gelu", 40))
    dirty = fastformer.feed_forward(**without_grad(inputs), backend="triton")
    others = torch.arange(40) != 17
    assert torch.equal(dirty[others], fastformer.feed_forward(**clean, backend="triton")[others])
    assert not dirty[17].isfinite().any()


def test_other_dtypes_are_refused():
    inputs = without_grad(call("gelu", 3, dtype=torch.float64))
    with pytest.raises(fastformer.BackendError, match="float64"):
        fastformer.feed_forward(**inputs, backend="triton")


def test_sizes_past_the_grid_are_refused():
    x, w1 = torch.empty(2**31 - 1, 1, device="meta"), torch.empty(8, 1, device="meta")
    w2 = torch.empty(1, 8, device="meta")
    tensors = (x, w1, None, None, None, w2, None, None)
    refusal = backend.why_not("feed_forward_fwd", FeedForwardSpec("relu"), tensors)
    assert refusal is not None and "rows" in refusal


def test_the_raw_operators_check_out():
    x, w1, w2 = torch.randn(3, 16), torch.randn(8, 16), torch.randn(4, 8)
    ops = torch.ops.fastformer
    tensors = (x, w1, torch.randn(8), w1.clone(), None, w2, None, torch.tensor([1]))
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    for save_pre in (False, True):
        args = (*tensors, "silu", 0.25, save_pre)
        torch.library.opcheck(ops.feed_forward_fwd_triton.default, args, **checks)
    _, *saved = ops.feed_forward_fwd_triton(*args)
    for needs in itertools.islice(itertools.product((True, False), repeat=7), 0, 128, 21):
        args = (torch.randn(3, 4), *saved, *tensors, "silu", 0.25, *needs)
        torch.library.opcheck(ops.feed_forward_bwd_triton.default, args, **checks)
