"""What is measured on a GPU, as far as a machine without one can tell."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("triton")

from triton import testing

import fastformer
from benchmarks import gpu
from benchmarks.bench_attention import RIVALS
from tests.ops import gpu_plugin

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no GPU here" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["full", "causal"])
def test_who_is_wrong_is_not_timed(monkeypatch, kind, training):
    shape = gpu.Shape(32, 16, kind, torch.bfloat16, training)
    rivals = {
        "right": RIVALS[kind].torch,
        "wrong": lambda q, k, v: RIVALS[kind].torch(q, k, 1.1 * v),
        "absent": lambda q, k, v: 1 / 0,
    }
    monkeypatch.setattr(gpu, "WIDTH", 32)
    monkeypatch.setattr(gpu, "TOKENS", 64)
    monkeypatch.setattr(gpu, "contenders", lambda kind: rivals)
    monkeypatch.setattr(testing, "do_bench", lambda run, **options: (run(), 2.0)[1])
    rows = {row.contender: row for row in gpu.measure(shape, "cpu")}
    assert rows["right"].seconds == 2e-3
    products, scores = (7 if training else 2), (32 * 33 // 2 if kind == "causal" else 32 * 32)
    assert rows["right"].tflops == pytest.approx(products * 2 * 16 * 2 * 2 * scores / 2e-3 / 1e12)
    assert rows["wrong"].seconds is None and "absolute error" in rows["wrong"].detail
    assert rows["absent"].detail.startswith("ZeroDivisionError")
    assert "right" in str(gpu.table(list(rows.values()), {"matmul": 1.0}).columns[1]._cells)


def test_all_contenders_are_called_alike():
    causal, full = gpu.contenders("causal"), gpu.contenders("full")
    assert causal.keys() == full.keys() >= {"torch flash", "FlexAttention", "fastformer cuda"}


def test_a_moved_tensor_lies_as_it_did():
    tensor = torch.arange(60.0).view(3, 4, 5).transpose(0, 1)[1:, :, ::2].requires_grad_()
    copy = gpu_plugin.moved(tensor, "cpu")
    assert copy.stride() == tensor.stride() and copy.storage_offset() == tensor.storage_offset()
    assert copy.requires_grad and torch.equal(copy, tensor)
    assert copy.data_ptr() != tensor.data_ptr()


def test_the_plugin_moves_calls_of_fast_backends_alone():
    seen = []

    def fn(query, key, bias, scale, backend="absent"):
        seen.append((backend, query, key))
        return query * bias * scale

    query, bias = torch.ones(2, 3).requires_grad_(), torch.full((2, 3), 2.0)
    run = gpu_plugin.on_device("cpu", "triton")
    for backend, wanted in (("cpu", "triton"), (None, "triton"), ("reference", "reference")):
        results = run(fn, query=query, key=bias, bias=bias, scale=3.0, backend=backend)
        assert torch.equal(results["out0"], 6 * query) and results["d_query"].shape == query.shape
        assert seen[-1][0] == wanted
        assert (seen[-1][2].data_ptr() == bias.data_ptr()) == (wanted == "reference")
    run(fn, query=query, key=bias, bias=bias, scale=3.0)  # the plain formula's call stays where it is
    assert seen[-1][0] == "absent" and seen[-1][2] is bias


def test_gradients_of_outputs_move_too_and_a_named_backend_may_refuse():
    def fn(query, backend):
        raise fastformer.BackendError(f"backend {backend!r} does not")

    def twice(query, backend):
        return 2 * query

    grad = torch.full((3,), 5.0)
    query = torch.ones(3).requires_grad_()
    run = gpu_plugin.on_device("cpu", "triton")
    assert torch.equal(run(twice, query=query, backend=None, grad_outputs=[grad])["d_query"], 2 * grad)
    with pytest.raises(pytest.skip.Exception, match="triton"):
        run(fn, query=query, backend=None)
    with pytest.raises(fastformer.BackendError):
        gpu_plugin.on_device("cpu", None)(fn, query=query, backend=None)
