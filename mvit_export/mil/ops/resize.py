"""Resizing of the last axes. Semantics: coremltools' `iOS15/image_resizing.py`, which defines the sampling grids.

Not here: `crop_resize`, `affine`, `resample`, and nearest-neighbour sampling whose rounding is not documented.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SamplingMode = Literal["STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS"]


def grid(size: int, target: int, mode: str) -> Tensor:
    """Positions of the `target` samples on an axis with `size` elements, (target,) float64 within [0, size - 1]."""
    i = torch.arange(target, dtype=torch.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if target == 1:
            return torch.full((1,), (size - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0, dtype=torch.float64)
        points = i * ((size - 1) / (target - 1))
    elif mode == "DEFAULT":
        points = i * (size / target)
    elif mode == "OFFSET_CORNERS":
        points = (i + 0.5) * (max(1, size - 1) / target)
    else:  # UNALIGN_CORNERS
        points = (i + 0.5) * (size / target) - 0.5
    return points.clamp(0, size - 1)


def interpolate(x: Tensor, axis: int, target: int, mode: str) -> Tensor:
    """Linear interpolation along one axis."""
    size = x.shape[axis]
    points = grid(size, target, mode)
    low = points.floor().clamp(max=max(size - 2, 0)).long()
    high = (low + 1).clamp(max=size - 1)
    weight = (points - low).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1 - axis))
    return torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)


def bilinear(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    if mode == "UNALIGN_CORNERS" and x.dim() == 4:  # the same grid, in one kernel
        return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
    x = interpolate(x, x.dim() - 2, height, mode)
    return interpolate(x, x.dim() - 1, width, mode)


def nearest(x: Tensor, axis: int, target: int) -> Tensor:
    """Element floor(i * size / target)."""
    index = torch.div(torch.arange(target) * x.shape[axis], target, rounding_mode="floor")
    return x.index_select(axis, index)


def scaled(size: int, factor: float, *, whole: bool) -> int:
    """floor(size * factor). If the product must be `whole`, any other factor has no defined grid."""
    if whole and abs(size * factor - round(size * factor)) > 1e-4:
        raise ValueError(f"{size} elements times {factor} is not a whole number: the sampling grid is not defined")
    return int(size * factor + 1e-6)


def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: SamplingMode = "DEFAULT"
) -> Tensor:
    return bilinear(x, target_size_height, target_size_width, sampling_mode)


def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    x = nearest(x, x.dim() - 2, target_size_height)
    return nearest(x, x.dim() - 1, target_size_width)


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """The grid is based on the sizes, not on the factors (torch's recompute_scale_factor)."""
    half_pixel = not align_corners if half_pixel_centers is None else half_pixel_centers
    if align_corners and half_pixel:
        raise ValueError("align_corners and half_pixel_centers together have no defined grid")
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half_pixel else "DEFAULT"
    height = scaled(x.shape[-2], scale_factor_height, whole=False)
    return bilinear(x, height, scaled(x.shape[-1], scale_factor_width, whole=False), mode)


def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    x = nearest(x, x.dim() - 2, scaled(x.shape[-2], scale_factor_height, whole=True))
    return nearest(x, x.dim() - 1, scaled(x.shape[-1], scale_factor_width, whole=True))


def resize(
    x: Tensor,
    shape: list[int],
    resized_dims: int,
    interpolation_mode: Literal["LINEAR", "NEAREST_NEIGHBOR"] = "LINEAR",
    sampling_mode: SamplingMode = "DEFAULT",
) -> Tensor:
    """The last `resized_dims` axes get the last sizes in `shape`; 0 keeps an axis as it is."""
    if interpolation_mode == "NEAREST_NEIGHBOR" and sampling_mode != "DEFAULT":
        raise ValueError(f"nearest neighbour with sampling_mode {sampling_mode} has no written rule of rounding")
    first = x.dim() - resized_dims
    for axis, target in enumerate(shape[len(shape) - resized_dims :], first):
        target = target or x.shape[axis]
        if interpolation_mode == "NEAREST_NEIGHBOR":
            x = nearest(x, axis, target)
        elif target != x.shape[axis] or sampling_mode == "OFFSET_CORNERS":  # in others an equal size changes nothing
            x = interpolate(x, axis, target, sampling_mode)
    return x


OPS: dict[str, Callable[..., Any]] = {
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
