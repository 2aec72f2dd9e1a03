"""Triton's kernels without a GPU: what a launcher launches is caught, compiled for any target, run by ptxvm.

The launcher runs as it is; only the jitted kernels of its module are exchanged, so that grids, arguments and
their specialisation are the ones that a GPU would get.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from fastformer.triton_kernels import (
    attention_bwd,
    attention_call,
    attention_fwd,
    attention_rows,
    attention_sums,
    column_sums,
    feed_forward,
    feed_forward_bwd,
    gemm,
    norm_bwd,
    norm_fwd,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from fastformer.backends import triton as backend
from tests import ptxvm

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")},
}
# Bytes of shared memory that one program may use.
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}
LAUNCHERS = (
    norm_fwd,
    norm_bwd,
    attention_call,
    attention_fwd,
    attention_rows,
    attention_sums,
    attention_bwd,
    feed_forward,
    feed_forward_bwd,
    gemm,
    column_sums,
)


class Launch(NamedTuple):
    """One caught launch."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple
    options: dict


class _StandIn:
    def __init__(self, kernel, run):
        self.kernel, self.run = kernel, run

    def __getitem__(self, grid):
        return lambda *args, **options: self.run(Launch(self.kernel, grid, args, options))


def catch_launches(monkeypatch, target, run, sm_count=1):
    """Have the launchers believe in `target` with so many multiprocessors, and hand every Launch to `run`."""
    told = {
        "TARGET": TARGETS[target].backend,
        "arch": lambda device: target,
        "sm_count": lambda device: sm_count,
    }
    for module in LAUNCHERS:
        for name in told.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, told[name])
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _StandIn(value, run))


def compile_launch(launch, target):
    """Compile a Launch as Triton would: (compiled, {runtime argument: value})."""
    kernel, _, args, options = launch
    for arg in args:
        assert not (isinstance(arg, tuple) and any(isinstance(item, TensorDescriptor) for item in arg)), (
            "Triton 3.7 launches no descriptor inside a tuple"
        )
    compiler = make_backend(TARGETS[target])
    binder = create_function_from_signature(kernel.signature, kernel.params, compiler)
    bound, specialization, parsed = binder(*args, debug=False, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        compiler, {"debug": False, **options}, bound, specialization, parsed
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=parsed.__dict__)
    return compiled, {name: bound[name] for name, kind in signature.items() if kind != "constexpr"}


class Resources(NamedTuple):
    """What a compiled kernel takes of the chip."""

    registers: int
    spilled: int  # bytes a thread, everything that lies in local memory included
    shared: int  # bytes a program


def resources(compiled):
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        number = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))
        # Scalar registers spill to lanes of vector registers: that is no memory.
        spilled = 4 * number("vgpr_spill_count")
        return Resources(
            number("vgpr_count"), spilled + number("private_segment_fixed_size"), compiled.metadata.shared
        )
    return cubin_resources(compiled.asm["cubin"])._replace(shared=compiled.metadata.shared)


def cubin_resources(cubin, function=""):
    """`Resources` of a kernel in a cubin, its only one where none is named; of shared memory what is known
    when it is compiled."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([cuobjdump, "-res-usage", file.name], text=True)
    of_kernel = text[text.index(f"Function {function}") :]
    number = lambda key: int(re.search(rf"\b{key}:(\d+)", of_kernel).group(1))
    return Resources(number("REG"), number("STACK") + number("LOCAL"), number("SHARED"))


class Emulation:
    """Runs every launch on ptxvm with all checks on; `counters` holds each kernel's latest, by its name.

    Like the interpreter's, its tensors are CPU tensors, and the backend serves them.
    """

    def __init__(self, monkeypatch, target):
        self.target, self.counters = target, {}
        catch_launches(monkeypatch, target, self._run)
        monkeypatch.setattr(backend, "_interpreting", lambda: True)

    def _run(self, launch):
        compiled, arguments = compile_launch(launch, self.target)
        counters = ptxvm.from_triton(compiled).launch(launch.grid, **arguments)
        self.counters[launch.kernel.__name__] = counters
