"""What the copy engine of sm_90 and later must know of query, key and value."""

from __future__ import annotations

from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_call import AttentionCall, Rows


def fits_descriptor(rows: Rows) -> bool:
    """Whether the copy engine can read a tensor: everything in it begins at a multiple of 16 bytes."""
    tensor = rows.ptr
    step = 16 // tensor.element_size()
    sizes = (1, *tensor.shape[1::-1]) if tensor.dim() == 3 else tensor.shape[:3]
    return (
        tensor.data_ptr() % 16 == 0
        and 0 not in tensor.shape
        and all(
            size == 1 or (stride > 0 and stride % step == 0)
            for size, stride in zip(sizes, rows[1:4], strict=True)
        )
    )


def descriptors_of(call: AttentionCall, block_m: int, block_n: int) -> tuple[TensorDescriptor, ...]:
    """What the copy engine needs to know of query, key and value: [B, H, M, D], packed [1, H, total, D]."""
    width, value_width = (call.D, call.flags["BLOCK_D"]), (call.D_v, call.flags["BLOCK_DV"])
    return (
        _descriptor(call.tensors.query, call.H, *width, block_m),
        _descriptor(call.tensors.key, call.H_kv, *width, block_n),
        _descriptor(call.tensors.value, call.H_kv, *value_width, block_n),
    )


def _descriptor(rows: Rows, heads: int, width: int, block_width: int, block: int) -> TensorDescriptor:
    tensor = rows.ptr
    packed = tensor.dim() == 3
    shape = [1 if packed else tensor.shape[0], heads, tensor.shape[0 if packed else 2], width]
    # The strides of dimensions of one element may be anything, but not to the copy engine.
    row = [stride if size > 1 else block_width for size, stride in zip(shape, rows[1:4], strict=False)]
    return TensorDescriptor(tensor, shape, [*row, 1], [1, 1, block, block_width])
