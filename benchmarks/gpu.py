"""python -m benchmarks.gpu: is everything right on this GPU, and how fast is attention beside its rivals?

First the tests of tests/ops run with their calls on the GPU. Then attention is timed as FlashAttention's
authors do, 16384 tokens of width 2048, beside torch's three fused kernels, flash-attn and FlexAttention where
they are installed. Times are medians over alternating passes, with a cold L2. What a contender returns for
one head is judged by a float64 oracle before it is timed. (`python -m benchmarks --device cuda` times the
other operators, and the arguments that these rivals do not have.)
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastformer
from benchmarks import machine
from benchmarks.bench_attention import RIVALS
from benchmarks.case import forward, forward_and_backward
from fastformer.testing import assert_as_accurate, in_float64

TOKENS, WIDTH = 16384, 2048
LENGTHS, HEAD_DIMS = (512, 1024, 2048, 4096, 8192, 16384), (64, 128)
# Dense 16-bit products with float32 sums, TFLOP/s, of NVIDIA's data sheets.
DATA_SHEET = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}
# Products of the scores' size: two forward, five backward.
PRODUCTS = {False: 2, True: 7}
PASSES = 5
TESTS = ("test_attention*.py", "test_feed_forward.py", "test_norm.py", "test_paged_attention.py")


@dataclass(frozen=True)
class Shape:
    N: int
    D: int
    kind: str  # "full" or "causal"
    dtype: torch.dtype
    training: bool

    @property
    def size(self) -> tuple[int, int, int, int]:
        """(B, H, N, D)"""
        return TOKENS // self.N, WIDTH // self.D, self.N, self.D

    @property
    def flops(self) -> float:
        B, H, N, D = self.size
        scores = B * H * N * (N + 1) // 2 if self.kind == "causal" else B * H * N * N
        return PRODUCTS[self.training] * 2 * D * scores

    def __str__(self) -> str:
        both = "forward+backward" if self.training else "forward"
        return f"{both} {self.kind} D={self.D} N={self.N} {str(self.dtype).removeprefix('torch.')}"


def shapes(quick: bool) -> list[Shape]:
    return [
        Shape(N, D, kind, dtype, training)
        for dtype in ((torch.bfloat16,) if quick else (torch.bfloat16, torch.float16))
        for training in (False, True)
        for D in HEAD_DIMS
        for kind in ("full", "causal")
        for N in ((1024, 4096) if quick else LENGTHS)
    ]


def contenders(kind: str) -> dict[str, Callable]:
    """Name -> attention of [B, H, N, D] tensors, of everything that is installed."""
    causal = kind == "causal"
    found: dict[str, Callable] = {
        name: functools.partial(_sdpa, backend, causal)
        for name, backend in (
            ("torch flash", SDPBackend.FLASH_ATTENTION),
            ("torch cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("torch efficient", SDPBackend.EFFICIENT_ATTENTION),
        )
    }
    if importlib.util.find_spec("flash_attn"):
        found["flash-attn"] = functools.partial(_flash_attn, causal)
    found["FlexAttention"] = functools.partial(_flex, causal)
    for backend in ("cuda", "triton"):
        found[f"fastformer {backend}"] = functools.partial(
            fastformer.attention, causal=causal, backend=backend
        )
    return found


def _sdpa(backend: SDPBackend, causal: bool, query, key, value):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def _flash_attn(causal: bool, query, key, value):
    from flash_attn import flash_attn_func

    rows = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, N, H, D]
    return flash_attn_func(*rows, causal=causal).transpose(1, 2)


def _flex(causal: bool, query, key, value):
    mask = _block_mask(query.shape[2], query.device) if causal else None
    return _compiled_flex()(query, key, value, block_mask=mask)


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _block_mask(N: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, N, N, device=str(device))


def draw(shape: Shape, device: str) -> tuple[torch.Tensor, ...]:
    """query, key and value, and where gradients are wanted the output's."""
    generator = torch.Generator(device).manual_seed(0)
    count = 4 if shape.training else 3
    drawn = [
        torch.randn(shape.size, generator=generator, dtype=shape.dtype, device=device) for _ in range(count)
    ]
    return *(tensor.requires_grad_(shape.training) for tensor in drawn[:3]), *drawn[3:]


def judge(shape: Shape, inputs: tuple[torch.Tensor, ...]) -> Callable[[object], None]:
    """Raises AssertionError where a contender's first head is wrong; heads know nothing of each other."""
    of_head = tuple(_first_head(tensor) for tensor in inputs)
    both = _direction(shape)
    naive = both(RIVALS[shape.kind].naive)
    baseline, oracle = naive(*of_head), naive(*in_float64(of_head))

    def judged(results: object) -> None:
        results = tuple(_first_head(t) for t in results) if shape.training else _first_head(results)
        assert_as_accurate(results, baseline, oracle)

    return judged


