"""Instruction implementations; importing this package fills the opcode registries."""

from . import arith, async_copy, control, convert, memory, mma, warp  # noqa: F401
