"""Inputs as the model's description declares them: checked, and converted to the program's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mvit_export.errors import UsageError
from mvit_export.mil.values import HELD

if TYPE_CHECKING:
    from coremltools.proto.FeatureTypes_pb2 import ArrayFeatureType, ImageFeatureType
    from coremltools.proto.Model_pb2 import FeatureDescription

Shape = tuple[int, ...]
Bounds = tuple[tuple[int, int], ...]  # (least, most) of each axis; -1 for no upper limit
COLORS = {10: "GRAYSCALE", 20: "RGB", 30: "BGR", 40: "GRAYSCALE_FLOAT16"}


@dataclass(frozen=True)
class Feature:
    """One input. `shapes` are the allowed ones; if `bounds` is set, any shape within them is allowed."""

    name: str
    dtype: str  # of the program's input
    shapes: tuple[Shape, ...]
    bounds: Bounds | None = None
    color: str | None = None  # of an image, else None
    default: float | None = None  # an optional input is filled with this

    def tensor(self, value: Any) -> Tensor:
        """The program's input tensor. UsageError, one line, if `value` does not fit the description.

        Arrays must be as declared. Images are PIL images or uint8 RGB arrays, (H, W, 3) or (B, H, W, 3); for a
        grayscale input (H, W) or (B, H, W). Scale and bias are part of the program and are applied there.
        """
        array = self._pixels(value) if self.color else self._array(value)
        if not self._fits(array.shape):
            raise UsageError(f"input {self.name!r} has shape {list(array.shape)}, expected {self.expected()}")
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(HELD[self.dtype][1])
        return tensor.half().float() if self.dtype == "FLOAT16" else tensor

    def expected(self) -> str:
        if self.bounds is None:
            return " or ".join(str(list(shape)) for shape in self.shapes)
        return "[" + ", ".join(interval(low, high) for low, high in self.bounds) + "]"

    def _fits(self, shape: Shape) -> bool:
        if self.bounds is None:
            return not self.shapes or shape in self.shapes
        return len(shape) == len(self.bounds) and all(
            low <= n and (high < 0 or n <= high) for n, (low, high) in zip(shape, self.bounds, strict=True)
        )

    def _array(self, value: Any) -> np.ndarray:
        array = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        wanted = np.dtype(HELD[self.dtype][0])
        alike = array.dtype.kind == wanted.kind or {array.dtype.kind, wanted.kind} <= set("iu")
        if not alike:
            raise UsageError(f"input {self.name!r} has dtype {array.dtype}, expected {wanted}")
        if wanted.kind in "iu" and array.size:
            limits = np.iinfo(wanted)
            if not limits.min <= int(array.min()) <= int(array.max()) <= limits.max:
                raise UsageError(f"input {self.name!r} has values outside of {wanted}: {limits.min} to {limits.max}")
        return array.astype(HELD[self.dtype][0]).astype(np.float32) if wanted.kind == "f" else array.astype(np.int64)

    def _pixels(self, value: Any) -> np.ndarray:
        """(B, C, H, W) float32 in the channel order of the program."""
        gray = self.color not in ("RGB", "BGR")
        if hasattr(value, "convert"):  # a PIL image; Pillow need not be installed
            value = value.convert("L" if gray else "RGB")
        pixels = np.asarray(value)
        floats = self.color == "GRAYSCALE_FLOAT16" and pixels.dtype.kind == "f"
        if pixels.dtype != np.uint8 and not floats:
            raise UsageError(f"image {self.name!r} has dtype {pixels.dtype}, expected uint8 pixels in RGB")
        layout = "(H, W) or (B, H, W)" if gray else "(H, W, 3) or (B, H, W, 3)"
        if pixels.ndim - (not gray) not in (2, 3) or (not gray and pixels.shape[-1] != 3):
            raise UsageError(f"image {self.name!r} has shape {list(pixels.shape)}, expected {layout}")
        if gray:
            return pixels.reshape(-1, 1, *pixels.shape[-2:]).astype(np.float32)
        pixels = pixels.reshape(-1, *pixels.shape[-3:]).transpose(0, 3, 1, 2).astype(np.float32)
        return pixels[:, ::-1] if self.color == "BGR" else pixels


def interval(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}..{high if high >= 0 else ''}"


def read_feature(description: FeatureDescription, dtype: str, shape: tuple[int | None, ...]) -> Feature:
    """The feature of one input; `dtype` and `shape` (None: flexible) are those of the program's own input."""
    if description.type.WhichOneof("Type") == "imageType":
        return image_feature(description.name, description.type.imageType, dtype, shape)
    return array_feature(description, description.type.multiArrayType, dtype, shape)


def array_feature(
    description: FeatureDescription, array: ArrayFeatureType, dtype: str, shape: tuple[int | None, ...]
) -> Feature:
    flexibility = array.WhichOneof("ShapeFlexibility")
    default = None
    if description.type.isOptional:
        kind = array.WhichOneof("defaultOptionalValue")
        default = float(getattr(array, kind)) if kind else 0.0
    shapes: tuple[Shape, ...] = (tuple(array.shape),) if array.shape else ()
    bounds = None
    if flexibility == "enumeratedShapes":
        shapes = tuple(dict.fromkeys((*shapes, *(tuple(s.shape) for s in array.enumeratedShapes.shapes))))
    elif flexibility == "shapeRange":
        bounds = tuple((r.lowerBound, r.upperBound) for r in array.shapeRange.sizeRanges)
    elif not shapes:
        bounds = tuple((0, -1) if n is None else (n, n) for n in shape)
    return Feature(description.name, dtype, shapes, bounds, default=default)


def image_feature(name: str, image: ImageFeatureType, dtype: str, shape: tuple[int | None, ...]) -> Feature:
    color = COLORS.get(image.colorSpace)
    if color is None:
        raise UsageError(f"image {name!r} has colour space {image.colorSpace}, known are {', '.join(COLORS.values())}")
    batch = shape[0] if shape and shape[0] is not None else 1
    channels = 3 if color in ("RGB", "BGR") else 1
    sizes = [(image.height, image.width)]
    flexibility = image.WhichOneof("SizeFlexibility")
    bounds = None
    if flexibility == "enumeratedSizes":
        sizes += [(size.height, size.width) for size in image.enumeratedSizes.sizes]
    elif flexibility == "imageSizeRange":
        rows, columns = image.imageSizeRange.heightRange, image.imageSizeRange.widthRange
        free = ((rows.lowerBound, rows.upperBound), (columns.lowerBound, columns.upperBound))
        bounds = ((batch, batch), (channels, channels), *free)
    shapes = tuple(dict.fromkeys((batch, channels, *size) for size in sizes))
    return Feature(name, dtype, shapes, bounds, color)
