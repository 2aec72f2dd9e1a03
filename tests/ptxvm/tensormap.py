"""The emulator's own 128-byte tensor-map (CUtensorMap) encoding.

Host TensorMap arguments are encoded with it and tensormap.replace edits it in memory, so that both
kinds of map go through one decoder. The hardware's layout is opaque; kernels never look inside.
"""

from dataclasses import dataclass

import numpy as np

MAGIC = 0x7E45_0128
# field -> (byte offset, bytes per entry)
FIELDS = {
    "global_address": (0, 8),
    "rank": (8, 4),
    "elemtype": (12, 4),
    "swizzle_mode": (16, 4),
    "interleave_layout": (20, 4),
    "fill_mode": (24, 4),
    "magic": (28, 4),
    "box_dim": (32, 4),
    "global_dim": (52, 4),
    "global_stride": (72, 8),
    "element_stride": (104, 4),
}
ELEMENT_BYTES = [1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4]  # indexed by elemtype
ELEMENT_TYPE = {1: 0, 2: 1, 4: 2, 8: 4}  # bytes -> an elemtype of that size
SWIZZLES = ["none", "32B", "64B", "128B"]


def put(block, field, value, index=0):
    """Write one field of a 128-byte uint8 array."""
    off, size = FIELDS[field]
    block[off + size * index : off + size * (index + 1)] = np.frombuffer(
        int(value).to_bytes(size, "little"), np.uint8
    )


def encode(address, shape, strides, box, elem, swizzle):
    """Outermost-first shape, byte strides and box -> 128 bytes."""
    block = np.zeros(128, np.uint8)
    if strides[-1] != elem or any(s % 16 for s in strides[:-1]):
        raise ValueError(
            "TMA needs a contiguous innermost dimension and strides that are multiples of 16 bytes"
        )
    for field, value in (
        ("magic", MAGIC),
        ("global_address", address),
        ("rank", len(shape) - 1),
        ("elemtype", ELEMENT_TYPE[elem]),
        ("swizzle_mode", SWIZZLES.index(swizzle)),
    ):
        put(block, field, value)
    for i in range(len(shape)):
        put(block, "box_dim", box[-1 - i], i)
        put(block, "global_dim", shape[-1 - i], i)
        if i:
            put(block, "global_stride", strides[-1 - i], i - 1)
    return block.tobytes()


@dataclass
class Map:
    """A decoded map; dimensions innermost first, as in PTX."""

    address: int
    dims: list
    strides: list
    box: list
    elem: int
    swizzle: str

    @property
    def box_bytes(self):
        return int(np.prod(self.box)) * self.elem

    def addresses(self, coords):
        """(addresses of the box elements in shared-memory order, which of them lie inside the tensor)."""
        addr, inside = np.int64(self.address), np.True_
        for i, (start, n, dim, stride) in enumerate(
            zip(coords, self.box, self.dims, self.strides, strict=False)
        ):
            at = (start + np.arange(n)).reshape([-1] + [1] * i)
            addr, inside = addr + at * stride, inside & (at >= 0) & (at < dim)
        return addr.ravel(), np.broadcast_to(inside, self.box[::-1]).ravel()


def decode(block):
    """128 bytes -> Map, or None if they are not one."""

    def get(field, index=0):
        off, size = FIELDS[field]
        return int.from_bytes(block[off + size * index : off + size * (index + 1)].tobytes(), "little")

    if get("magic") != MAGIC:
        return None
    rank, elem = get("rank") + 1, ELEMENT_BYTES[get("elemtype")]
    return Map(
        get("global_address"),
        [get("global_dim", i) for i in range(rank)],
        [elem] + [get("global_stride", i) for i in range(rank - 1)],
        [get("box_dim", i) for i in range(rank)],
        elem,
        SWIZZLES[get("swizzle_mode")],
    )
