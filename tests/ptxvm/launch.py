"""Public API: load PTX, pick a kernel, launch it on CPU tensors."""

import struct
import time
from dataclasses import dataclass

import numpy as np

from . import ops, tensormap  # noqa: F401  (ops fills the opcode registries)
from .counters import Counters
from .errors import PtxError
from .machine import Machine
from .memory import WINDOW, Buffer, GlobalMemory
from .parse import TYPE_BYTES, inline_calls, parse


@dataclass
class Checks:
    """What a launch verifies besides bounds and alignment."""

    uninitialized: bool = True  # shared memory read before written
    races: bool = True  # unordered shared-memory accesses of different warps
    proxy_fences: bool = True  # wgmma / TMA reads of ordinary writes that no fence.proxy.async covers
    schedule_seed: int = None  # run one random warp at a time, instead of all warps at the same pc together
    max_idle_steps: int = (
        200_000  # basic blocks run without any store or barrier before calling it a livelock
    )


class TensorMap:
    """Stand-in for a CUtensorMap argument: a strided tensor, a box and a swizzle (none, 32B, 64B, 128B).

    `box` is given like the tensor's shape (outermost first); coordinates in PTX are innermost first.
    """

    def __init__(self, tensor, box, swizzle="none"):
        self.tensor, self.box, self.swizzle = tensor, tuple(box), swizzle


def _storage_bytes(t):
    """The bytes of the whole storage behind a torch or numpy array."""
    if isinstance(t, np.ndarray):
        while isinstance(t.base, np.ndarray):
            t = t.base
        if not t.flags.c_contiguous:
            raise PtxError("numpy arguments must be views of C-contiguous arrays")
        return t.reshape(-1).view(np.uint8)
    import torch

    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy()


class StructArg:
    """A by-value struct parameter: a struct-module format whose Q fields may be tensors (pointers)."""

    def __init__(self, fmt, *fields):
        self.fmt, self.fields = fmt, fields


class Arguments:
    """Turns launch arguments into the parameter block, mapping tensors into global memory."""

    def __init__(self, memory):
        self.memory, self.by_storage = memory, {}

    def pointer(self, name, t):
        """Address of a tensor's first element; tensors that share storage share the allocation."""
        data = _storage_bytes(t)
        start = data.__array_interface__["data"][0]
        key = (start, data.size)
        if key not in self.by_storage:
            self.by_storage[key] = self.memory.add(name, data)
        first = t.__array_interface__["data"][0] if isinstance(t, np.ndarray) else t.data_ptr()
        if data.size and not first:  # torch tells no address of a view without elements
            return 0
        return self.by_storage[key].base + (first - start if data.size else 0)

    def encode(self, param, arg, name):
        """Bytes of one argument."""
        if isinstance(arg, TensorMap):
            t = arg.tensor
            numpy = isinstance(t, np.ndarray)
            elem = t.itemsize if numpy else t.element_size()
            strides = t.strides if numpy else [x * elem for x in t.stride()]
            block = tensormap.encode(self.pointer(name, t), t.shape, strides, arg.box, elem, arg.swizzle)
            if param.size == 128:
                return block
            where = self.memory.add(f"{name} (tensor map)", np.frombuffer(bytearray(block), np.uint8))
            return where.base.to_bytes(8, "little")
        if hasattr(arg, "data_ptr") or isinstance(arg, np.ndarray):
            return self.pointer(name, arg).to_bytes(8, "little")
        if isinstance(arg, StructArg):
            fields = [
                self.pointer(f"{name} field {i}", f)
                if hasattr(f, "data_ptr") or isinstance(f, np.ndarray)
                else f
                for i, f in enumerate(arg.fields)
            ]
            return struct.pack(arg.fmt, *fields)
        if arg is None:
            return bytes(max(param.size, 8))
        if isinstance(arg, (bytes, bytearray)):
            return bytes(arg)
        if isinstance(arg, np.generic):
            return arg.tobytes()
        n = param.size
        if param.type in ("f32", "f64", "f16") or isinstance(arg, float):
            return np.array(arg, {2: "f2", 4: "f4", 8: "f8"}[n]).tobytes()
        return (int(arg) & ((1 << 8 * n) - 1)).to_bytes(n, "little")


