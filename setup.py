"""How the extension fastformer._C is compiled: which csrc files, with which flags, and nothing else.

build_ext writes one build.ninja into build/<platform>-<python>, whatever temporary folder pip builds in, so
that an unchanged rebuild does no work. Three environment variables steer it: FASTFORMER_CUDA=0 leaves the
CUDA half out, TORCH_CUDA_ARCH_LIST (torch's syntax, "8.0 9.0a 12.0+PTX") names the GPU architectures,
FASTFORMER_SANITIZE ("address,undefined" or "thread") makes the CPU half alone for `make sanitize`, in a
folder of its own. CXX and CUDA_HOME say which compilers.

Without a C++ compiler the package installs as pure Python, without nvcc as its CPU half, and stderr says
what is missing. A source that does not compile fails the installation.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SANITIZE = os.environ.get("FASTFORMER_SANITIZE", "")
if SANITIZE not in ("", "address,undefined", "thread"):
    raise SystemExit(f"FASTFORMER_SANITIZE must be address,undefined or thread, not {SANITIZE!r}")
# Relative to ROOT, like every path of our own in build.ninja, so that __FILE__ in messages names csrc/...
PLATFORM = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
BUILD = Path("build", "sanitize", SANITIZE.split(",")[0], PLATFORM) if SANITIZE else Path("build", PLATFORM)

# The oldest libtorch whose stable ABI we may call: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX_FLAGS = ["-std=c++20", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Beyond `undefined`: a float out of an integer's range. No report may be passed over.
SANITIZER_FLAGS = [f"-fsanitize={SANITIZE.replace('undefined', 'undefined,float-cast-overflow')}"]
SANITIZER_FLAGS += ["-fno-sanitize-recover=all", "-O1", "-g", "-fno-omit-frame-pointer"]
CXX_FLAGS += SANITIZER_FLAGS if SANITIZE else ["-O3"]
# Vector loops may select instead of branch, and sqrt need not set errno. Never -ffast-math: NaN and inf are
# data.
# A product and a sum round separately unless fma() asks otherwise: all backends owe the same bits there.
CPU_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi"]
# g++ 12's own intrinsics headers warn of uninitialised variables; the sse2 level still watches ours.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512BF16_FLAGS = [*AVX512_FLAGS, "-mavx512bf16"]
X86_LEVELS = {"sse2": [], "avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS, "avx512bf16": AVX512BF16_FLAGS}
DEFAULT_CUDA_ARCHS = ["8.0", "9.0", "10.0", "12.0"]


def isa_levels() -> dict[str, list[str]]:
    """Level name (FASTFORMER_ISA in csrc/cpu/kernels*.cpp) -> compiler flags, lowest first."""
    return X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}


def find_compiler() -> list[str] | None:
    """The C++ compiler's command, CXX first."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    return [found] if found else None


def find_ninja() -> list[str] | None:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    return [found] if found else None


def why_pure_python() -> str | None:
    """What this machine lacks for building the extension at all, or None."""
    if sys.platform != "linux":
        return "fastformer._C is built on Linux only"
    if find_compiler() is None:
        return "no C++20 compiler was found (g++, clang++ or CXX)"
    if find_ninja() is None:
        return "ninja was not found (pip install ninja)"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 was not found (pip install pybind11)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h was not found (the Python development package, such as python3-dev)"
    return None


@dataclasses.dataclass(frozen=True)
class Nvcc:
    path: Path
    version: str
    archs: list[str]  # as in TORCH_CUDA_ARCH_LIST: "9.0", "9.0a", "12.0+PTX"

    def gencode(self) -> list[str]:
        flags = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags

    def library_flags(self) -> list[str]:
        """pip's toolkit keeps libcudart_static.a in lib, where its own nvcc does not look."""
        folder = self.path.parent.parent / "lib"
        return [f"-L{folder}"] if (folder / "libcudart_static.a").exists() else []


