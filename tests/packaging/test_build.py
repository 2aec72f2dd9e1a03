"""What the build left behind: one self-contained extension, and ISA levels that do not mix."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

extension = pytest.importorskip("fastformer._C", reason="the extension was not built")


def tool_output(tool, *arguments):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.check_output([tool, *map(str, arguments)], text=True)


def test_build_info_names_compilers_levels_and_archs():
    facts = extension.build_info()
    assert extension.isa() in facts["isa_levels"]
    assert re.match(r"(g|clang)\+\+ \d+", facts["compiler"])
    assert facts["cuda"] == extension.cuda_build()
    # Either there is a CUDA half, or the reason why there is none.
    assert (facts["cuda"] is None) == bool(facts["no_cuda"])
    json.dumps(facts)


def test_extension_needs_only_libtorch_cpu_and_the_system():
    dynamic = tool_output("readelf", "--dynamic", "--wide", extension.__file__)
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
    system = {
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libm.so.6",
        "libdl.so.2",
        "libpthread.so.0",
        "librt.so.1",
    }
    assert {name for name in needed - system if not name.startswith("ld-linux")} == {"libtorch_cpu.so"}
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_extension_mentions_no_path_of_the_building_machine():
    content = Path(extension.__file__).read_bytes()
    for folder in (ROOT, Path(sys.prefix), Path.home()):
        assert f"{folder}{os.sep}".encode() not in content


@pytest.mark.parametrize("level", extension.build_info()["isa_levels"])
def test_kernels_of_a_level_define_no_mergeable_symbol(level):
    """The linker keeps one of several weak definitions, perhaps the one with AVX-512 code, for all levels."""
    objects = list((ROOT / "build").glob(f"*/cpu/kernels*.{level}.o"))
    if not objects:
        pytest.skip("the object files are not here: built elsewhere")
    for path in objects:
        symbols = tool_output("nm", "--demangle", path).splitlines()
        weak = [line.split(maxsplit=2)[2] for line in symbols if re.match(r"[0-9a-f]+ [VWu] ", line)]
        assert not [name for name in weak if not name.startswith("DW.ref.")]  # a pointer, the same everywhere
