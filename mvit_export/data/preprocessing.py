"""From a photograph to the array that a checkpoint was trained on.

Preprocessing belongs to the checkpoint: ml-cvnets and Hugging Face trained on BGR, timm's files need RGB.
It has two halves. Resize and crop happen on the device, by its image API (`to_picture`); the rest, channel order
and value range (`to_tensor`), is what `--input image` bakes into the exported file.

Needs only numpy, and Pillow for `to_picture`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mvit_export.errors import UsageError
from mvit_export.system.records import build

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # height, width in pixels
CHANNEL_ORDERS = ("RGB", "BGR")
MOST_SIDE = 2**14  # pixels of a crop
MOST_PIXELS = 2**27  # of a picture while it is resized
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become numbers: `(pixel / 255 - mean) / std`, channels in `channel_order`.

    `resize_ratio` is the short side after resizing over the crop's side (288 / 256 for ml-cvnets); None resizes
    straight to the crop without keeping the aspect. With `squash` both sides become the crop's times the ratio, so
    that the aspect is not kept either; the JSON has it only where it is set. `mean` and `std` are listed in
    `channel_order`. `source` says where the values come from, so that a guess is never mistaken for a fact.
    """

    channel_order: str
    crop: Size = (256, 256)
    resize_ratio: float | None = 288 / 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    source: str = "default"
    squash: bool = False

    def __post_init__(self) -> None:
        if self.channel_order not in CHANNEL_ORDERS:
            raise UsageError(f"channel order is {self.channel_order!r}, expected one of {', '.join(CHANNEL_ORDERS)}")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"interpolation is {self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}")
        if self.resize_ratio is not None and not 0.1 <= self.resize_ratio <= 10:
            raise UsageError(f"the resize ratio is {self.resize_ratio}, expected 0.1 to 10")
        if not all(1 <= side <= MOST_SIDE for side in self.crop):
            raise UsageError(f"the crop is {self.crop}, expected sides of 1 to {MOST_SIDE}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise UsageError(f"mean and std are {self.mean} and {self.std}, expected three each, std above 0")

    def with_size(self, size: Size) -> Preprocessing:
        """The same preprocessing for another crop; the resize keeps its ratio to the crop."""
        return replace(self, crop=size)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if (name, value) != ("squash", False)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Rebuild from `to_json`'s dict. Raises ValueError or UsageError for what it does not write."""
        found: Preprocessing = build(cls, data, "preprocessing")
        return found


# By weight family. Facts: ml-cvnets v0.1 and the Hugging Face image processor; timm's `mobilevit_*` configurations.
FAMILY_PREPROCESSING = {
    "ml-cvnets": Preprocessing("BGR", source="family ml-cvnets"),
    "hf": Preprocessing("BGR", source="family hf"),
    "timm": Preprocessing("RGB", resize_ratio=1 / 0.9, interpolation="bicubic", source="family timm"),
}
DEFAULT_PREPROCESSING = Preprocessing("RGB")
UNSTATED = "taken for granted"  # the source of preprocessing that nobody stated
SQUASH = "squash"


@dataclass(frozen=True)
class Stated:
    """What a user says about a network's preprocessing: `(pixel * scale - mean) / std`, None for what he leaves open.

    `resize` is the short side in pixels before the crop, or "squash": straight to the crop without keeping the aspect.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    channels: str | None = None
    resize: int | str | None = None

    def on(self, known: Preprocessing) -> Preprocessing:
        """`known` with what is stated. Raises UsageError for values out of range."""
        said = [name for name, value in asdict(self).items() if value is not None]
        if not said:
            return known
        if self.scale is not None and not 0 < self.scale <= 1:
            raise UsageError(f"--scale is {self.scale}, expected what a pixel is multiplied by, such as 1/255 or 1")
        if isinstance(self.resize, str) and self.resize != SQUASH:
            raise UsageError(f"--resize is {self.resize!r}, expected pixels of the short side, or {SQUASH}")
        unit = 255 * (self.scale or 1 / 255)  # of mean and std, where a pixel is at most 1
        mean = self.mean if self.mean is not None else tuple(value * unit for value in known.mean)
        std = self.std if self.std is not None else (1.0,) * 3 if self.scale else known.std
        ratio = self.resize / min(known.crop) if isinstance(self.resize, int) else None
        return replace(
            known,
            channel_order=(self.channels or known.channel_order).upper(),
            resize_ratio=known.resize_ratio if self.resize is None else ratio,
            squash=known.squash and self.resize is None,
            mean=tuple(value / unit for value in mean),
            std=tuple(value / unit for value in std),
            source=f"stated: {', '.join(said)}; the rest: {known.source}",
        )


def describe_unstated(known: Preprocessing) -> str:
    """What is said where pictures are used and nobody stated how they become numbers."""
    return (
        f"nobody stated the preprocessing: {known.channel_order}, pixels / 255 without mean and std, resized to "
        f"{known.resize_ratio:g} of the crop, is taken for granted; use --mean, --std, --scale, --channels, --resize"
    )


def resized_size(size: Size, preprocessing: Preprocessing) -> Size:
    """Height and width after the resize: both cover `crop * resize_ratio`, the smaller side exactly, same aspect.

    Without an aspect to keep, both are exactly that.
    """
    if preprocessing.resize_ratio is None:
        return preprocessing.crop
    height, width = size
    want_h, want_w = (round(side * preprocessing.resize_ratio) for side in preprocessing.crop)
    if preprocessing.squash:
        return want_h, want_w
    if want_h * width >= want_w * height:  # the height is the tighter side
        return want_h, max(want_w, int(want_h * width / height))
    return max(want_h, int(want_w * height / width)), want_w


def to_picture(image: Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize and centre-crop a PIL image: uint8 RGB (H, W, 3) with (H, W) = `preprocessing.crop`."""
    from PIL import Image as PilImage

    height, width = resized_size((image.height, image.width), preprocessing)
    if height * width > MOST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} would be resized to {width}x{height}, which is too large")
    resample = PilImage.Resampling[preprocessing.interpolation.upper()]
    resized = np.asarray(to_rgb(image).resize((width, height), resample))  # (height, width, 3)
    crop_h, crop_w = preprocessing.crop
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    return resized[top : top + crop_h, left : left + crop_w]


def to_rgb(image: Image) -> Image:
    """A PIL image with 8 bits a channel. Transparency is dropped, as torchvision's loader does.

    16-bit grey is scaled, since Pillow's own conversion cuts it off at 255. Raises ValueError for numbers whose range
    nobody states: 32-bit or signed integers, and floats.
    """
    from PIL import Image as PilImage

    # Pillow before 11.3 opens a 16-bit PNG as "I", which is otherwise 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.uint32)
        grey = (values + 128) // 257  # 65535 -> 255, rounded
        image = PilImage.fromarray((255 - grey if white_is_zero(image) else grey).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise ValueError(f"pixels are {kind}, whose range is not stated; save it with 8 or 16 bits")
    return image.convert("RGB")


def white_is_zero(image: Image) -> bool:
    """TIFF's tag 262, PhotometricInterpretation, which Pillow heeds with 8 bits alone."""
    return getattr(image, "tag_v2", {}).get(262) == 0


def to_tensor(pictures: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 RGB (B, H, W, 3) -> float32 (B, 3, H, W) in the checkpoint's channel order and value range."""
    if preprocessing.channel_order == "BGR":
        pictures = pictures[..., ::-1]
    mean, std = (np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    x = (pictures.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2), dtype=np.float32)
