"""The JSON files beside the weights, in Hugging Face's and timm's folders, read strictly.

A value that our network or `Preprocessing` cannot express is an error with the field's name, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvit_export.data.preprocessing import Preprocessing
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