class Kernel:
    """An entry point of a module."""

    def __init__(self, module, function):
        self.module, self.name, self.params = module, function.name, function.params
        for p in self.params:
            p.size = p.size or TYPE_BYTES[p.type]
        self.directives = function.directives
        self.body, self.vars = inline_calls(module.parsed, function)
        self.flow = None  # its basic blocks, from the first launch on
        self.module_shared = [v for v in module.parsed.vars.values() if v.space == "shared"]

    def check_limits(self, block):
        """The launch bounds the driver would enforce."""
        threads = int(np.prod(block))
        required, most = self.directives.get("reqntid"), int(np.prod(self.directives.get("maxntid", [1024])))
        if not 0 < threads <= most:
            raise PtxError(f"{self.name}: {threads} threads per block, at most {most} allowed")
        if required and tuple(required + [1] * (3 - len(required))) != tuple(block):
            raise PtxError(f"{self.name}: block {block}, but .reqntid is {required}")

    def launch(self, grid, block, args, shared_bytes=0, checks=None):
        """Run the kernel. Tensor arguments (torch CPU tensors or numpy arrays) are updated in place.

        grid, block: ints or up to 3-tuples. args: one per kernel parameter, in order: tensors for
        pointers, Python or numpy scalars, bytes for structs, TensorMap, None for a null pointer.
        Returns Counters.
        """
        start = time.time()
        three = lambda v: tuple(v) + (1,) * (3 - len(v)) if isinstance(v, (tuple, list)) else (int(v), 1, 1)
        if len(args) != len(self.params):
            raise PtxError(f"{self.name} takes {len(self.params)} arguments, got {len(args)}")
        self.check_limits(three(block))
        memory, symbols = GlobalMemory(), {}
        binder = Arguments(memory)
        params = bytearray()
        for i, (p, arg) in enumerate(zip(self.params, args, strict=False)):
            params += bytes(-len(params) % p.align)
            data = binder.encode(p, arg, f"argument {i} ({p.name})")
            if len(data) != p.size:
                raise PtxError(
                    f"{self.name}: argument {i} ({p.name}) is {len(data)} bytes, expected {p.size}"
                )
            params += data
        const = self.module.place_variables(memory, symbols)
        counters = Counters()
        machine = Machine(
            self,
            three(grid),
            three(block),
            np.frombuffer(bytes(params) + bytes(16), np.uint8),
            memory,
            symbols,
            const,
            shared_bytes,
            checks or Checks(),
            counters,
        )
        limit = {"sm_80": 163, "sm_87": 163, "sm_86": 99, "sm_89": 99, "sm_120": 99}.get(
            self.module.parsed.target.rstrip("af"), 227
        ) * 1024
        if machine.static_shared + shared_bytes > limit:
            raise PtxError(
                f"{self.name}: {machine.static_shared} static + {shared_bytes} dynamic bytes of shared "
                f"memory exceed the {limit} of {self.module.parsed.target}"
            )
        machine.run_grid()
        counters.wall_seconds = time.time() - start
        return counters


class Module:
    """A loaded PTX module; module-scope global variables live as long as it does."""

    def __init__(self, text):
        self.parsed = parse(text)
        self.globals = {
            v.name: np.frombuffer(bytearray(v.init or bytes(v.size)), np.uint8)
            for v in self.parsed.vars.values()
            if v.space == "global"
        }
        self._kernels = {}

    @property
    def kernels(self):
        return [f.name for f in self.parsed.functions.values() if f.entry]

    def kernel(self, name=None):
        """A kernel by name, by a unique part of its mangled name, or the only one."""
        hits = [k for k in self.kernels if k == name] or [
            k for k in self.kernels if name is None or name in k
        ]
        if len(hits) != 1:
            raise PtxError(f"kernel {name!r}: candidates are {self.kernels}")
        if hits[0] not in self._kernels:
            self._kernels[hits[0]] = Kernel(self, self.parsed.functions[hits[0]])
        return self._kernels[hits[0]]

    def place_variables(self, memory, symbols):
        """Put .global and .const variables in memory; returns the constant bank."""
        const = bytearray()
        for v in self.parsed.vars.values():
            if v.space == "global":
                symbols[v.name] = ("global", memory.add(v.name, self.globals[v.name]).base)
            elif v.space == "const":
                const += bytes(-len(const) % max(v.align, 1))
                symbols[v.name] = ("const", WINDOW["const"] + len(const))
                const += v.init or bytes(v.size)
        return Buffer("constant bank", np.frombuffer(bytes(const) + bytes(16), np.uint8), WINDOW["const"])


def load(ptx_text):
    """Parse PTX text into a Module."""
    return Module(ptx_text)


def _unfolded(kind, arg, boxes):
    """The runtime values of one Triton argument: a tuple lies unfolded among the kernel's parameters, and
    of a host's tensor descriptor the map, as `boxes` says that it was compiled, shape and strides."""
    if isinstance(kind, tuple):
        return [value for pair in zip(kind, arg, strict=True) for value in _unfolded(*pair, boxes)]
    if kind.startswith("tensordesc"):
        box = next(boxes)
        tensor = arg.base.as_strided(arg.shape, arg.strides)
        map = TensorMap(tensor, box["block_size"], tensormap.SWIZZLES[box["swizzle"]])
        return [map, *arg.shape, *arg.strides]
    return [] if kind == "constexpr" else [arg]


class TritonKernel:
    """A compiled Triton kernel (from triton.compile) ready to run here."""

    def __init__(self, compiled):
        self.compiled, self.meta = compiled, compiled.metadata
        self.kernel = load(compiled.asm["ptx"]).kernel(self.meta.name)
        self.signature = compiled.src.signature
        self.runtime_args = [n for n, t in self.signature.items() if t != "constexpr"]

    def launch(self, grid, checks=None, **args):
        """Launch with keyword arguments named as in the Triton function (runtime arguments only)."""
        missing = set(self.runtime_args) ^ set(args)
        if missing:
            raise PtxError(
                f"{self.kernel.name}: runtime arguments are {self.runtime_args}, mismatch: {missing}"
            )
        boxes = iter(getattr(self.meta, "tensordesc_meta", None) or ())
        values = [value for n in self.runtime_args for value in _unfolded(self.signature[n], args[n], boxes)]
        grid3 = tuple(grid) + (1,) * (3 - len(grid)) if isinstance(grid, (tuple, list)) else (grid, 1, 1)
        blocks = int(np.prod(grid3))
        hidden = len(self.kernel.params) - len(values)  # global scratch, profile scratch
        scratch = [None] * hidden
        if hidden and getattr(self.meta, "global_scratch_size", 0):
            size = self.meta.global_scratch_size
            scratch[0] = np.zeros(size * blocks * getattr(self.meta, "num_ctas", 1), np.uint8)
        return self.kernel.launch(grid3, 32 * self.meta.num_warps, values + scratch, self.meta.shared, checks)


def from_triton(compiled):
    """Wrap the result of triton.compile(ASTSource(...), target=GPUTarget('cuda', ...))."""
    return TritonKernel(compiled)
