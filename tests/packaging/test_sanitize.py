"""The switches behind `make sanitize`: what they compile with, and that they leave the working tree alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..sanitize.run import FAMILIES

ROOT = Path(__file__).parents[2]
pytest.importorskip(
    "fastformer._C", reason="the extension was not built: there may be nothing to build it with"
)

WRITE_NINJA = """
import runpy, setuptools
setuptools.setup = lambda **arguments: None
names = runpy.run_path("setup.py")
names["BUILD"].mkdir(parents=True)
nvcc, why_not = names["find_cuda"]()
print(names["write_ninja"](names["BUILD"] / "_C.so", ["g++"], nvcc, why_not))
"""


def ninja_file(tmp_path, switch):
    """The path of the build.ninja that a copy of the tree writes, and its text."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    environment = os.environ | {"FASTFORMER_SANITIZE": switch, "FASTFORMER_CUDA": "0"}
    command = [sys.executable, "-c", WRITE_NINJA]
    written = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True).strip()
    return written, (tmp_path / written).read_text()


def commands(text):
    return dict(re.findall(r"rule (\w+)\n.*\n  command = (.*)", text))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sanitised_build_is_instrumented_and_lies_apart(family, tmp_path):
    path, text = ninja_file(tmp_path, FAMILIES[family][0])
    assert path.startswith(f"build/sanitize/{family}/")
    for command in commands(text).values():
        flags = command.split()
        assert any(flag.startswith(f"-fsanitize={family}") for flag in flags)
        assert {"-g", "-fno-sanitize-recover=all"} <= set(flags) and not {"-s", "-O3"} & set(flags)


def test_a_plain_build_is_not_instrumented(tmp_path):
    path, text = ninja_file(tmp_path, "")
    assert "sanitize" not in path + text
    assert "-O3" in commands(text)["cxx"].split() and "-s" in commands(text)["link"].split()


@pytest.mark.parametrize(
    "switch, words", [("thread", "--build-lib"), ("adress", "must be address,undefined")]
)
def test_a_sanitised_build_never_lands_in_the_working_tree(switch, words):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = os.environ | {"FASTFORMER_SANITIZE": switch}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode and words in found.stderr


def test_make_sanitize_runs_every_family():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    planned = subprocess.check_output(["make", "-n", "-o", "setup", "sanitize"], cwd=ROOT, text=True)
    assert re.findall(r"tests/sanitize/run.py (\w+)", planned) == list(FAMILIES)
