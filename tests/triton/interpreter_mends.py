"""What Triton's interpreter does wrong, or for nothing.

Its bfloat16 products multiply the bits as integers: here they are widened, which is exact. And it exchanges
the members of triton.language at every call of a jitted function, where once a launch is enough: that is
half of its time.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _is_exchanged(fn):
    languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    return not any(tl.core.is_builtin(language.load) for language in languages)


def install():
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, *more: dot(self, _widened(a), _widened(b), *more)
    exchange = interpreter._patch_lang
    # Its scope, which changes back, is wanted of the launch alone, and then nothing is exchanged yet.
    interpreter._patch_lang = lambda fn: None if _is_exchanged(fn) else exchange(fn)
