"""Compiles cases for a target without its chip, and reads what their kernels take and do."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.triton.offline import Launch, catch_launches, compile_launch, cubin_resources, resources

from . import hot_loop, sass
from .attention_cases import attention_cases
from .case import Case
from .cuda_cases import CACHE, cuda_attention_backward_cases, cuda_attention_cases
from .cuda_feed_forward_cases import cuda_feed_forward_cases
from .cuda_norm_cases import cuda_norm_cases
from .cuda_sums_cases import cuda_attention_sums_cases
from .feed_forward_cases import feed_forward_cases
from .hot_loop import HotLoop
from .norm_cases import norm_cases

# {operator and direction: what yields its cases, given a target}. An operator joins with one entry.
CASES: dict[str, Callable[[str], Iterator[Case]]] = {
    "norm_fwd": partial(norm_cases, "norm_fwd"),
    "norm_bwd": partial(norm_cases, "norm_bwd"),
    "norm_fwd_cuda": partial(cuda_norm_cases, "norm_fwd_cuda"),
    "norm_bwd_cuda": partial(cuda_norm_cases, "norm_bwd_cuda"),
    "attention_fwd": partial(attention_cases, "attention_fwd"),
    "attention_fwd_cuda": partial(cuda_attention_cases, "attention_fwd_cuda"),
    "attention_weights": partial(attention_cases, "attention_weights"),
    "attention_bwd": partial(attention_cases, "attention_bwd"),
    "attention_bwd_cuda": partial(cuda_attention_backward_cases, "attention_bwd_cuda"),
    "attention_sums_cuda": partial(cuda_attention_sums_cases, "attention_sums_cuda"),
    "feed_forward_fwd": partial(feed_forward_cases, "feed_forward_fwd"),
    "feed_forward_bwd": partial(feed_forward_cases, "feed_forward_bwd"),
    "feed_forward_cuda": partial(cuda_feed_forward_cases, "feed_forward_cuda"),
}


@dataclass(frozen=True)
class Reading:
    """One kernel of one case, compiled for one target."""

    target: str
    op: str
    case: str
    dim: int | None
    gated: bool
    kernel: str
    tile: str  # its constants and warps
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    loop: HotLoop | None  # None but on NVIDIA's chips
    tensor_cores: bool = False  # as the case says
    bytes_per_slot: float | None = None  # of DRAM, to an issue slot of the whole kernel
    repeats: float = 1.0  # times that the hot loop runs each of its products, by all warps together


def _model_version() -> bytes:
    """A changed model or parser reads everything anew."""
    return b"".join(Path(module.__file__).read_bytes() for module in (sass, hot_loop))


def _hot_loop(cubin: bytes) -> HotLoop:
    """Kept, because disassembling takes longer than loading from Triton's own cache."""
    key = hashlib.sha256(_model_version() + cubin).hexdigest()
    kept = CACHE / f"{key}.json"
    if kept.exists():
        return HotLoop(**json.loads(kept.read_text()))
    found = hot_loop.hot_loops(*sass.parse(sass.disassemble(cubin)))[0]
    CACHE.mkdir(parents=True, exist_ok=True)
    # Written under another name first, because two processes may read the same kernel.
    written = kept.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(asdict(found)))
    written.replace(kept)
    return found


def _tile(launch: Launch) -> str:
    named = {name: value for name, value in launch.options.items() if name != "enable_fp_fusion"}
    return " ".join(f"{name}={value}" for name, value in named.items())


# Products in each kernel's hot loop for a pair of a query and a key: of D columns, and of D_v.
PRODUCTS = {"attention_fwd": (1, 1), "key_gradients": (2, 2), "query_gradients": (2, 1)}


def _repeats(kernel: str, launch: Launch, loop: HotLoop | None) -> float:
    """More than 1 where warps cannot share a tile's queries and columns, and multiply the same numbers. Not
    told of one warp's rows, of few queries, which warps share by columns alone."""
    if kernel not in PRODUCTS or not loop or not loop.kflop:
        return 1.0
    block_m, block_n, *widths = (launch.options[f"BLOCK_{name}"] for name in ("M", "N", "D", "DV"))
    if kernel == "attention_fwd" and block_m <= 16:
        return 1.0
    columns = sum(count * width for count, width in zip(PRODUCTS[kernel], widths, strict=True))
    return loop.kflop * 1e3 * launch.options["num_warps"] / (2 * block_m * block_n * columns)


def read(case: Case, target: str) -> list[Reading]:
    """A reading for each kernel that the case launches, one for those that Triton compiles once."""
    if case.compiled:
        return [_read_compiled(case, target)]
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        catch_launches(patch, target, launches.append)
        case.call()
    assert launches, f"{case.op}, {case.name}: nothing was launched"
    readings, seen = [], set()
    for launch in launches:
        compiled, _ = compile_launch(launch, target)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        loop = _hot_loop(compiled.asm["cubin"]) if "cubin" in compiled.asm else None
        kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
        place = target, case.op, case.name, case.dim, case.gated, kernel, _tile(launch)
        found = *resources(compiled), loop, case.tensor_cores
        readings.append(Reading(*place, *found, repeats=_repeats(kernel, launch, loop)))
    return readings


def _read_compiled(case: Case, target: str) -> Reading:
    compiled = case.call(target)
    registers, spilled, shared = cubin_resources(compiled.cubin, compiled.function)
    place = target, case.op, case.name, case.dim, case.gated, compiled.kernel, compiled.tile
    found = registers, spilled, shared + compiled.dynamic_shared
    loop = _hot_loop(compiled.cubin) if not compiled.function else None
    return Reading(*place, *found, loop, case.tensor_cores, compiled.bytes_per_slot)


def read_place(place: tuple[str, str, int]) -> list[Reading]:
    """`read` of (operator and direction, target, the case's number): what can be sent to another process."""
    op, target, number = place
    return read(list(CASES[op](target))[number], target)
