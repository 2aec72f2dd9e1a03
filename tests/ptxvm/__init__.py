"""ptxvm: run compiled PTX kernels on the CPU with NumPy."""

from .counters import Counters
from .errors import (
    DeadlockError,
    DeviceTrap,
    MemoryFault,
    ParseError,
    PtxError,
    RaceError,
    UninitializedRead,
    UnsupportedOpcode,
)
from .launch import Checks, StructArg, TensorMap, from_triton, load

__all__ = [
    "Checks",
    "Counters",
    "DeadlockError",
    "DeviceTrap",
    "MemoryFault",
    "ParseError",
    "PtxError",
    "RaceError",
    "StructArg",
    "TensorMap",
    "UninitializedRead",
    "UnsupportedOpcode",
    "from_triton",
    "load",
]
