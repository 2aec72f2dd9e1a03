"""What a run was measured on: device, versions, threads, and the speed of a large matrix product."""

from __future__ import annotations

import importlib.metadata
import platform
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.case import clock


def description(device: str) -> dict:
    """What the report's first lines say."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "device_type": device,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "fastformer", "transformers")},
    }


def matmul_gflops(device: str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """The best of many square products in `dtype`: a peak that can be reached, not the data sheet's.

    A float32 product is IEEE float32 (torch's default; TF32 stays off). 1536 cubed on a CPU, 8192 on a GPU.
    """
    size = 8192 if device == "cuda" else 1536
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.mm(left, right)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = clock()
        torch.mm(left, right, out=out)
        best = min(best, clock() - start)
    return 2 * size**3 / best / 1e9


def fma_gflops(threads: int, seconds: float = 0.005) -> list[float]:
    """One measurement of `threads` cores that multiply and add float32 in registers, all at once.

    Empty where there is no extension to do it.
    """
    try:
        from fastformer import _C
    except ImportError:
        return []
    # A pool of threads that has just worked spins for a while before it sleeps.
    time.sleep(0.005)
    together = threading.Barrier(threads)

    def one_of_them(_: int) -> float:
        together.wait()
        return _C.fma_rate(seconds)

    with ThreadPoolExecutor(threads) as pool:
        return [sum(pool.map(one_of_them, range(threads))) / 1e9]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
