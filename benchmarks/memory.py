"""Peak memory of one contender's float32 encoding, in a process of its own.

`python -m benchmarks.memory --contender torch` prints it as JSON.

On a CPU it is how far the resident set rose above where it stood after loading the model and encoding
one short batch: what the encoding itself needs, scratch space of every library included. On a GPU it is
what torch's allocator handed out at its peak, less what it held before.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.bench_sentence_encoder import Encoder, corpus_size, ragged_batches
from benchmarks.case import CONTENDERS, Grid

_SELF = Path("/proc/self")


def in_fresh_process(contender: str, grid: Grid, threads: int) -> int | str:
    """Bytes, or why there is no figure."""
    command = [sys.executable, "-m", "benchmarks.memory", "--contender", contender]
    command += ["--device", grid.device, "--threads", str(threads)] + ["--quick"] * grid.quick
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def peak_bytes(contender: str, grid: Grid) -> int:
    encoder = Encoder(contender, torch.float32, grid.device)
    batches = ragged_batches(*corpus_size(grid), grid.device)
    longest = max(batches, key=lambda batch: batch["input_ids"].numel())
    short = {name: tensor[:2, :16].contiguous() for name, tensor in longest.items()}
    with torch.no_grad():
        encoder([short])
        before = _held(grid.device)
        encoder([longest])
    return _peak(grid.device) - before


def _held(device: str) -> int:
    """Bytes held now; the peak counts anew from here."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # What was freed and is still held by malloc would hide as much of what comes.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    (_SELF / "clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system's /proc/self/status has no {field}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    grid = Grid(options.device, options.quick)
    print(json.dumps({"peak_bytes": peak_bytes(options.contender, grid)}))


if __name__ == "__main__":
    main()
