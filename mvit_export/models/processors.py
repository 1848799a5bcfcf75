"""preprocessor_config.json of transformers, read strictly into a `Preprocessing`.

A file names an image processor and says what differs from its defaults; older files say little else. The defaults and
the steps of each kind are facts of transformers' documentation of its processors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mvit_export.data.preprocessing import Preprocessing, Size
from mvit_export.errors import WeightsError
from mvit_export.models.settings import PIL_RESAMPLING, Json, numbers

FILE = "preprocessor_config.json"
Three = tuple[float, float, float]
HALF: tuple[Three, Three] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: tuple[Three, Three] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: tuple[Three, Three] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BILINEAR, BICUBIC = 2, 3
SQUASHED_FROM = 384  # pixels: from this size on ConvNext resizes straight to the square


@dataclass(frozen=True)
class Processor:
    """What one kind of image processor does where its file says nothing.

    `square` says what a single number as size means: a square, or else the shortest edge. `enlarge` is the kind's own
    way from the size to what is resized to: by "levit" 256/224 of it, by "crop_pct" the size divided by that field, by
    "convnext" likewise below 384 with a crop to the size, and to a square from there on.
    """

    size: int
    crop: int | None = None
    crops: bool = False  # whether a crop follows the resize
    resample: int = BICUBIC
    statistics: tuple[Three, Three] | None = HALF  # mean and standard deviation in RGB; None: not normalized
    square: bool = True
    enlarge: str = ""
    crop_pct: float | None = None
    twice: bool = False  # divides by the deviation a second time, unless include_top is off
    flips: bool = False  # to BGR


PROCESSORS: Mapping[str, Processor] = {
    "MobileViT": Processor(288, 256, True, BILINEAR, None, square=False, flips=True),
    "ViT": Processor(224, resample=BILINEAR),
    "DeiT": Processor(256, 224, True),
    "Beit": Processor(224, 224),
    "Bit": Processor(224, 224, True, statistics=CLIP, square=False),
    "CLIP": Processor(224, 224, True, statistics=CLIP, square=False),
    "ConvNext": Processor(384, square=False, enlarge="convnext", crop_pct=224 / 256),
    "EfficientNet": Processor(346, 289, twice=True),
    "Levit": Processor(224, 224, True, statistics=IMAGENET, square=False, enlarge="levit"),
    "MobileNetV1": Processor(256, 224, True, BILINEAR, square=False),
    "MobileNetV2": Processor(256, 224, True, BILINEAR, square=False),
    "PoolFormer": Processor(224, 224, True, statistics=IMAGENET, square=False, enlarge="crop_pct", crop_pct=0.9),
    "Pvt": Processor(224, statistics=IMAGENET),
    "Segformer": Processor(512, resample=BILINEAR, statistics=IMAGENET),
    "Siglip": Processor(224),
}
# Fields of preprocessor_config.json that are read, and those without effect on the pixels. All others may change the
# pixels in a way that `Preprocessing` cannot express: they must be absent, null or off.
READ = {
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_flip_channel_order",
}  # fmt: skip
HARMLESS = {
    "image_processor_type", "feature_extractor_type", "processor_class", "do_reduce_labels", "do_convert_rgb",
    "default_to_square", "data_format", "input_data_format", "return_tensors", "device", "disable_grouping",
    "transformers_version", "auto_map", "_valid_processor_keys", "backend",
}  # fmt: skip


def hf_preprocessing(values: Json, kind: str = "MobileViT") -> Preprocessing:
    """What `values` of a file say; `kind` of processor is meant where they name none. Null is a value: a step is off.

    Resize, crop, scale, normalize, then flip channels. Raises WeightsError that names the field.
    """
    processor = processor_of(values, kind)
    own = {"convnext": {"crop_pct"}, "crop_pct": {"crop_pct"}}.get(processor.enlarge, set())
    own |= {"rescale_offset", "include_top"} if processor.twice else set()
    unknown = next((key for key in values if key not in READ | HARMLESS | own and values[key]), None)
    if unknown is not None:
        raise unusable(unknown, values[unknown], "no such step, which this preprocessing does not have")
    for name in ("do_resize", "do_rescale"):
        if not values.get(name, True):
            raise unusable(name, values[name], "true")
    resample = values.get("resample", processor.resample)
    if not isinstance(resample, int) or resample not in PIL_RESAMPLING:
        names = ", ".join(f"{number} ({name})" for number, name in PIL_RESAMPLING.items())
        raise unusable("resample", resample, f"one of {names}")
    crop, ratio, squash = hf_sizes(values, processor)
    flip = values.get("do_flip_channel_order", processor.flips)
    mean, std = hf_statistics(values, processor)
    return Preprocessing(
        "BGR" if flip else "RGB",
        crop=crop,
        resize_ratio=ratio,
        interpolation=PIL_RESAMPLING[resample],
        # The file lists them for RGB, since transformers flips last; ours are in channel order.
        mean=mean[::-1] if flip else mean,
        std=std[::-1] if flip else std,
        source=FILE,
        squash=squash,
    )


def processor_of(values: Json, kind: str) -> Processor:
    """The row of the kind that a file names, e.g. ViTImageProcessorFast or, in older ones, ViTFeatureExtractor."""
    field = next((name for name in ("image_processor_type", "feature_extractor_type") if values.get(name)), None)
    if field is None:
        return PROCESSORS[kind]
    name = str(values[field])
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(ending)
    if name not in PROCESSORS:
        known = ", ".join(f"{other}ImageProcessor" for other in PROCESSORS)
        raise unusable(field, values[field], f"one of {known}")
    return PROCESSORS[name]


def hf_statistics(values: Json, processor: Processor) -> tuple[Three, Three]:
    """Mean and standard deviation in RGB of a pixel / 255, whatever the file multiplies pixels by."""
    unit, offset = hf_scale(values, processor)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    again = processor.twice and values.get("include_top", True)
    normalizes = values.get("do_normalize", processor.statistics is not None)
    if normalizes or again:
        found = [three(values, name, processor, index) for index, name in enumerate(("image_mean", "image_std"))]
        if not all(value > 0 for value in found[1]):
            raise unusable("image_std", values["image_std"], "no zero in it, and nothing below")
        mean, std = found[0] if normalizes else mean, found[1] if normalizes else std
        std = product(std, found[1]) if again else std
    # (p * unit / 255 - offset - mean) / std, written with p / 255 alone
    means = [(value + offset) / unit for value in mean]
    deviations = [value / unit for value in std]
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])


def product(one: Three, other: Three) -> Three:
    return one[0] * other[0], one[1] * other[1], one[2] * other[2]


def hf_scale(values: Json, processor: Processor) -> tuple[float, float]:
    """What 255 becomes, and what is subtracted from it. Only EfficientNet's processor has other scales."""
    factor = values.get("rescale_factor", 1 / 255)
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if number and math.isclose(factor, 1 / 255, rel_tol=1e-4):
        unit = 1.0
    elif number and processor.twice and 1e-6 < factor < 1e3:
        unit = 255 * factor
    else:
        raise unusable("rescale_factor", factor, "1/255")
    return unit, float(processor.twice and bool(values.get("rescale_offset", False)))


