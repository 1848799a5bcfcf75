"""Compressed weights and quantized activations. Semantics: coremltools' `iOS16/constexpr_ops.py`,
`iOS17/quantization_ops.py`, `iOS18/compression.py`.

Ops of one name come in two generations: iOS16 passes packed bytes and a `shape`, iOS18 passes sub-byte tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mvit_export.mil.blob import Packing, unpack


def along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A scalar, or a vector (x.shape[axis],) shaped so that it applies along `axis`."""
    if parameter.dim() == 0 or axis is None:
        return parameter
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def unpack_bits(data: Tensor, bits: int, shape: list[int]) -> Tensor:
    """Packed bytes, uint8 (N,) -> int64 `shape`."""
    count = int(torch.tensor(shape).prod())
    return torch.from_numpy(unpack(data.numpy(), Packing(0, bits, "uint8"), count).copy()).long().reshape(shape)


def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    return dequantize(quantized_data, scale, zero_point, axis)


def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    """scale * (input - zero_point)."""
    values = input.to(scale.dtype)
    values = values if zero_point is None else values - along(zero_point, input, axis).to(scale.dtype)
    return along(scale, input, axis) * values


def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: Literal["int8", "uint8"],
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """clip(round(input / scale) + zero_point), half to even."""
    dtype = torch.int8 if output_dtype == "int8" else torch.uint8
    values = (input / along(scale, input, axis)).round()
    values = values if zero_point is None else values + along(zero_point, input, axis).to(values.dtype)
    limits = torch.iinfo(dtype)
    return values.clamp(limits.min, limits.max).to(dtype)


def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * (data - offset), with one scale for each block of the data."""
    values = data.to(scale.dtype)
    values = values if offset is None else values - spread(offset, data).to(scale.dtype)
    return spread(scale, data) * values


def spread(blocks: Tensor, data: Tensor) -> Tensor:
    """Repeat one value for each block until the shape is that of `data`."""
    for axis, (size, count) in enumerate(zip(data.shape, blocks.shape, strict=True)):
        if size % count:
            raise ValueError(f"axis {axis} of {size} elements is not divisible into {count} blocks")
        blocks = blocks.repeat_interleave(size // count, axis)
    return blocks


def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: list[int] | None = None, vector_axis: int | None = None
) -> Tensor:
    """Values from a table. iOS18's `lut` is (*blocks, entries, vector); a vector fills `vector_axis`."""
    if shape is not None:
        return lut[unpack_bits(indices, (lut.numel() - 1).bit_length(), shape)]
    *blocks, entries, vector = lut.shape
    which = spread(torch.arange(lut[..., 0, 0].numel()).reshape(blocks), indices)  # the table of each element
    values = lut.reshape(-1, entries, vector)[which, indices.long()]  # (*indices, vector)
    if vector == 1:
        return values.squeeze(-1)
    if vector_axis is None:
        raise ValueError(f"a table of vectors of {vector} needs vector_axis")
    axis = vector_axis % indices.dim()
    return values.movedim(-1, axis + 1).flatten(axis, axis + 1)


def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: list[int] | None = None) -> Tensor:
    """`nonzero_data` (D,) at the set bits of `mask`, 0 elsewhere."""
    present = (mask if shape is None else unpack_bits(mask, 1, shape)).bool()
    if int(present.sum()) != nonzero_data.numel():
        raise ValueError(f"{nonzero_data.numel()} values for a mask with {int(present.sum())} bits set")
    return torch.zeros(present.shape, dtype=nonzero_data.dtype).masked_scatter(present, nonzero_data)


def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mask and non-zero values of the result of `constexpr_lut_to_dense` on sparse indices."""
    dense = constexpr_sparse_to_dense(indices_nonzero_data, indices_mask)
    values = constexpr_lut_to_dense(dense, lut, vector_axis=vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1 and vector_axis is not None:
        mask = mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, values[mask.bool()]


def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mask and non-zero values of the result of `constexpr_blockwise_shift_scale` on sparse data."""
    dense = constexpr_sparse_to_dense(nonzero_data, data_mask)
    return data_mask, constexpr_blockwise_shift_scale(dense, scale, offset)[data_mask.bool()]


def constexpr_cast(source_val: Tensor, output_dtype: Literal["fp32"]) -> Tensor:
    return source_val.clone()


OPS: dict[str, Callable[..., Any]] = {
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_cast": constexpr_cast,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "constexpr_lut_to_sparse": constexpr_lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": constexpr_sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": constexpr_sparse_to_dense,
    "dequantize": dequantize,
    "quantize": quantize,
}
