"""The JSON files beside the weights, in Hugging Face's and timm's folders, read strictly.

A value that our network or `Preprocessing` cannot express is an error with the field's name, never ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvit_export.data.preprocessing import Preprocessing, Size
from mvit_export.errors import WeightsError, reason_of
from mvit_export.system.reading import read_json as load_json

Json = Mapping[str, Any]
ONE_OF_N = "single_label_classification"
MOST = 1e6  # of a size, a mean or a deviation; NaN is not below it
PIL_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None if there is no such file."""
    try:
        content = load_json(path)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:  # ValueError covers bad JSON and bad UTF-8
        raise WeightsError(f"{path.name} is not readable JSON ({reason_of(error)}): download it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path.name} holds a {type(content).__name__}, expected a JSON object")
    return content


def check_one_of_n(values: Json) -> None:
    """transformers says so in config.json where a network's outputs are no scores of exclusive classes."""
    kind = values.get("problem_type")
    if kind not in (None, ONE_OF_N):
        raise WeightsError(
            f"config.json says problem_type is {kind}, expected {ONE_OF_N}; only one-of-n classifiers are exported "
            "from checkpoints, so pass the network as --model FILE.py:FACTORY"
        )


def check_fields(file: str, values: Json, accepted: Mapping[str, tuple[Any, ...]], *, within: str = "") -> None:
    """Refuse the first field with another value; an absent field or null says nothing."""
    for name, allowed in accepted.items():
        if values.get(name) is not None and values[name] not in allowed:
            expected = " or ".join(json.dumps(value) for value in allowed) or "none of that name"
            message = f"{file} says {within}{name} is {json.dumps(values[name])}, expected {expected}"
            raise WeightsError(f"{message}: this network has no other")


def section(values: Json, name: str) -> Json:
    """An object inside config.json; empty if it is absent or null."""
    found = values.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise WeightsError(f"config.json says {name} is {json.dumps(found)}, expected an object")
    return found or {}


def hf_labels(values: Json, classes: int) -> tuple[str, ...] | None:
    """The class names of config.json's id2label; None if they are absent or only LABEL_0, LABEL_1, ..."""
    names = values.get("id2label")
    if not isinstance(names, Mapping) or all(name == f"LABEL_{key}" for key, name in names.items()):
        return None
    if {str(key) for key in names} != {str(index) for index in range(classes)}:
        message = f"config.json names {len(names)} classes in id2label, the classifier has {classes}"
        raise WeightsError(f"{message}: expected one name for each index from 0 to {classes - 1}")
    by_index = {str(key): name for key, name in names.items()}
    return tuple(str(by_index[str(index)]) for index in range(classes))


def timm_preprocessing(values: Json, known: Preprocessing) -> Preprocessing:
    """From `pretrained_cfg` in timm's config.json; absent fields have the values `known` of timm's own files."""
    cfg = section(values, "pretrained_cfg")
    check_fields(
        "config.json",
        cfg,
        {"crop_mode": ("center",), "interpolation": tuple(PIL_RESAMPLING.values())},
        within="pretrained_cfg.",
    )
    channels, height, width = numbers(cfg, "input_size", 3, (3, *known.crop))
    if channels != 3 or height != width:
        raise WeightsError(f"config.json says pretrained_cfg.input_size is {cfg['input_size']}, expected [3, N, N]")
    crop_pct = cfg.get("crop_pct")
    if crop_pct is not None and (not isinstance(crop_pct, int | float) or not 0 < crop_pct <= 1):
        raise WeightsError(f"config.json says pretrained_cfg.crop_pct is {crop_pct!r}, expected a number in (0, 1]")
    return Preprocessing(
        "RGB",
        crop=(int(height), int(width)),
        resize_ratio=known.resize_ratio if crop_pct is None else 1 / crop_pct,
        interpolation=cfg.get("interpolation") or known.interpolation,
        mean=numbers(cfg, "mean", 3, known.mean),
        std=numbers(cfg, "std", 3, known.std),
        source="config.json (pretrained_cfg)" if cfg else known.source,
    )


def numbers(values: Json, name: str, count: int, default: tuple[float, ...]) -> tuple[float, ...]:
    """`count` numbers from the list `values[name]`."""
    found = values.get(name)
    if found is None:
        return default
    if (
        not isinstance(found, list)
        or len(found) != count
        or not all(isinstance(x, int | float) and abs(x) < MOST for x in found)
    ):
        raise WeightsError(f"{name} is {json.dumps(found)}, expected a list of {count} numbers")
    return tuple(found)