def three(values: Json, name: str, processor: Processor, index: int) -> Three:
    """The field's numbers for R, G and B; a single one counts for all."""
    if name not in values and processor.statistics is not None:
        return processor.statistics[index]
    found = values.get(name)
    if found is None:
        raise unusable(name, None, "three numbers, because do_normalize is true")
    try:
        each = {name: [found] * 3} if isinstance(found, int | float) else values
        red, green, blue = numbers(each, name, 3, ())
    except WeightsError as error:
        raise WeightsError(f"{FILE}: {error}") from error
    return red, green, blue


def hf_sizes(values: Json, processor: Processor) -> tuple[Size, float | None, bool]:
    """The crop, the resize ratio, and whether that resize squashes; see `Preprocessing`."""
    size = values.get("size", {} if processor.square else processor.size)
    crops = bool(values.get("do_center_crop", processor.crops))
    short = size.get("shortest_edge") if isinstance(size, Mapping) and len(size) == 1 else size
    single = isinstance(size, int) and not isinstance(size, bool)
    if single and values.get("default_to_square", processor.square):
        short = None
    if isinstance(short, int) and short > 0:  # the short side, aspect kept
        return short_side(values, processor, size, short, crops)
    resized = height_width(values, "size", processor.size)
    if processor.enlarge == "crop_pct":
        raise unusable("size", size, "a size by shortest edge")
    if processor.enlarge == "convnext":
        raise unusable("size", size, "a size by shortest edge, the only one that this processor takes")
    if not crops:
        return resized, None, False
    crop = height_width(values, "crop_size", processor.crop or processor.size)
    ratio = resized[0] / crop[0]
    if ratio < 1 or tuple(round(side * ratio) for side in crop) != resized:
        raise unusable("crop_size", values.get("crop_size"), f"a crop of the same shape as the size {list(resized)}")
    return (crop, None, False) if crop == resized else (crop, ratio, True)


def short_side(
    values: Json, processor: Processor, size: Any, short: int, crops: bool
) -> tuple[Size, float | None, bool]:
    """As `hf_sizes`, for a size that gives the shortest edge."""
    if processor.enlarge == "convnext":
        if crops:
            raise unusable("do_center_crop", True, "false, because this processor crops by itself")
        if short >= SQUASHED_FROM:
            return (short, short), None, False
        crop = (short, short)
    else:
        crop = height_width(values, "crop_size", processor.crop or 256)
    if not crops and processor.enlarge != "convnext":
        raise unusable("do_center_crop", values.get("do_center_crop"), "true where size gives only the shortest edge")
    if crop[0] != crop[1]:
        raise unusable("crop_size", values["crop_size"], "a square where size gives the shortest edge")
    resized = enlarged(values, processor, short)
    if resized < crop[0]:
        raise unusable("size", size, f"at least the crop of {crop[0]}, because nothing pads here")
    return crop, resized / crop[0], False


def enlarged(values: Json, processor: Processor, short: int) -> int:
    """The short side in pixels after the resize."""
    if processor.enlarge == "levit":
        return int((256 / 224) * short)
    if not processor.enlarge:
        return short
    part = values.get("crop_pct", processor.crop_pct)
    if not isinstance(part, int | float) or not 0 < part <= 1:
        raise unusable("crop_pct", part, "a number in (0, 1]")
    return int(short / part)


def height_width(values: Json, name: str, default: int) -> Size:
    found = values.get(name, default)
    height, width = (found.get("height"), found.get("width")) if isinstance(found, Mapping) else (found, found)
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    raise unusable(name, found, "height and width in pixels")


def unusable(name: str, value: Any, expected: str) -> WeightsError:
    return WeightsError(f"{FILE} says {name} is {json.dumps(value)}, expected {expected}")
