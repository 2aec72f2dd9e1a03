"""Triton kernels, each with its launcher: torch and Triton are all that they need.

Launchers take and return tensors and hold no state; nothing is registered anywhere.
"""

import triton

# Under TRITON_INTERPRET=1 Triton makes interpreted functions of the kernels as they are defined, so what
# holds now holds for good: they then run on CPU tensors, and otherwise on a GPU's only.
INTERPRETED = bool(triton.knobs.runtime.interpret)