# Fields of preprocessor_config.json that `hf_preprocessing` reads, and those without effect on the pixels. All others
# may change the pixels in a way that `Preprocessing` cannot express: they must be absent, null or off.
READ = {
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_flip_channel_order",
}  # fmt: skip
HARMLESS = {
    "image_processor_type", "feature_extractor_type", "processor_class", "do_reduce_labels", "do_convert_rgb",
    "default_to_square", "data_format", "input_data_format", "return_tensors", "device", "disable_grouping",
    "transformers_version", "auto_map", "_valid_processor_keys", "backend",
}  # fmt: skip


def hf_preprocessing(values: Json) -> Preprocessing:
    """preprocessor_config.json as MobileViT's image processor reads it: resize, crop, scale, then flip channels."""
    unknown = next((key for key in values if key not in READ | HARMLESS and values[key]), None)
    if unknown is not None:
        raise unusable(unknown, values[unknown], "no such step, which this preprocessing does not have")
    for name in ("do_resize", "do_rescale"):
        if not values.get(name, True):
            raise unusable(name, values[name], "true")
    factor = values.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-4):
        raise unusable("rescale_factor", factor, "1/255")
    resample = values.get("resample", 2)
    if not isinstance(resample, int) or resample not in PIL_RESAMPLING:
        names = ", ".join(f"{number} ({name})" for number, name in PIL_RESAMPLING.items())
        raise unusable("resample", resample, f"one of {names}")
    crop, ratio = hf_sizes(values)
    flip = values.get("do_flip_channel_order", flips_by_default(values))
    mean, std = hf_statistics(values)
    return Preprocessing(
        "BGR" if flip else "RGB",
        crop=crop,
        resize_ratio=ratio,
        interpolation=PIL_RESAMPLING[resample],
        # The file lists them for RGB, since transformers flips last; ours are in channel order.
        mean=mean[::-1] if flip else mean,
        std=std[::-1] if flip else std,
        source="preprocessor_config.json",
    )


def flips_by_default(values: Json) -> bool:
    """Only MobileViT's own processors flip channels without being told."""
    processor = values.get("image_processor_type") or values.get("feature_extractor_type") or "MobileViT"
    return str(processor).startswith("MobileViT")


def hf_statistics(values: Json) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation in RGB; they only count if do_normalize is on."""
    if not values.get("do_normalize"):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    for name in ("image_mean", "image_std"):
        if values.get(name) is None:
            raise unusable(name, None, "three numbers, because do_normalize is true")
    try:
        mean, std = numbers(values, "image_mean", 3, ()), numbers(values, "image_std", 3, ())
    except WeightsError as error:
        raise WeightsError(f"preprocessor_config.json: {error}") from error
    if not all(std):
        raise unusable("image_std", values["image_std"], "no zero in it")
    return mean, std


def hf_sizes(values: Json) -> tuple[Size, float | None]:
    """The crop and the resize ratio (None: straight to the crop). Old files have a single number as size."""
    size, crops = values.get("size", 288), values.get("do_center_crop", True)
    short = size.get("shortest_edge") if isinstance(size, Mapping) and len(size) == 1 else size
    if isinstance(short, int) and short > 0:  # the short side, aspect kept
        crop = height_width(values, "crop_size", 256)
        if not crops:
            raise unusable("do_center_crop", values["do_center_crop"], "true where size gives only the shortest edge")
        if crop[0] != crop[1]:
            raise unusable("crop_size", values["crop_size"], "a square where size gives the shortest edge")
        if short < crop[0]:
            raise unusable("size", size, f"at least the crop of {crop[0]}, because nothing pads here")
        return crop, short / crop[0]
    resized = height_width(values, "size", 256)
    if crops and height_width(values, "crop_size", 256) != resized:
        raise unusable("crop_size", values.get("crop_size"), f"the size {list(resized)}, or a size by shortest edge")
    return resized, None


def height_width(values: Json, name: str, default: int) -> Size:
    found = values.get(name, default)
    height, width = (found.get("height"), found.get("width")) if isinstance(found, Mapping) else (found, found)
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    raise unusable(name, found, "height and width in pixels")


def unusable(name: str, value: Any, expected: str) -> WeightsError:
    return WeightsError(f"preprocessor_config.json says {name} is {json.dumps(value)}, expected {expected}")
