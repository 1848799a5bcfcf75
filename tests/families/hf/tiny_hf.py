"""Small classifiers of transformers with random weights, as `save_pretrained` writes them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from helpers import randomize

from mvit_export.families.transformers.network import import_transformers, quiet

SIDE = 32  # pixels
CLASSES = 5
PLAIN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SQUARE = {"image_size": SIDE, "patch_size": 8}
VIT = {**PLAIN, **SQUARE}
STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": SIDE, "patch_size": 4}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **SQUARE}
# The settings that make each network small; all have CLASSES classes.
SETTINGS: dict[str, dict[str, Any]] = {
    "beit": {**VIT, "use_relative_position_bias": True},
    "bit": {**RESNET, "num_groups": 4},
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "cvt": {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "data2vec-vision": {**VIT, "use_relative_position_bias": True},
    "deit": VIT,
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "efficientnet": {"image_size": SIDE, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "focalnet": {"embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "focal_levels": [2, 2],
                 "focal_windows": [3, 3], "image_size": SIDE, "patch_size": 4},
    "hiera": {"embed_dim": 8, "image_size": [64, 64], "depths": [1, 1, 1], "num_heads": [1, 2, 4],
              "patch_size": [7, 7], "num_query_pool": 2},
    "ijepa": VIT,
    "levit": {"image_size": 64, "hidden_sizes": [16, 16, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
              "key_dim": [8, 8, 8], "down_ops": [["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 2, 2, 2, 2]]},
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": SIDE},
    "mobilenet_v2": {"depth_multiplier": 0.35, "image_size": SIDE},
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.5},
    "poolformer": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "pvt": {"image_size": SIDE, "hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 2],
            "mlp_ratios": [2] * 4},
    "pvt_v2": {"image_size": SIDE, "hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4,
               "num_attention_heads": [1, 2, 2, 2], "mlp_ratios": [2] * 4},
    "regnet": {**RESNET, "groups_width": 4},
    "resnet": RESNET,
    "segformer": {"hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 2],
                  "mlp_ratios": [2] * 4},
    "siglip": {"vision_config": {**PLAIN, **SQUARE}, "text_config": {**PLAIN, "vocab_size": 8}},
    "swiftformer": {"image_size": SIDE, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 16]},
    "swin": STAGES,
    "swinv2": STAGES,
    "timm_wrapper": {"architecture": "test_byobnet", "model_args": {"drop_rate": 0.1}},
    "vit": VIT,
    "vit_msn": VIT,
}  # fmt: skip


def make_network(kind: str, name: str = "", **changes: Any) -> Any:
    """The network of a model_type, or the class `name` of it, with noise in every weight and BatchNorm."""
    library = import_transformers()
    known = importlib.import_module("transformers.models.auto.modeling_auto")
    classes = known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[kind]
    cls = getattr(library, name or (classes if isinstance(classes, str) else classes[0]))
    settings = {"num_labels": CLASSES, **SETTINGS[kind], **changes}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(cls(library.CONFIG_MAPPING[kind](**settings)))


def save(network: Any, folder: Path, **options: Any) -> Path:
    with quiet():
        network.save_pretrained(folder, **options)
    return folder


def save_processor(folder: Path, values: dict[str, Any]) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in values.items() if value is not None})
    )
