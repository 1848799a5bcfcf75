"""Shapes, slices, concatenation, padding. Semantics: coremltools' `tensor_transformation.py`, `tensor_operation.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def reshape(x: Tensor, shape: list[int], *, ios: int) -> Tensor:
    """0 copies a size of `x`: from the same axis up to iOS16, counted from the last axis (1 beyond the first) since."""
    if 0 in shape and x.numel():
        if ios >= 17:
            sizes = [1] * len(shape) + list(x.shape)
            known = sizes[len(sizes) - len(shape) :]
        elif len(shape) == x.dim():
            known = list(x.shape)
        else:
            raise ValueError(f"shape {shape} has a 0, which before iOS17 needs as many axes as the input's {x.dim()}")
        shape = [have if want == 0 else want for want, have in zip(shape, known, strict=True)]
    return x.reshape(shape)


def reshape_like(
    x: Tensor, ref_tensors: list[Tensor], begins: list[Tensor], ends: list[Tensor], end_masks: list[Tensor]
) -> Tensor:
    """The new shape is assembled from slices of the shapes of `ref_tensors`."""
    shape: list[int] = []
    for ref, begin, end, open_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += ref.shape[int(begin) : None if bool(open_end) else int(end)]
    return x.reshape(shape)


def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """Axes with a size other than 1 are kept."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def ranges(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None,
    begin_mask: list[bool] | None,
    end_mask: list[bool] | None,
    squeeze_mask: list[bool] | None,
) -> tuple[list[range], tuple[int, ...]]:
    """For each axis the indices that numpy's slicing picks, and the axes that are dropped."""
    no = [False] * x.dim()
    picked, gone = [], []
    for axis, size in enumerate(x.shape):
        start = None if (begin_mask or no)[axis] else begin[axis]
        stop = None if (end_mask or no)[axis] else end[axis]
        if not (squeeze_mask or no)[axis]:
            picked.append(range(*slice(start, stop, stride[axis] if stride else 1).indices(size)))
            continue
        index = range(size)[start or 0]  # IndexError if it is outside
        picked.append(range(index, index + 1))
        gone.append(axis)
    return picked, tuple(gone)


def take(x: Tensor, picked: list[range]) -> Tensor:
    """Pick indices along each axis; a view if they are contiguous."""
    for axis, index in enumerate(picked):
        if index.step == 1:
            x = x.narrow(axis, index.start, len(index)) if len(index) < x.shape[axis] else x
        else:
            x = x.index_select(axis, torch.tensor(index, dtype=torch.long))
    return x


def slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """numpy's x[begin:end:stride]; masks leave begin or end open, or drop the axis after taking `begin`."""
    picked, gone = ranges(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return take(x, picked).squeeze(gone)


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """A copy of `x` with the slice replaced by `update`."""
    picked, _ = ranges(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    grid = torch.meshgrid(*(torch.tensor(index) for index in picked), indexing="ij")
    return x.index_put(grid, update.reshape(grid[0].shape))


def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    """`size` elements starting at `begin`; -1 means all that remain."""
    for axis, (start, count) in enumerate(zip(begin, size, strict=True)):
        start = start + x.shape[axis] if start < 0 else start
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return x.split(split_sizes, axis)
    if not num_splits or x.shape[axis] % num_splits:
        raise ValueError(f"{x.shape[axis]} elements cannot be split into {num_splits} equal parts")
    return x.split(x.shape[axis] // num_splits, axis)


def concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    """`interleave` takes one slice of each input in turn, which needs inputs of the same shape."""
    if not interleave:
        return torch.cat([v.reshape(1) if v.dim() == 0 else v for v in values], axis)
    axis = axis % values[0].dim()
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


def stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


def pad(
    x: Tensor,
    pad: list[int],
    mode: Literal["constant", "reflect", "replicate"] = "constant",
    constant_val: float = 0.0,
) -> Tensor:
    """`pad` holds (before, after) of the last axes, outermost first. "reflect" leaves the edge itself out."""
    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    if mode == "constant":
        return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=constant_val)
    for axis, (before, after) in enumerate(pairs, x.dim() - len(pairs)):
        if before or after:
            x = x.index_select(axis, mirror(x.shape[axis], before, after, mode))
    return x


def mirror(size: int, before: int, after: int, mode: str) -> Tensor:
    """Which element is at each position of a padded axis."""
    index = torch.arange(-before, size + after)
    if mode == "replicate":
        return index.clamp(0, size - 1)
    if max(before, after) > size - 1:
        raise ValueError(f"cannot reflect {max(before, after)} elements of an axis with {size}")
    return (size - 1) - ((size - 1) - index.abs()).abs()


def transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """TensorFlow's order: the position in the block is the outer part of the new channel."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // block_size, block_size, w // block_size, block_size)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // block_size, w // block_size)


def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Undoes `space_to_depth`."""
    n, c, h, w = x.shape
    x = x.reshape(n, block_size, block_size, c // block_size**2, h, w)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * block_size, w * block_size)


def space_to_batch(x: Tensor, block_shape: list[int], paddings: list[list[int]]) -> Tensor:
    """TensorFlow's order: the position in the block is the outer part of the new batch axis."""
    (bh, bw), ((top, bottom), (left, right)) = block_shape, paddings
    n, c, h, w = (x := F.pad(x, [left, right, top, bottom])).shape
    x = x.reshape(n, c, h // bh, bh, w // bw, bw)
    return x.permute(3, 5, 0, 1, 2, 4).reshape(-1, c, h // bh, w // bw)


def batch_to_space(x: Tensor, block_shape: list[int], crops: list[list[int]]) -> Tensor:
    """Undoes `space_to_batch`."""
    (bh, bw), ((top, bottom), (left, right)) = block_shape, crops
    n, c, h, w = x.shape
    x = x.reshape(bh, bw, n // (bh * bw), c, h, w).permute(2, 3, 4, 0, 5, 1).reshape(-1, c, h * bh, w * bw)
    return x[:, :, top : h * bh - bottom, left : w * bw - right]


def crop(x: Tensor, crop_height: list[int], crop_width: list[int]) -> Tensor:
    (top, bottom), (left, right) = crop_height, crop_width
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """(.., d, ..) -> (.., windows, size, ..)."""
    axis = axis % x.dim()
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)


def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.flip(list(range(x.dim())) if axes is None else axes)


def tile(x: Tensor, reps: list[int]) -> Tensor:
    return x.repeat(reps)


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


OPS: dict[str, Callable[..., Any]] = {
    "batch_to_space": batch_to_space,
    "concat": concat,
    "crop": crop,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "flatten2d": flatten2d,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": reverse,
    "shape": shape,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "sliding_windows": sliding_windows,
    "space_to_batch": space_to_batch,
    "space_to_depth": space_to_depth,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
