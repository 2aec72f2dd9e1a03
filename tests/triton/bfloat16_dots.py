"""Triton's interpreter multiplies the bits of bfloat16 as integers. Here it widens them, which is exact."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def install():
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, *more: dot(self, _widened(a), _widened(b), *more)
