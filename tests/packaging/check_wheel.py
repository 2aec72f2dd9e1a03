"""Try a wheel in clean environments, one for each torch release.

python check_wheel.py dist/fastformer-*.whl --torch 2.13.0 2.14.1
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.py")


def check_wheel(wheel: Path, torch_version: str, folder: Path) -> None:
    """Install `wheel` beside torch `torch_version` into a new environment in `folder`; run smoke.py there."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "--quiet", f"torch=={torch_version}", wheel.resolve()]
    subprocess.run(install, check=True, env=environment)
    subprocess.run([python, SMOKE], check=True, env=environment, cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", required=True, metavar="VERSION")
    options = parser.parse_args()
    print(f"{options.wheel}: {options.wheel.stat().st_size / 1e6:.2f} MB", file=sys.stderr)
    for torch_version in options.torch:
        with tempfile.TemporaryDirectory() as folder:
            check_wheel(options.wheel, torch_version, Path(folder))


if __name__ == "__main__":
    main()
