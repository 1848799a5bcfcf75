"""float32 with sums one after another, as runtimes add them. PyTorch adds pairwise, which loses less.

A register has eight lanes. A runtime with the channels first adds eight pixels of a map side by side, one with the
channels last, such as LiteRT, eight channels: then the pixels of each are added in a single sequence.

The rounding error of n terms added in sequence grows with n, of n added pairwise with log n: Higham, The accuracy of
floating point summation (1993). It shows where terms are alike, as in the norms and means of a white picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LANES = (8, 1)  # side by side: float32 values in a register of 256 bits with the channels first, and with them last
_lanes: ContextVar[int] = ContextVar("lanes", default=LANES[0])
aten = torch.ops.aten


def total(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The sum over axes, which stay as ones."""
    axes = sorted(axis % x.ndim for axis in axes) or list(range(x.ndim))
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    shape = [x.shape[axis] for axis in kept]
    rows = x.permute(*kept, *axes).reshape(*shape, -1)  # (*kept, n)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % _lanes.get()))
    beside = rows.reshape(*shape, -1, _lanes.get()).numpy()  # (*kept, n / lanes, lanes)
    added = np.add.accumulate(beside, axis=-2, dtype=np.float32)[..., -1, :]  # PyTorch's own cumsum adds in float64
    result = torch.from_numpy(np.add.accumulate(added, axis=-1, dtype=np.float32)[..., -1].copy())
    return result.reshape([1 if axis in axes else side for axis, side in enumerate(x.shape)])


def mean(x: Tensor, axes: Sequence[int]) -> Tensor:
    found = total(x, axes)
    return found * (found.numel() / x.numel())


def normalize(x: Tensor, axes: Sequence[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps), the mean, 1 / sqrt(var + eps)."""
    middle = mean(x, axes)
    scale = torch.rsqrt(mean((x - middle) ** 2, axes) + eps)
    return (x - middle) * scale, middle, scale


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    x = x if weight is None else x * weight.reshape(*shape)
    return x if bias is None else x + bias.reshape(*shape)


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, _: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    found, middle, scale = normalize(x.reshape(n, groups, -1), [2], eps)  # (N, groups, C / groups * HW)
    result = affine(found.reshape(x.shape), weight, bias, [1, c, *[1] * (x.ndim - 2)])
    return result, middle.reshape(n, groups), scale.reshape(n, groups)


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    found, middle, scale = normalize(x, range(-len(shape), 0), eps)
    return affine(found, weight, bias, shape), middle, scale


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, _: Any, __: Any, ___: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With the batch's own statistics, as InstanceNorm calls it."""
    found, middle, scale = normalize(x, [axis for axis in range(x.ndim) if axis != 1], eps)
    return affine(found, weight, bias, [1, -1, *[1] * (x.ndim - 2)]), middle.flatten(), scale.flatten()


def sum_axes(x: Tensor, axes: Sequence[int] | None, keep: bool = False, **_: Any) -> Tensor:
    return squeezed(total(x, axes or []), x, axes, keep)


def mean_axes(x: Tensor, axes: Sequence[int] | None, keep: bool = False, **_: Any) -> Tensor:
    return squeezed(mean(x, axes or []), x, axes, keep)


def squeezed(result: Tensor, x: Tensor, axes: Sequence[int] | None, keep: bool) -> Tensor:
    gone = {axis % x.ndim for axis in axes or range(x.ndim)}
    return result if keep else result.reshape([side for axis, side in enumerate(x.shape) if axis not in gone])


ROWS: dict[Any, Callable[..., Any]] = {
    aten.native_group_norm.default: group_norm,
    aten.native_layer_norm.default: layer_norm,
    aten.sum.dim_IntList: sum_axes,
    aten.mean.dim: mean_axes,
}


class InSequence(TorchDispatchMode):
    """Inside it, sums, means and norms of float32 tensors add one term after another, in so many lanes."""

    def __init__(self, lanes: int = LANES[0]) -> None:
        super().__init__()
        self.lanes = lanes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        row = ROWS.get(func)
        if func is aten.native_batch_norm.default and args[5]:  # in training mode
            row = batch_norm
        given = kwargs or {}
        usual = row and args[0].dtype == torch.float32 and given.get("dtype") in (None, torch.float32)
        before = _lanes.set(self.lanes)
        try:
            return (row if row and usual else func)(*args, **given)
        finally:
            _lanes.reset(before)