def find_nvcc_path() -> Path | None:
    """nvcc of CUDA_HOME, of PATH, of pip's nvidia-cuda-nvcc, or of the usual place, in this order."""
    places = [Path(os.environ["CUDA_HOME"], "bin", "nvcc")] if os.environ.get("CUDA_HOME") else []
    if on_path := shutil.which("nvcc"):
        places.append(Path(on_path))
    places += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin/nvcc"), reverse=True)
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((place for place in places if place.exists()), None)


def cuda_archs(nvcc: Path) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or those of our defaults that this nvcc knows, with PTX of the newest."""
    asked = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,"))
    if asked != [""]:
        for arch in asked:
            if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", arch):
                raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {arch!r} is not like 9.0, 9.0a or 12.0+PTX")
        return asked
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
    archs = [arch for arch in DEFAULT_CUDA_ARCHS if f"compute_{arch.replace('.', '')}" in known]
    return [*archs[:-1], f"{archs[-1]}+PTX"]


def find_cuda() -> tuple[Nvcc | None, str]:
    """The CUDA compiler to use, or None and the reason why the CUDA half is left out."""
    if os.environ.get("FASTFORMER_CUDA") == "0":
        return None, "FASTFORMER_CUDA=0 was set"
    if SANITIZE:
        return None, "FASTFORMER_SANITIZE was set"
    path = find_nvcc_path()
    if path is None:
        return None, "nvcc was not found (CUDA_HOME, PATH, pip's nvidia-cuda-nvcc)"
    version = re.search(r"V(\d+\.\d+\.\d+)", subprocess.check_output([path, "--version"], text=True))
    if version is None or int(version[1].split(".")[0]) < 12:
        return None, f"nvcc {version[1] if version else '?'} is older than 12.0, the first with C++20"
    return Nvcc(path, version[1], cuda_archs(path)), ""


class NinjaFile:
    """Collects rules and edges; every command runs in ROOT."""

    def __init__(self) -> None:
        self.lines = [f"builddir = {BUILD}"]
        self.objects: list[str] = []

    def rule(self, name: str, command: list[str], tail: str, depfile: bool = True) -> None:
        self.lines += ["", f"rule {name}", f"  description = {name} $out"]
        self.lines += [f"  command = {_escape(command)} {tail}"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, flags: list[str], suffix: str = "") -> None:
        target = BUILD / source.relative_to("csrc").with_suffix(f"{suffix}.o")
        self.lines += ["", f"build {target}: {rule} {source}", f"  flags = {_escape(flags)}"]
        self.objects.append(str(target))

    def link(self, target: Path) -> None:
        self.lines += ["", f"build {target}: link {' '.join(self.objects)}", f"default {target}", ""]

    def write(self, path: Path) -> None:
        path.write_text("\n".join(self.lines))


def _escape(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _system_includes(*folders: str) -> list[str]:
    return [word for folder in folders for word in ("-isystem", folder)]


def _sources(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").glob(pattern))


def write_ninja(target: Path, compiler: list[str], nvcc: Nvcc | None, no_cuda: str) -> Path:
    """Write build.ninja, which makes `target` from csrc/; both halves' object files lie beside it."""
    import pybind11
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    # The version in every command: another torch means other headers, so everything is compiled again.
    torch_version = f'-DFASTFORMER_TORCH="{importlib.metadata.version("torch")}"'
    torch_flags = [TORCH_TARGET, torch_version, *_system_includes(*include_paths())]
    prefix_maps = [f"-ffile-prefix-map={path}/=" for path in include_paths()]
    cuda_sources = _sources("register_cuda.cpp") + _sources("cuda/*.cu") if nvcc else []

    ninja = NinjaFile()
    ninja.rule("cxx", [*compiler, *CXX_FLAGS, "-Icsrc"], "$flags -MMD -MF $out.d -c $in -o $out")
    if nvcc and cuda_sources:
        host_flags = ",".join(["-fPIC", "-fvisibility=hidden", *prefix_maps])
        nvcc_command = [str(nvcc.path), "-ccbin", compiler[-1], "-std=c++20", "-O3", "-DNDEBUG", "-Icsrc"]
        nvcc_command += [f"-Xcompiler={host_flags}", "-DUSE_CUDA", *nvcc.gencode()]
        ninja.rule("nvcc", nvcc_command, "$flags -MMD -MF $out.d -c $in -o $out")
        link = [str(nvcc.path), "-ccbin", compiler[-1], "-shared", "-cudart", "static", "-nodlink"]
        link += ["-Xlinker=--exclude-libs,ALL", "-Xlinker=-s", *nvcc.library_flags()]
    else:
        link = [*compiler, "-shared", "-Wl,--exclude-libs,ALL", *(SANITIZER_FLAGS if SANITIZE else ["-s"])]
    ninja.rule("link", link, f"-o $out $in {_escape([f'-L{TORCH_LIB_PATH}'])} -ltorch_cpu", depfile=False)

    for source in cuda_sources:
        ninja.compile("nvcc", source, torch_flags)
    # Kernels get no torch headers: an inline function of torch compiled here would carry AVX-512 code into
    # the whole module.
    kernels = _sources("cpu/kernels*.cpp")
    for level, flags in reversed(isa_levels().items()):
        for source in kernels:
            level_flags = [*CPU_FLAGS, *flags, f"-DFASTFORMER_ISA={level}"]
            ninja.compile("cxx", source, level_flags, suffix=f".{level}")
    have_levels = [f"-DFASTFORMER_HAVE_{level.upper()}" for level in isa_levels()]
    for source in _sources("cpu/*.cpp"):
        if source not in kernels:
            ninja.compile("cxx", source, [*CPU_FLAGS, *have_levels, *torch_flags, *prefix_maps])
    for source in _sources("register_cpu.cpp"):
        ninja.compile("cxx", source, [*torch_flags, *prefix_maps])
    python_flags = _system_includes(pybind11.get_include(), sysconfig.get_path("include"))
    facts = [f'-DFASTFORMER_ISA_LEVELS="{" ".join(isa_levels())}"']
    if nvcc and cuda_sources:
        facts += [f'-DFASTFORMER_NVCC="{nvcc.version}"', f'-DFASTFORMER_CUDA_ARCHS="{" ".join(nvcc.archs)}"']
    else:
        facts += [f'-DFASTFORMER_NO_CUDA="{no_cuda}"']
    ninja.compile("cxx", Path("csrc/module.cpp"), [*python_flags, *torch_flags, *prefix_maps, *facts])
    ninja.link(target)
    path = BUILD / "build.ninja"
    ninja.write(ROOT / path)
    return path


