"""Compile CUDA sources, to PTX for the emulator and to machine code, once for each content."""

import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest

from .launch import load

# Where compiled PTX is kept between runs; a conftest sets it to a folder of pytest's own cache.
cache_folder = None


def find_nvcc():
    """nvcc of NVCC, CUDA_HOME or PATH, of pip's nvidia-cuda-nvcc, or of the usual place; or None."""
    if os.environ.get("NVCC"):
        return os.environ["NVCC"]
    if os.environ.get("CUDA_HOME"):
        return str(Path(os.environ["CUDA_HOME"], "bin", "nvcc"))
    if on_path := shutil.which("nvcc"):
        return on_path
    places = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin/nvcc"), reverse=True)
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(place) for place in places if place.exists()), None)


@functools.cache
def _release(nvcc):
    return subprocess.check_output([nvcc, "--version"])


@functools.cache
def compile_module(source, arch, *flags):
    """The emulator's Module of `compile_text`."""
    return load(compile_text(source, arch, *flags))


def compile_text(source, arch, *flags):
    """The PTX of `source` compiled for compute_<arch> ("80", "90a")."""
    target = f"-gencode=arch=compute_{arch},code=compute_{arch}"
    return _compiled(source, "ptx", "-ptx", target, *flags).decode()


def compile_cubin(source, arch, *flags):
    """The machine code of `source` for sm_<arch>."""
    return _compiled(source, "cubin", "-cubin", f"-arch=sm_{arch}", *flags)


def _compiled(source, suffix, *flags):
    """What nvcc makes of `source`.

    Skips the test where nvcc is absent. The cache's key covers everything that lies beside the source or in
    a folder that `-I` names, so a changed header compiles again.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found (NVCC, CUDA_HOME, PATH, pip's nvidia-cuda-nvcc)")
    source = Path(source)
    command = ["-std=c++20", "-O3", *flags]
    key = hashlib.sha256(_release(nvcc))
    key.update(repr([source.name, *command]).encode())
    folders = {source.parent, *(Path(flag[2:]) for flag in flags if flag.startswith("-I"))}
    for path in sorted(path for folder in folders for path in folder.glob("*") if path.is_file()):
        key.update(path.name.encode() + path.read_bytes())
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(cache_folder or scratch, f"{source.stem}-{key.hexdigest()[:32]}.{suffix}")
        if not kept.exists():
            fresh = Path(scratch, "fresh")
            subprocess.run([nvcc, *command, str(source), "-o", str(fresh)], check=True)
            written = kept.with_suffix(f".{os.getpid()}")
            shutil.copy(fresh, written)
            written.replace(kept)
        return kept.read_bytes()