def _first_head(tensor) -> torch.Tensor:
    return tensor[:1, :1].detach().clone().requires_grad_(tensor.requires_grad)


def _direction(shape: Shape) -> Callable[[Callable], Callable]:
    return forward_and_backward if shape.training else forward


@dataclass
class Row:
    shape: str
    contender: str
    seconds: float | None  # median over passes; None where it is not right or cannot run
    tflops: float | None
    detail: str = ""


def measure(shape: Shape, device: str) -> Iterator[Row]:
    """A row for each contender: who is right is timed, in alternating passes."""
    from triton.testing import do_bench

    inputs = draw(shape, device)
    judged = judge(shape, inputs)
    right: dict[str, Callable] = {}
    for name, function in contenders(shape.kind).items():
        run = _direction(shape)(function)
        try:
            judged(run(*inputs))
            right[name] = run
        except Exception as error:  # a contender that cannot run is a result, not the end of the run
            detail = (str(error).strip().splitlines() or [""])[0]
            yield Row(str(shape), name, None, None, f"{type(error).__name__}: {detail}")
    times: dict[str, list[float]] = {name: [] for name in right}
    for number in range(PASSES):
        for name in list(right)[:: -1 if number % 2 else 1]:
            milliseconds = do_bench(
                lambda run=right[name]: run(*inputs), warmup=10, rep=50, return_mode="median"
            )
            times[name].append(milliseconds / 1e3)
    for name, found in times.items():
        seconds = statistics.median(found)
        yield Row(str(shape), name, seconds, shape.flops / seconds / 1e12)


def peaks(device: str) -> dict[str, float]:
    """TFLOP/s that a fraction can be taken of: a large product's, and the data sheet's if it is known."""
    found = {"matmul": machine.matmul_gflops(device, torch.bfloat16) / 1e3}
    name = torch.cuda.get_device_name(device)
    for chip, tflops in DATA_SHEET.items():
        if chip in name:
            found["data sheet"] = float(tflops)
    return found


def table(rows: list[Row], of: dict[str, float]) -> Table:
    drawn = Table(title="attention", title_justify="left")
    for column in ("call", "contender", "ms", "TFLOP/s", *(f"of {name}" for name in of)):
        drawn.add_column(column)
    for row in rows:
        if row.seconds is None or row.tflops is None:
            drawn.add_row(row.shape, row.contender, row.detail)
            continue
        shares = (f"{row.tflops / peak:.2f}" for peak in of.values())
        drawn.add_row(row.shape, row.contender, f"{row.seconds * 1e3:.3f}", f"{row.tflops:.0f}", *shares)
    return drawn


def is_right(quick: bool) -> bool:
    """Whether the contract's tests pass with their calls on the GPU, by choice and by each backend alone.

    With pytest-xdist on all cores: most of the time goes to Triton's compiler and to oracles."""
    root = Path(__file__).parents[1]
    files = [str(path) for pattern in TESTS for path in sorted((root / "tests" / "ops").glob(pattern))]
    passed = True
    spread = ["-n", "auto"] if importlib.util.find_spec("xdist") else []
    for backend in ("auto", "cuda", "triton"):
        options = ["-q", *spread, "-p", "tests.ops.gpu_plugin", f"--gpu-backend={backend}"]
        if not quick:
            options += ["-m", "slow or not slow"]
        print(f"the contract's tests, backend {backend}:", flush=True)
        passed &= subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=root).returncode == 0
    return passed


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: all is right. 1: something is not. 2: there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few shapes, and the tests that are not slow")
    parser.add_argument("--skip-tests", action="store_true", help="time only")
    parser.add_argument("--json", type=Path, help="write all rows and what they were measured on here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"no GPU here: torch {torch.__version__} sees none, and nothing was measured", file=sys.stderr)
        return 2
    passed = options.skip_tests or is_right(options.quick)
    device = "cuda"
    of = peaks(device)
    rows: list[Row] = []
    for shape in shapes(options.quick):
        print(shape, flush=True)
        try:
            with torch.set_grad_enabled(shape.training):
                rows += measure(shape, device)
        except torch.cuda.OutOfMemoryError:
            rows.append(Row(str(shape), "oracle", None, None, "this GPU has not the memory for it"))
    Console(width=160).print(table(rows, of))
    wrong = [row for row in rows if row.seconds is None and row.contender.startswith("fastformer")]
    for row in wrong:
        print(f"NOT RIGHT: {row.contender}, {row.shape}: {row.detail}")
    if options.json:
        found = {"run": machine.description(device), "peaks": of, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if passed and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
