"""What families share that read checkpoints of several sources: ml-cvnets, transformers, timm and our own files.

A source is known by its names for the weights, a variant by their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mvit_export.data.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from mvit_export.errors import WeightsError
from mvit_export.models.prefixes import align
from mvit_export.models.processors import hf_preprocessing
from mvit_export.models.settings import Json, hf_labels, read_json, timm_preprocessing


@dataclass(frozen=True)
class LoadedWeights:
    """A checkpoint ready for the `load_state_dict` of the family's network, built from `config`."""

    state: Mapping[str, Tensor]  # our names, fp32, contiguous
    config: Any  # the family's own
    variant: str  # one of the family's, or its "custom" for one of our own files with other sizes
    family: str  # "mvit-export", "ml-cvnets", "hf" or "timm"
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None  # class names, if the checkpoint has real ones
    source: str  # as the user wrote it; a local path made absolute
    sha256: str  # of the weights file
    revision: str | None = None  # commit on the hub
    ema: bool | None = None  # whether these are the averaged weights, where the file has such
    notes: tuple[str, ...] = ()  # what was decided, a line each


@dataclass(frozen=True)
class Details:
    """What the files beside the tensors say."""

    config: Any  # the family's own
    variant: str
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None = None


Refused = tuple[tuple[str, ...], str]  # how the names of another network begin, and the message

NO_CLASSIFIERS: tuple[Refused, ...] = (
    (
        ("ssd_heads.", "extra_layers."),
        "a detection checkpoint (SSDLite): only classification is exported so far;"
        " expected a checkpoint with a classifier",
    ),
    (
        ("seg_head.", "segmentation_head."),
        "a segmentation checkpoint (DeepLabV3): only classification is exported so far;"
        " expected a checkpoint with a classifier",
    ),
    (
        ("encoder.conv_1.", "encoder.layer_1."),
        "a detection or segmentation backbone: only classification is exported so far;"
        " expected a checkpoint with a classifier",
    ),
)


def refuse_others(state: Mapping[str, Tensor], refused: Sequence[Refused]) -> None:
    """Raises WeightsError for networks known by how their names begin, behind any prefix that all of them share."""
    parts = [key.split(".") for key in state if "." in key]  # the others count something
    depth = next((i for i, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1), 0)
    for index in range(depth + 1):
        for starts, message in refused:
            key = next((key for key in state if ".".join(key.split(".")[index:]).startswith(starts)), None)
            if key is not None:
                raise WeightsError(f"{message} (found {key})")


def find_source(
    state: Mapping[str, Tensor], names: Mapping[str, frozenset[str]], ema: bool | None, network: str
) -> str:
    """The source whose `names` the keys are, but for what wrappers put before them.

    Raises WeightsError for other networks than this one. `ema` as in `find_entry`.
    """
    found = {source: align(state, names[source], ema).tensors for source in names}
    shared = {source: len(found[source].keys() & names[source]) for source in names}
    best = max(shared, key=lambda source: shared[source])
    if shared[best] * 4 < len(found[best]):  # a stray name in common proves nothing
        keys = ", ".join(list(state)[:3])
        raise WeightsError(f"its names ({keys}, ...) are not {network}'s; expected weights of {', '.join(names)}")
    return best


def classes_in(state: Mapping[str, Tensor], weight: str) -> int:
    """The number of classes, read from the classifier's `weight`. Raises WeightsError if there is none."""
    if weight not in state:
        raise WeightsError(
            f"{weight} is missing: a backbone without classifier, expected a classification checkpoint with one"
        )
    if state[weight].ndim != 2 or not len(state[weight]):
        raise WeightsError(f"{weight} has shape {tuple(state[weight].shape)}, expected (classes, channels)")
    return len(state[weight])


def closest(state: Mapping[str, Tensor], variants: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, bool]:
    """The variant that matches most shapes, and whether it matches all. `variants` are the tensors each expects."""
    wrong = {
        variant: sum(key in state and state[key].shape != want.shape for key, want in expected.items())
        for variant, expected in variants.items()
    }
    best = min(wrong, key=lambda variant: wrong[variant])
    return best, wrong[best] == 0


def hf_details(folder: Path, values: Json, details: Details) -> Details:
    """With the preprocessing and labels of transformers' files in `folder`; `values` are its config.json."""
    processor = read_json(folder / "preprocessor_config.json")
    return Details(
        details.config,
        details.variant,
        hf_preprocessing(processor) if processor else details.preprocessing,
        hf_labels(values, details.config.num_classes),
    )


def timm_details(values: Json, details: Details) -> Details:
    """With the preprocessing of timm's config.json, whose values these are."""
    return Details(details.config, details.variant, timm_preprocessing(values, details.preprocessing), details.labels)


def preprocessing_of(source: str, known: Mapping[str, Preprocessing]) -> Preprocessing:
    """What is `known` of a source's checkpoints; the default for our own without metadata."""
    return known.get(source) or Preprocessing(
        DEFAULT_PREPROCESSING.channel_order, source="default (the file carries none)"
    )
