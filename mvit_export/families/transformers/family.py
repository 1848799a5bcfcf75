"""The row of transformers' classifiers: a folder that `save_pretrained` wrote, or a model on the hub."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mvit_export.artifact import ModelInfo, WeightsInfo
from mvit_export.data.preprocessing import DEFAULT_PREPROCESSING, UNSTATED, Preprocessing
from mvit_export.errors import UsageError, WeightsError
from mvit_export.families.base import Family, Request
from mvit_export.families.modules import read_weights
from mvit_export.families.transformers.config import (
    MODEL_TYPES,
    TIMM_WRAPPER,
    check_config,
    digest_of,
    is_claimed,
    labels_of,
    picture_size,
)
from mvit_export.models.loaded import LoadedModel, count_parameters, state_digest
from mvit_export.models.outputs import distinguish
from mvit_export.models.processors import hf_preprocessing
from mvit_export.models.settings import Json, hf_labels, read_json, timm_preprocessing

if TYPE_CHECKING:
    from mvit_export.models.stored import StoredWeights

PREFIX = "transformers:"  # of a model's source, before its class and the digest of its settings
TIMM_DEFAULTS = Preprocessing(  # what timm takes where a network's own settings say nothing
    "RGB", (224, 224), 1 / 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "timm's defaults"
)


def claims(stored: StoredWeights) -> bool:
    """Whether a folder is transformers' and of no other family. Raises WeightsError for a damaged config.json."""
    from mvit_export.models.checkpoints import blame

    with blame(stored.name):
        return is_claimed(config_of(stored))


def config_of(stored: StoredWeights) -> Json:
    return (read_json(stored.folder / "config.json") if stored.folder else None) or {}


def load(asked: Request) -> LoadedModel:
    from mvit_export.families.transformers.network import build_classifier
    from mvit_export.models.checkpoints import blame
    from mvit_export.models.fit import check_classes

    stored = asked.stored or read_weights(asked, asked.weights)
    if stored is None or asked.pretrained:
        raise UsageError(f"--model {asked.model} names a class alone; pass --weights FOLDER, or --model hf:ID")
    with blame(stored.name):
        values = config_of(stored)
        check_config(values)
        module, name, notes = build_classifier(values, stored.checkpoint.tensors)
        classes = int(module.network.config.num_labels)  # type: ignore[union-attr,arg-type]
        check_classes(classes, asked.num_classes)
        source = f"{PREFIX}{name}:{digest_of(values)}"
        if asked.model not in (None, source):
            raise WeightsError(f"config.json describes {source}, the manifest says {asked.model}: it has changed since")
        preprocessing = preprocessing_of(stored.folder, values)
        labels = distinguish(hf_labels(labels_of(values), classes))
    info = ModelInfo(
        name=name_of(stored, values), source=source, task="image-classification", params=count_parameters(module),
        macs=0, num_classes=classes, labels=labels,
    )  # fmt: skip
    origin = WeightsInfo(
        stored.name, "hf", stored.checkpoint.sha256, state_digest(module), True, None, stored.revision,
        stored.checkpoint.ema,
    )  # fmt: skip
    return LoadedModel(module, info, origin, preprocessing, (), (), (*stored.checkpoint.notes, *notes))


def name_of(stored: StoredWeights, values: Json) -> str:
    """The last part of the folder's or the hub's name, e.g. vit_base_patch16_224."""
    last = Path(stored.name.partition("@")[0] if stored.revision else stored.name).name.rpartition(":")[2]
    return re.sub(r"\W+", "_", last, flags=re.ASCII).strip("_") or str(values["model_type"])


def preprocessing_of(folder: Path | None, values: Json) -> Preprocessing:
    """What the folder's files say; where they say nothing, the default at the network's own size."""
    if values["model_type"] == TIMM_WRAPPER:
        return timm_preprocessing(values, TIMM_DEFAULTS)
    processor = read_json(folder / "preprocessor_config.json") if folder else None
    if processor is None:
        return replace(DEFAULT_PREPROCESSING, crop=picture_size(values), source=UNSTATED)
    return hf_preprocessing(processor, MODEL_TYPES[values["model_type"]])


def prepare() -> None:
    """What another process imports before it can be sent a network."""
    from mvit_export.families.transformers.network import import_transformers

    import_transformers()


TRANSFORMERS = Family(
    title="transformers", owns=lambda source: source.startswith(PREFIX), load=load, prepare=prepare, claims=claims
)
