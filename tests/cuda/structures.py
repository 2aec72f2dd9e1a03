"""The structs of csrc that kernels take, for ctypes and for ptxvm, and the plans' own functions.

A struct has the layout that its header declares: its fields are read from the header's text.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from tests import ptxvm
from tests.ptxvm import nvcc

CSRC = Path(__file__).parents[2] / "csrc"
HERE = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALARS = {
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "uint32_t": ctypes.c_uint32,
    "float": ctypes.c_float,
}
CODES = {ctypes.c_void_p: "Q", ctypes.c_int64: "q", ctypes.c_uint32: "I", ctypes.c_float: "f"}
_structures = {}


def structure(header, name):
    """A ctypes.Structure with the fields of a struct of csrc/`header`. What its fields are made of must have
    been read before."""
    body = re.search(rf"struct {name} {{\n(.*?)\n}};", (CSRC / header).read_text(), re.DOTALL)[1]
    fields = []
    for declaration in re.findall(r"^\s*([^(/\n]+);", body, re.MULTILINE):
        plain = re.sub(r"\s*=\s*[^,]+", "", declaration.strip())
        type_name, names = re.fullmatch(r"(.*?[ *]) *([\w, ]+)", plain).groups()
        kind = ctypes.c_void_p if "*" in type_name else SCALARS.get(type_name.strip(), ctypes.c_int32)
        kind = _structures.get(type_name.strip(), kind)
        fields += [(each.strip(), kind) for each in names.split(",")]
    _structures[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return _structures[name]


def _leaves(kind, prefix=""):
    for name, of_field in kind._fields_:
        if issubclass(of_field, ctypes.Structure):
            yield from _leaves(of_field, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", of_field


def struct_argument(params, tensors):
    """`params` as an argument of a kernel, by value. `tensors`: {path of a field, such as "query.data": what
    it points to}; a pointer that is not in there is null."""
    leaves = list(_leaves(type(params)))
    assert tensors.keys() <= {path for path, kind in leaves if kind is ctypes.c_void_p}
    values = []
    for path, kind in leaves:
        value = functools.reduce(getattr, path.split("."), params)
        values.append(tensors.get(path, 0) if kind is ctypes.c_void_p else value)
    return ptxvm.StructArg("".join(CODES.get(kind, "i") for _, kind in leaves) + "0q", *values)


@functools.cache
def plans():
    """The plans' headers as a shared library."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler was found (g++, c++, clang++, CXX)")
    headers = sorted((CSRC / "cuda").glob("*_plan.h"))
    sources = [HERE / "plan.cpp", CSRC / "shapes.h", *headers]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:32]
    library = Path(nvcc.cache_folder, f"plan-{key}.so")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=nvcc.cache_folder) as scratch:
            fresh = Path(scratch, "plan.so")
            command = [*compiler.split(), "-std=c++20", "-shared", "-fPIC", f"-I{CSRC}"]
            subprocess.run([*command, str(sources[0]), "-o", str(fresh)], check=True)
            fresh.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.kernel_name.restype = ctypes.c_char_p
    for chosen in (loaded.attention_is_chosen, loaded.attention_backward_is_chosen):
        chosen.restype = ctypes.c_bool
    for name, fields in _structures.items():
        if name.endswith("Params"):
            assert ctypes.sizeof(fields) == getattr(loaded, f"size_of_{name}")()
    return loaded


def poisoned(shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype)
