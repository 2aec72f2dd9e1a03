"""What Triton's interpreter does wrong, or for nothing.

Its bfloat16 arithmetic, elementwise and in products, takes the bits for integers: here operands are widened,
which is exact, and what an operator gives is rounded once. From float32 it cuts bits off: here it rounds to
nearest. Products of float32 it leaves to BLAS, whose order of sums changes with the tile's shape and the
machine, so that gradients see other scores than forward did: here they are the chains of multiply-adds that
compiled kernels have. It exchanges the members of triton.language at every call of a jitted function, where
once a launch is enough: that is half of its time. Half of what is left goes into looking for overflows of
integers of which nothing is then told: the assertion waits for an option, debug, that the interpreter never
sets.
"""

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(cast, builder, value, kind):
    if value.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
        return cast(builder, value, kind)
    bits = np.ascontiguousarray(value.data).view(np.uint32)
    up = ((bits >> 16) & 1) + np.uint32(0x7FFF)  # to nearest, and to even from between two
    rounded = np.where(np.isnan(value.data), bits | np.uint32(1 << 22), bits + up) >> 16
    return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


def _computed(operator, builder, lhs, rhs, op):
    if not lhs.dtype.scalar == rhs.dtype.scalar == tl.bfloat16:
        return operator(builder, lhs, rhs, op)
    result = operator(builder, _widened(lhs), _widened(rhs), op)
    if result.data.dtype == np.bool_:  # a comparison's
        return result
    return builder.cast_impl(result, tl.bfloat16)


def _product(dot, builder, a, b, sums, *more):
    if a.dtype.scalar != tl.float32:
        return dot(builder, _widened(a), _widened(b), sums, *more)
    chain = sums.data
    for column in range(a.data.shape[-1]):
        factors = np.broadcast_arrays(a.data[..., column, None], b.data[..., column, None, :], chain)
        chain = interpreter._interpreter.fma_fp32(*factors)
    return interpreter.TensorHandle(chain, sums.dtype.scalar)


def _is_exchanged(fn):
    languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    return not any(tl.core.is_builtin(language.load) for language in languages)


def install():
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot
    builder.create_dot = lambda self, *given: _product(dot, self, *given)
    cast = builder.cast_impl
    builder.cast_impl = lambda self, value, kind: _rounded(cast, self, value, kind)
    operator = builder.binary_op
    builder.binary_op = lambda self, lhs, rhs, op: _computed(operator, self, lhs, rhs, op)
    exchange = interpreter._patch_lang
    # Its scope, which changes back, is wanted of the launch alone, and then nothing is exchanged yet.
    interpreter._patch_lang = lambda fn: None if _is_exchanged(fn) else exchange(fn)
    overflow = TritonSemantic.binary_op_sanitize_overflow_impl
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, op: (
        overflow(self, lhs, rhs, op) if self.builder.options.debug else None
    )
