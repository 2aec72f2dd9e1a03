"""`python -m fastformer info`: what is installed here, and which backends can run."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from typing import Any

import torch

from .dispatch import BACKENDS


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> dict[str, Any]:
    """How fastformer._C was built and which instruction set it uses, or why it is missing."""
    try:
        extension = importlib.import_module("fastformer._C")
    except ImportError as error:
        return {"missing": str(error)}
    return {**extension.build_info(), "isa": extension.isa()}


def info() -> dict[str, Any]:
    """Versions, devices, the extension's build facts, and of each backend "ready" or why not."""
    devices = [f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append(f"cuda:{index} ({torch.cuda.get_device_name(index)}, capability {major}.{minor})")
    return {
        "versions": {
            "fastformer": _version("fastformer"),
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "transformers", "timm")},
        },
        "devices": devices,
        "extension": _extension(),
        "backends": {name: module.ready() or "ready" for name, module in BACKENDS.items()},
    }


def _print_info(facts: dict[str, Any]) -> None:
    print("versions")
    for name, version in facts["versions"].items():
        print(f"  {name:13} {version or 'not installed'}")
    print("devices")
    for device in facts["devices"]:
        print(f"  {device}")
    print("extension fastformer._C")
    extension = facts["extension"]
    if "missing" in extension:
        print(f"  missing       {extension['missing']}")
    else:
        cuda = extension["cuda"]
        architectures = (
            f"nvcc {cuda['nvcc']}, {' '.join(cuda['archs'])}" if cuda else f"none: {extension['no_cuda']}"
        )
        print(f"  compiler      {extension['compiler']}, torch {extension['torch']}")
        print(f"  CPU           {extension['isa']} in use, built for {' '.join(extension['isa_levels'])}")
        print(f"  CUDA          {architectures}")
    print("backends")
    for name, state in facts["backends"].items():
        print(f"  {name:13} {state}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastformer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser("info", help="versions, devices, build facts, backends")
    info_parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    facts = info()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_info(facts)
    return 0