class NinjaBuild(build_ext):
    def run(self) -> None:
        if SANITIZE and (self.inplace or self.editable_mode):
            raise SystemExit("FASTFORMER_SANITIZE needs --build-lib: plain Python loads no sanitised _C")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if importlib.util.find_spec("torch") is None:
            raise SystemExit("fastformer: install torch before building with --no-build-isolation")
        nvcc, no_cuda = find_cuda()
        if nvcc is None:
            say(f"the CUDA half of fastformer._C is left out: {no_cuda}")
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        target = BUILD / "_C.so"
        with open(ROOT / BUILD / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ninja_file = write_ninja(target, find_compiler(), nvcc, no_cuda)
            jobs = len(os.sched_getaffinity(0))
            ninja = [*find_ninja(), "-f", str(ninja_file), "-j", str(jobs)]
            if subprocess.run(ninja, cwd=ROOT).returncode:
                raise SystemExit("fastformer: the extension did not compile, see above")
            destination = Path(self.get_ext_fullpath(ext.name))
            destination.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / target), str(destination))


def say(sentence: str) -> None:
    print(f"fastformer: {sentence}", file=sys.stderr, flush=True)


pure_python = why_pure_python()
if pure_python:
    say(f"installing without the extension fastformer._C: {pure_python}")
# Installed under our own name only: a top-level triton_kernels would overwrite that of Triton's repository.
TRITON = "fastformer.triton_kernels"
PACKAGES = find_namespace_packages(include=["fastformer", "fastformer.*"], exclude=["*.__pycache__"])
setup(
    packages=[*PACKAGES, TRITON],
    package_dir={TRITON: "triton_kernels"},
    ext_modules=[] if pure_python else [Extension("fastformer._C", [])],
    cmdclass={"build_ext": NinjaBuild},
)
