"""What every launcher does before it launches: shapes and strides into kernel arguments."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton

TARGET = "hip" if torch.version.hip else "cuda"
MAX_GRID = 65535  # programs in the second and third dimension of a grid
# Every launch says whether a product may be added unrounded. What Triton does where that is left open differs
# from release to release, and all passes that compute a weight must compute it alike.
MULTIPLY_ADDS = {"enable_fp_fusion": True}

_STRIDES = ["stride_x", "stride_r", "stride_g", "stride_gs", "stride_s"]
# One compilation serves every shape of a tile width: ALIGN says all that is worth knowing of a size.
size_agnostic = triton.jit(do_not_specialize=[*_STRIDES, "rows", "C", "threshold", "steps", "partials"])


def as_rows(tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """The tensor with contiguous columns, without a copy where the strides allow it, and its row stride."""
    if tensor is None:
        return None, 0
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    rows = tensor.reshape(-1, tensor.shape[-1])
    if rows.stride(1) != 1 and rows.shape[1] != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def all_registers(target: str) -> dict[str, int]:
    """For a kernel of 8 warps in which ptxas stops at 128 registers, and spills, if not told of more."""
    return {"maxnreg": 255} if target == "cuda" else {}


def ceil_div(n: int, size: int) -> int:
    return -(-n // size)  # triton.cdiv takes 2 us, for its sake inside kernels


def contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.contiguous()


def dropout_constants(dropout_p: float) -> tuple[int, float]:
    """(threshold, scale): an element is kept where its 16-bit decision >= threshold, and then scaled."""
    threshold = round(dropout_p * 65536)
    return threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


@functools.cache
def arch(device: torch.device) -> str:
    """ "sm_90", "gfx942", ..."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter, which takes any tile
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def sm_count(device: torch.device) -> int:
    # The interpreter, on CPU tensors, runs its programs one after another.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, whatever device the tensors are on."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
