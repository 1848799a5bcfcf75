"""Gathers, scatters, tensors made from numbers. Semantics: coremltools' `scatter_gather.py`, `tensor_operation.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["update", "add", "sub", "mul", "div", "max", "min"]


def wrap(indices: Tensor, size: int, ios: int) -> Tensor:
    """Indices as int64 within [0, size). Negative ones count from the end before iOS17 and are errors since then.

    Core ML leaves an index outside undefined unless `validate_indices` is set; here it is always an error.
    """
    indices = indices.long()
    if ios < 17:
        indices = torch.where(indices < 0, indices + size, indices)
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        worst = int(indices.min()) if int(indices.min()) < 0 else int(indices.max())
        raise IndexError(f"index {worst} is outside of an axis with {size} elements")
    return indices


def gather(
    x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False, *, ios: int
) -> Tensor:
    """x D, indices N -> D[:axis] + N[batch_dims:] + D[axis + 1:]; the first `batch_dims` axes run along."""
    axis = axis % x.dim()
    indices = wrap(indices, x.shape[axis], ios)
    if batch_dims == 0:
        picked = x.index_select(axis, indices.reshape(-1))
        return picked.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))
    batch = math.prod(x.shape[:batch_dims])
    rows = zip(x.reshape(batch, *x.shape[batch_dims:]), indices.reshape(batch, -1), strict=True)
    picked = torch.stack([row.index_select(axis - batch_dims, index) for row, index in rows])
    return picked.reshape((*x.shape[:axis], *indices.shape[batch_dims:], *x.shape[axis + 1 :]))


def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False, *, ios: int) -> Tensor:
    """numpy's take_along_axis."""
    return x.gather(axis, wrap(indices, x.shape[axis], ios))


def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False, *, ios: int) -> Tensor:
    """Each row of `indices` (.., K) is a place in the axes of `x` after the batch axes."""
    if batch_dims:
        batch = math.prod(x.shape[:batch_dims])
        rows = zip(
            x.reshape(batch, *x.shape[batch_dims:]), indices.reshape(batch, *indices.shape[batch_dims:]), strict=True
        )
        picked = torch.stack([gather_nd(row, index, ios=ios) for row, index in rows])
        return picked.reshape((*x.shape[:batch_dims], *picked.shape[1:]))
    return x[places(x, indices, ios)]


def places(x: Tensor, indices: Tensor, ios: int) -> tuple[Tensor, ...]:
    """(.., K) rows of coordinates -> K index tensors."""
    return tuple(wrap(column, size, ios) for column, size in zip(indices.unbind(-1), x.shape, strict=False))


def combine(data: Tensor, place: tuple[Tensor, ...], updates: Tensor, mode: str) -> Tensor:
    """A copy of `data` with `updates` applied at `place`; repeated places add up, multiply, or compete."""
    if mode in ("update", "add", "sub"):
        return data.index_put(place, -updates if mode == "sub" else updates, accumulate=mode != "update")
    flat = torch.arange(data.numel()).reshape(data.shape)[place].reshape(-1)
    reduce = {"mul": "prod", "div": "prod", "max": "amax", "min": "amin"}[mode]
    values = (updates.reciprocal() if mode == "div" else updates).reshape(-1)
    return data.reshape(-1).scatter_reduce(0, flat, values, reduce).reshape(data.shape)


def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: Mode = "add",
    validate_indices: bool = False,
    *,
    ios: int,
) -> Tensor:
    """`updates` D[:axis] + [len(indices)] + D[axis + 1:] goes to the slices `indices` of `data` D."""
    axis = axis % data.dim()
    moved = data.movedim(axis, 0)
    place = (wrap(indices, data.shape[axis], ios),)
    rows = torch.arange(moved.numel()).reshape(moved.shape)[place]
    whole = torch.unravel_index(rows, moved.shape)
    return combine(moved.contiguous(), whole, updates.movedim(axis, 0), mode).movedim(0, axis)


def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: Mode = "add",
    validate_indices: bool = False,
    *,
    ios: int,
) -> Tensor:
    """numpy's put_along_axis, with `mode`."""
    axis = axis % data.dim()
    place = list(torch.meshgrid(*(torch.arange(n) for n in indices.shape), indexing="ij"))
    place[axis] = wrap(indices, data.shape[axis], ios)
    return combine(data.contiguous(), tuple(place), updates, mode)


def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: Mode = "add", validate_indices: bool = False, *, ios: int
) -> Tensor:
    """Each row of `indices` (.., K) is the place of one slice of `updates`."""
    rows = torch.arange(data.numel()).reshape(data.shape)[places(data, indices, ios)]
    return combine(data.contiguous(), torch.unravel_index(rows, data.shape), updates, mode)


def non_zero(x: Tensor) -> Tensor:
    return x.nonzero().int()


def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    """`on_value` where the position on the new `axis` equals the index, else `off_value`; by default int32 1 and 0."""
    hit = indices.long().unsqueeze(-1) == torch.arange(one_hot_vector_size)
    on = torch.tensor(1, dtype=torch.int32) if on_value is None else on_value
    off = torch.zeros_like(on) if off_value is None else off_value
    return torch.where(hit, on, off).movedim(-1, axis)


def fill(shape: list[int], value: Tensor | None = None) -> Tensor:
    value = torch.zeros(()) if value is None else value
    return torch.full(shape, value.item(), dtype=value.dtype)


def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return fill(list(ref_tensor.shape), value)


def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Zero outside a band around the diagonal of the last two axes; a negative width keeps that side whole."""
    row = torch.arange(x.shape[-2]).unsqueeze(1)
    column = torch.arange(x.shape[-1])
    keep = torch.ones(x.shape[-2:], dtype=torch.bool)
    keep = keep & (row - column <= lower) if lower >= 0 else keep
    keep = keep & (column - row <= upper) if upper >= 0 else keep
    return torch.where(keep, x, torch.zeros_like(x))


OPS: dict[str, Callable[..., Any]] = {
    "band_part": band_part,
    "fill": fill,
    "fill_like": fill_like,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "non_zero": non_zero,
    "one_hot": one_hot,
    "range_1d": range_1d,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
}
