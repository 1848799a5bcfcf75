"""preprocessor_config.json gives the pixels that transformers' own image processor gives, or an error."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvit_export.data.preprocessing import Preprocessing, to_picture, to_tensor
from mvit_export.data.synthetic import open_photo
from mvit_export.errors import WeightsError
from mvit_export.families.transformers.network import import_transformers, quiet
from mvit_export.models.processors import PROCESSORS, hf_preprocessing

MODULES = {"ConvNext": "convnext", "MobileNetV1": "mobilenet_v1", "MobileNetV2": "mobilenet_v2"}
CUBE = {"height": 24, "width": 24}
OBLONG = {"height": 20, "width": 30}
# What files say, those of older versions too: a size as one number, or hardly anything.
FILES: list[tuple[str, dict[str, Any]]] = [
    *(
        (kind, {"resample": 2, "size": 288} if kind == "MobileViT" else {}) for kind in PROCESSORS
    ),  # whose defaults have changed
    ("ViT", {"size": 24, "resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.4]}),
    ("ViT", {"size": OBLONG, "do_normalize": False}),
    ("ViT", {"size": CUBE, "do_normalize": None, "do_pad": False, "crop_size": None}),  # null switches off
    ("DeiT", {"size": 32, "crop_size": 28}),
    ("DeiT", {"size": {"shortest_edge": 32}, "crop_size": 24}),
    ("DeiT", {"size": {"height": 40, "width": 60}, "crop_size": OBLONG}),
    ("Beit", {"size": 32, "crop_size": 28, "do_center_crop": True}),
    ("Bit", {"size": {"shortest_edge": 32}, "crop_size": CUBE}),
    ("ConvNext", {"size": 96}),
    ("ConvNext", {"size": {"shortest_edge": 96}, "crop_pct": 0.95}),
    ("ConvNext", {"size": 384, "crop_pct": 0.5}),
    ("EfficientNet", {"size": CUBE, "rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False}),
    ("EfficientNet", {"size": CUBE, "do_normalize": False, "image_std": [0.3, 0.2, 0.4]}),
    ("EfficientNet", {"size": 40, "crop_size": 30, "do_center_crop": True, "resample": 0}),
    ("Levit", {"size": 56, "crop_size": 56}),
    ("MobileNetV2", {"size": {"shortest_edge": 32}, "crop_size": CUBE, "image_mean": [0.5, 0.4, 0.3]}),
    ("MobileViT", {"size": 32, "crop_size": CUBE, "do_flip_channel_order": False, "resample": 3}),
    ("PoolFormer", {"size": 56, "crop_size": 56, "crop_pct": 0.95}),
]


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    import_transformers()


def theirs(kind: str, values: dict[str, Any], image: Image.Image) -> np.ndarray:
    """float32 (1, 3, H, W), by transformers' processor of that kind, which resizes with Pillow as we do."""
    name = MODULES.get(kind, kind.lower())
    with quiet():
        module = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
        processor = getattr(module, f"{kind}ImageProcessorPil")(**values)
        return np.stack(processor(image, return_tensors="np")["pixel_values"])


def ours(preprocessing: Preprocessing, image: Image.Image) -> np.ndarray:
    return to_tensor(to_picture(image, preprocessing)[None], preprocessing)


@pytest.mark.parametrize(("kind", "values"), FILES, ids=lambda value: str(value))
@pytest.mark.parametrize("named", [True, False], ids=["named", "by model"])
def test_pixels_are_those_of_the_processor(kind: str, values: dict[str, Any], named: bool) -> None:
    written = json.loads(json.dumps(values | ({"image_processor_type": f"{kind}ImageProcessorFast"} if named else {})))
    image = open_photo("chelsea")  # oblong
    expected, found = theirs(kind, values, image), ours(hf_preprocessing(written, kind), image)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another processor": (
        "ViT",
        {"image_processor_type": "DonutImageProcessor"},
        'image_processor_type is "DonutImageProcessor", expected one of MobileViTImageProcessor, ViTImageProcessor, ',
    ),
    "an older one": ("ViT", {"feature_extractor_type": "MyExtractor"}, 'feature_extractor_type is "MyExtractor"'),
    "crop of another's": ("ViT", {"crop_pct": 0.9}, "crop_pct is 0.9, expected no such step"),
    "offset of another's": ("ViT", {"rescale_offset": True}, "rescale_offset is true, expected no such step"),
    "factor": ("ViT", {"rescale_factor": 1 / 127.5}, "rescale_factor is 0.00784313725490196, expected 1/255"),
    "no factor": ("EfficientNet", {"rescale_factor": "x"}, 'rescale_factor is "x", expected 1/255'),
    "another shape": ("DeiT", {"size": OBLONG, "crop_size": 16}, "crop_size is 16, expected a crop of the same shape"),
    "larger crop": ("DeiT", {"size": 16, "crop_size": 24}, "crop_size is 24, expected a crop of the same shape"),
    "short side alone": ("ViT", {"size": {"shortest_edge": 24}}, "do_center_crop is null, expected true where size"),
    "two sizes": ("Bit", {"size": {"shortest_edge": 24, "longest_edge": 48}}, "expected height and width in pixels"),
    "two crops": ("ConvNext", {"size": 96, "do_center_crop": True}, "do_center_crop is true, expected false, because"),
    "no short side": ("ConvNext", {"size": CUBE}, "expected a size by shortest edge, the only one"),
    "part": ("PoolFormer", {"crop_pct": 1.5}, "crop_pct is 1.5, expected a number in (0, 1]"),
    "deviation": ("ViT", {"image_std": [1, -1, 1]}, "image_std is [1, -1, 1], expected no zero in it"),
    "mean": ("ViT", {"image_mean": [1, 2]}, "image_mean is [1, 2], expected a list of 3 numbers"),
    "padding": ("ViT", {"do_pad": True, "pad_size": CUBE}, "do_pad is true, expected no such step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_named(name: str) -> None:
    kind, values, message = REFUSED[name]
    with pytest.raises(WeightsError) as found:
        hf_preprocessing(values, kind)
    assert message in str(found.value)
    assert str(found.value).startswith("preprocessor_config.json")


def test_squash_is_written_only_where_it_is_set() -> None:
    kept, squashed = Preprocessing("RGB"), Preprocessing("RGB", squash=True)
    assert "squash" not in kept.to_json()
    assert Preprocessing.from_json(squashed.to_json()) == squashed
    assert Preprocessing.from_json(kept.to_json()) == kept
