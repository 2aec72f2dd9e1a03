"""The floors of docs/architecture.md: imports run downward only, and importing the package stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Longest matching prefix wins.
FLOORS = {
    "fastformer.triton_kernels": 0,
    "fastformer._C": 0,
    "fastformer.errors": 1,
    "fastformer.specs": 1,
    "fastformer.backends": 2,
    "fastformer.dispatch": 3,
    "fastformer.ops": 4,
    "fastformer.nn": 5,
    "fastformer.generation": 6,
    "fastformer.patching": 6,
    "fastformer.distributed": 6,
    "fastformer": 7,
}


def module_files():
    """Module name -> file, with triton_kernels under the name that it is installed by."""
    files = {}
    for folder in ("fastformer", "triton_kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            files[f"fastformer.{name}" if folder == "triton_kernels" else name] = path
    return files


FILES = module_files()


def imports_of(module):
    """Absolute names of the modules that `module` imports, also inside functions."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, base]).rstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in FILES or name == "fastformer._C" else base


def floor_of(module):
    known = [prefix for prefix in FLOORS if module == prefix or module.startswith(f"{prefix}.")]
    return FLOORS[max(known, key=len)]


def is_ours(module):
    return module.split(".")[0] == "fastformer"


@pytest.mark.parametrize("module", FILES)
def test_imports_run_downward(module):
    for imported in filter(is_ours, imports_of(module)):
        assert floor_of(imported) <= floor_of(module), f"{module} imports {imported}, which is above it"


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("fastformer.backends.")])
def test_backends_do_not_know_each_other(module):
    def backend(name):
        """fastformer.backends.cpu_norm and fastformer.backends.cpu.norm are both of backend cpu."""
        first = name.split(".")[2].split("_")[0]
        return first if first in ("cpu", "cuda", "triton", "reference") else None

    for imported in imports_of(module):
        if imported.startswith("fastformer.backends.") and backend(imported) is not None:
            assert backend(imported) == backend(module), f"{module} imports {imported}"


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("fastformer.triton_kernels")])
def test_triton_kernels_need_torch_and_triton_only(module):
    for imported in imports_of(module):
        top = imported.split(".")[0]
        allowed = top in ("torch", "triton") or top in sys.stdlib_module_names
        assert allowed or imported.startswith("fastformer.triton_kernels"), f"{module} imports {imported}"


def run_fresh(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_fastformer_loads_no_optional_package():
    loaded = run_fresh(
        "import sys, torch; before = set(sys.modules); import fastformer;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    ).split()
    assert not {"triton", "transformers", "timm", "triton_kernels"} & set(loaded)


def test_importing_fastformer_is_quick():
    clock = "time.process_time()"  # the wall clock would time the other processes too
    code = f"import time, torch; start = {clock}; import fastformer; print({clock} - start)"
    # Cold caches make some measurements too long, none too short.
    times = []
    while not times or (min(times) >= 0.2 and len(times) < 5):
        times.append(float(run_fresh(code)))
    assert min(times) < 0.2, f"importing fastformer after torch took {times} CPU seconds"


def test_triton_kernels_import_without_fastformer():
    pytest.importorskip("triton")
    names = [name.removeprefix("fastformer.") for name in FILES if ".triton_kernels" in name]
    block = "import sys, importlib; sys.modules['fastformer'] = None"
    run_fresh(f"{block}\nfor name in {names}: importlib.import_module(name)")
