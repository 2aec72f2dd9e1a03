"""What `pip wheel` makes of the repository, with a compiler and without."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.packaging.check_wheel import SMOKE, check_wheel

ROOT = Path(__file__).parents[2]


def build_wheel(folder, **environment):
    """A wheel of the working tree and what the build wrote to stderr. Leaves nothing in the repository."""
    settings = folder / "setup.cfg"
    settings.write_text(f"[build]\nbuild_base = {folder / 'build'}\n[egg_info]\negg_base = {folder}\n")
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(folder)]
    env = {**os.environ, "DIST_EXTRA_CONFIG": str(settings), **environment}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stderr


def run_smoke(wheel, folder, *arguments):
    """smoke.py on the wheel's content with this environment's torch.

    -S: without it, the editable installation's import hook would fill what the wheel lacks.
    """
    zipfile.ZipFile(wheel).extractall(folder)
    paths = [str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-S", str(SMOKE), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))[0]


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastformer").rglob("*.py")}
    kernels = {f"fastformer/{path.relative_to(ROOT)}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    installed = {name for name in names if ".dist-info/" not in name}
    extension = {name for name in installed if name.endswith(".so")}
    assert installed - extension == modules | kernels
    assert len(extension) <= 1
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_works(wheel, tmp_path):
    pure = wheel.name.endswith("-any.whl")
    run_smoke(wheel, tmp_path, *(["--pure"] if pure else []))


def test_without_a_compiler_the_package_is_pure_python(tmp_path):
    wheel, stderr = build_wheel(tmp_path, PATH="", CXX="")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "no C++20 compiler was found" in stderr
    run_smoke(wheel, tmp_path / "installed", "--pure")


@pytest.mark.download
@pytest.mark.parametrize("torch_version", ("2.11.0", "2.13.0", "2.14.1"))
def test_one_wheel_serves_every_torch(wheel, torch_version, tmp_path):
    check_wheel(wheel, torch_version, tmp_path)
