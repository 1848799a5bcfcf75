"""config.json of a classifier of transformers: which network it describes, and what is refused in it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mvit_export.errors import WeightsError
from mvit_export.models.settings import Json, check_one_of_n, section

FILE = "config.json"
TIMM_WRAPPER = "timm_wrapper"
# The networks, by model_type, and the image processor that is meant where a folder does not name one. Each was found
# equal to transformers' own answers. timm's networks have their preprocessing in config.json.
MODEL_TYPES: Mapping[str, str] = {
    "beit": "Beit",
    "bit": "Bit",
    "convnext": "ConvNext",
    "convnextv2": "ConvNext",
    "cvt": "ConvNext",
    "data2vec-vision": "Beit",
    "deit": "DeiT",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
    "efficientnet": "EfficientNet",
    "focalnet": "Bit",
    "hiera": "Bit",
    "ijepa": "ViT",
    "levit": "Levit",
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
    "mobilevitv2": "MobileViT",
    "poolformer": "PoolFormer",
    "pvt": "Pvt",
    "pvt_v2": "Pvt",
    "regnet": "ConvNext",
    "resnet": "ConvNext",
    "segformer": "Segformer",
    "siglip": "Siglip",
    "swiftformer": "ViT",
    "swin": "ViT",
    "swinv2": "ViT",
    TIMM_WRAPPER: "",
    "vit": "ViT",
    "vit_msn": "ViT",
}
# Networks with a mask or bias in attention: torch.export cannot take the fused form apart for ONNX.
EAGER = ("beit", "data2vec-vision", "swin")
OF_OTHERS = ("mobilevit",)  # model types with a family of their own
OF_OTHERS_IN_TIMM = "mobilevit"  # how such architectures of timm begin
TEACHERS = (".distillation_classifier.", ".classifier_distill.")  # weights of the head that was taught by a teacher
# Arguments of timm.create_model that read files, fetch, or make something else than a classifier of RGB pictures.
NO_ARGUMENTS = frozenset({
    "cache_dir", "checkpoint_path", "exportable", "features_only", "no_jit", "num_classes", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "scriptable",
})  # fmt: skip
# Fields that say nothing about the network as it is built here, in float32 and with its own kernels.
SAID_ELSEWHERE = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_experts_implementation", "_name_or_path",
    "architectures", "attn_implementation", "dtype", "experts_implementation", "torch_dtype", "transformers_version",
    "use_kernels",
})  # fmt: skip
REPEATS = re.compile("layers|depth|blocks|stages|repeats")  # in the names of what is built so many times
LABELS = frozenset({"id2label", "label2id", "label_names"})  # which the manifest has


def is_claimed(values: Json) -> bool:
    """Whether a folder with this config.json is transformers', and of no other family here."""
    kind = values.get("model_type")
    if kind == TIMM_WRAPPER:
        return not str(values.get("architecture")).startswith(OF_OTHERS_IN_TIMM)
    return kind is not None and kind not in OF_OTHERS


def check_config(values: Json) -> str:
    """The model_type. Raises WeightsError for a network that is not known, and for settings that change what it is."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        known = ", ".join([*OF_OTHERS, *MODEL_TYPES])
        raise WeightsError(f"{FILE} says model_type is {json.dumps(kind)}, expected one of {known}")
    if values.get("auto_map"):
        raise WeightsError(
            f"{FILE} has auto_map, Python code that comes with the model, which is never run; expected a network of "
            "transformers' own: build it in a file of yours, --model FILE.py:FACTORY"
        )
    if values.get("quantization_config"):
        raise WeightsError(f"{FILE} has quantization_config, expected weights in floating point: export it unquantized")
    if values.get("num_channels", 3) != 3:
        raise WeightsError(
            f"{FILE} says num_channels is {json.dumps(values['num_channels'])}, expected 3: RGB pictures"
        )
    check_one_of_n(values)
    if kind == TIMM_WRAPPER:
        check_arguments(section(values, "model_args"))
    return kind


def check_depth(values: Json, tensors: int) -> None:
    """Every layer has a tensor: a file that says more would be built for hours. Raises WeightsError."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_depth(value, tensors)
        counts = value if isinstance(value, list) else [value]
        if REPEATS.search(name) and any(isinstance(count, (int, float)) and count > tensors for count in counts):
            raise WeightsError(f"{FILE} says {name} is {json.dumps(value)}, the weights are {tensors} tensors in all")


def check_arguments(arguments: Json) -> None:
    for name, value in arguments.items():
        plain = value if isinstance(value, list) else [value]
        if name in NO_ARGUMENTS or not all(isinstance(item, (str, int, float, type(None))) for item in plain):
            raise WeightsError(f"{FILE} says model_args.{name} is {json.dumps(value)}, expected none of that name")
    if arguments.get("in_chans", 3) != 3:
        raise WeightsError(f"{FILE} says model_args.in_chans is {json.dumps(arguments['in_chans'])}, expected 3")


def choose_class(values: Json, known: str | tuple[str, ...], names: Iterable[str]) -> str:
    """The classifier among those `known` for a model_type: what config.json says, else what the weights have.

    `names` are those of the weights. Raises WeightsError for a network without a classifier, or with another task.
    """
    classes = (known,) if isinstance(known, str) else known
    said = values.get("architectures")
    if not said:
        taught = any(head in f".{name}" for name in names for head in TEACHERS)
        return classes[-1] if taught else classes[0]
    if not isinstance(said, list) or said[0] not in classes:
        raise WeightsError(f"{FILE} says architectures is {json.dumps(said)}, expected {' or '.join(classes)}")
    return str(said[0])


def settings_of(values: Json) -> dict[str, Any]:
    """The fields that describe the network."""
    return {name: value for name, value in values.items() if name not in SAID_ELSEWHERE}


def digest_of(values: Json) -> str:
    """Equal for files that describe the same network, whatever they call its classes."""
    said = {name: value for name, value in settings_of(values).items() if name not in LABELS}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def labels_of(values: Json) -> Json:
    """In transformers' way; timm's files list the names."""
    names = values.get("label_names")
    return {"id2label": dict(enumerate(names))} if isinstance(names, list) else values


def picture_size(values: Json) -> tuple[int, int]:
    """Height and width in pixels where no file states them: the network's own, else 224, ImageNet's usual one."""
    found = values.get("image_size")
    sides = found if isinstance(found, list) and len(found) == 2 else [found, found]
    height, width = (side if isinstance(side, int) and side > 0 else 224 for side in sides)
    return height, width
