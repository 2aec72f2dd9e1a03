"""`make sanitize`: builds fastformer._C with one family of sanitizers and runs the CPU's tests on it.

    python tests/sanitize/run.py address|thread [arguments of pytest]

Everything lies in build/sanitize/<family>: objects, and a copy of the package with the sanitised extension;
the working tree's is left alone. The first report ends the tests and fails the run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["tests/cpu", "tests/ops"]
# Dynamo and Inductor run no code of ours that the other tests do not, take minutes of compiling Python under
# a sanitizer, and start g++ and more with our LD_PRELOAD. The resident set, which the tests of memory read,
# is then the sanitizer's own for the most part.
LEFT_OUT = [
    "tests/ops/test_compile.py",
    "tests/ops/test_memory.py",
    "tests/ops/test_paged_attention_calls.py",
]

# family -> FASTFORMER_SANITIZE, the runtimes
FAMILIES = {"address": ("address,undefined", ["asan", "ubsan"]), "thread": ("thread", ["tsan"])}
# The exit status of a process that ended by a report; pytest has none so high.
REPORTED = 66
OPTIONS = {
    # Python and torch keep much for the process's life, which would be called leaks.
    "ASAN_OPTIONS": ["detect_leaks=0", "detect_stack_use_after_return=1"],
    "UBSAN_OPTIONS": ["print_stacktrace=1"],
    # torch, Python and libgomp are not instrumented: what they do in malloc or memcpy, in an order that is
    # not seen, says nothing. Their calls of our kernels are ordered by csrc/cpu/parallel.h.
    "TSAN_OPTIONS": ["halt_on_error=1", "ignore_noninstrumented_modules=1", "history_size=7"],
}


def main() -> int:
    family, *arguments = sys.argv[1:]
    folder = ROOT / "build" / "sanitize" / family
    build(family, folder)
    code = run_tests(family, folder, arguments)
    if code == REPORTED:
        print(f"the report above is of {(folder / 'current-test').read_text()}")
    return code


def build(family: str, folder: Path) -> None:
    shutil.rmtree(folder / "package", ignore_errors=True)
    command = [sys.executable, "setup.py", "--quiet", "build", f"--build-base={folder}"]
    environment = os.environ | {"FASTFORMER_SANITIZE": FAMILIES[family][0]}
    subprocess.run([*command, f"--build-lib={folder / 'package'}"], cwd=ROOT, env=environment, check=True)


def run_tests(family: str, folder: Path, arguments: list[str]) -> int:
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preloaded(family)),
        # The root for tests.sanitize.plugin; fastformer is found before it.
        "PYTHONPATH": os.pathsep.join([str(folder / "package"), str(ROOT)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        # Two threads on a busy machine must not wait for each other by spinning.
        "OMP_WAIT_POLICY": "passive",
    }
    for name, options in OPTIONS.items():
        environment[name] = ":".join(
            [*options, f"log_path={folder}/reports/{name[:4].lower()}", "exitcode=66"]
        )
    # -c, because -m would put the working directory, with the plain fastformer, first.
    command = [sys.executable, "-c", "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main())"]
    command += ["-o", "pythonpath=", "-p", "no:faulthandler", "-p", "no:cacheprovider"]
    # Or a report would end in pytest's own file for stderr, and be gone with the process.
    command += ["--capture=sys"]
    command += ["-p", "tests.sanitize.plugin", f"--sanitize-folder={folder}"]
    command += [f"--ignore={path}" for path in LEFT_OUT]
    if not any(argument.startswith("tests") for argument in arguments):
        command += TESTS
    return subprocess.run([*command, *arguments], cwd=ROOT, env=environment).returncode


def preloaded(family: str) -> list[str]:
    """Python is no sanitised program, so the runtimes come first this way; with libstdc++, whose __cxa_throw
    they look for when they start."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    libraries = [f"lib{runtime}.so" for runtime in FAMILIES[family][1]]
    paths = []
    for library in [*libraries, "libstdc++.so"]:
        path = subprocess.check_output([*compiler, f"-print-file-name={library}"], text=True).strip()
        if not Path(path).is_absolute():
            raise SystemExit(
                f"{' '.join(compiler)} has no {library}: the sanitizers need g++ and its runtimes"
            )
        paths.append(path)
    return paths


if __name__ == "__main__":
    sys.exit(main())
