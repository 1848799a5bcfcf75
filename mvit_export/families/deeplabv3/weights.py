"""Load a DeepLabV3's weights from ml-cvnets or Hugging Face, with what belongs to them.

Stride, rates and the way of upsampling leave no trace in the weights: they are those of the source. A file of
transformers has them in its config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mvit_export.data.preprocessing import Preprocessing
from mvit_export.errors import WeightsError
from mvit_export.families.base import Request
from mvit_export.families.deeplabv3.names import (
    Config,
    Origin,
    closest_backbone,
    map_state,
    recognise,
    sizes_in,
    without_auxiliary,
)
from mvit_export.families.deeplabv3.network import RATES, HeadConfig
from mvit_export.families.deeplabv3.variants import PREFIX, VOC
from mvit_export.families.mobilevit.configs import check_hf_config, hf_labels, hf_preprocessing, read_json
from mvit_export.families.mobilevit.network import VARIANTS
from mvit_export.models.checkpoints import blame, find_weights, read_checkpoint
from mvit_export.models.fit import check_classes
from mvit_export.models.hub import locate

WIDE = 512  # channels of the pyramid in ml-cvnets' recipe of output stride 8
SIDE = 512  # pixels of a picture's side in training and evaluation
# ml-cvnets resizes straight to the network's size. v0.1 reads with OpenCV, BGR; later versions with Pillow, RGB.
CVNETS = Preprocessing("BGR", (SIDE, SIDE), None, source="family ml-cvnets, segmentation")
PREPROCESSING = {
    ("ml-cvnets", False): CVNETS,
    ("ml-cvnets", True): replace(CVNETS, channel_order="RGB", source="family ml-cvnets from v0.2 on, segmentation"),
    ("hf", False): Preprocessing("BGR", (SIDE, SIDE), 544 / SIDE, source="family hf, segmentation"),
}
OFFICIAL = {
    f"{PREFIX}xxs": "hf:apple/deeplabv3-mobilevit-xx-small",
    f"{PREFIX}xs": "hf:apple/deeplabv3-mobilevit-x-small",
    f"{PREFIX}s": "hf:apple/deeplabv3-mobilevit-small",
}


@dataclass(frozen=True)
class LoadedWeights:
    """A checkpoint ready for the network that `build` makes of `config`."""

    state: Mapping[str, Tensor]  # our names, fp32, contiguous
    config: Config
    variant: str
    family: str
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    source: str  # as the user wrote it; a local path made absolute
    sha256: str
    revision: str | None
    ema: bool | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Details:
    """What shapes, names and the JSON files beside the weights say."""

    config: Config
    backbone: str
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    notes: tuple[str, ...] = ()


def load_weights(source: str, asked: Request) -> LoadedWeights:
    """Load `source`: a file, a folder of transformers, or `hf:ID[@REVISION]`, to fit what is `asked`.

    Raises WeightsError (unreadable or unfit), HubError (unavailable).
    """
    path, name, revision = asked.place or locate(source)
    folder = path if path.is_dir() else None
    with blame(name):
        file = find_weights(path) if folder else path
    checkpoint = read_checkpoint(file, ema=asked.ema)
    with blame(name):
        kept, dropped = without_auxiliary(checkpoint.tensors)
        origin, names = recognise(kept, asked.ema)
        checkpoint = replace(checkpoint, tensors=kept).aligned(names, asked.ema)
        found = describe(checkpoint.tensors, origin, folder, asked)
        variant = f"{PREFIX}{found.backbone}"
        if asked.variant not in (None, variant):
            raise WeightsError(f"this is {variant}, asked for {asked.variant}; leave --variant out")
        check_classes(found.config[1].num_classes, asked.num_classes)
        state = map_state(checkpoint.tensors, origin, found.config)
    auxiliary = [f"the auxiliary head ({dropped:,} weights), which training alone uses, was dropped"] if dropped else []
    return LoadedWeights(
        state, found.config, variant, origin.family, found.preprocessing, found.labels,
        name, checkpoint.sha256, revision, checkpoint.ema, (*checkpoint.notes, *auxiliary, *found.notes),
    )  # fmt: skip


def describe(state: Mapping[str, Tensor], origin: Origin, folder: Path | None, asked: Request) -> Details:
    """Everything but the tensors. Raises WeightsError if a file beside them says something that is not so."""
    head = sizes_in(state, origin)
    backbone = closest_backbone(state, origin, head)
    values = (read_json(folder / "config.json") if folder and origin.family == "hf" else None) or {}
    stride, rates, notes = choose_stride(head, origin, values, asked.options.get("output_stride"))
    head = replace(head, rates=rates)
    row = VARIANTS[backbone]
    config = replace(row, output_stride=stride, patch_config=asked.options.get("patch_config") or "A"), head
    preprocessing = PREPROCESSING[origin.family, origin.align_corners]
    if values:
        check_hf_config(values, row)
        processor = read_json(folder / "preprocessor_config.json") if folder else None
        preprocessing = hf_preprocessing(processor) if processor else preprocessing
    labels = hf_labels(values, head.num_classes)
    if labels is None and head.num_classes == len(VOC):
        labels = VOC
        notes = (*notes, f"{len(VOC)} classes without names: taken for PASCAL VOC's, background first; use --labels")
    return Details(config, backbone, preprocessing, labels, notes)


def choose_stride(
    head: HeadConfig, origin: Origin, values: Mapping[str, Any], asked: Any
) -> tuple[int, tuple[int, ...], tuple[str, ...]]:
    """Output stride, rates, and what was decided."""
    asked = None if asked is None else int(asked)
    if values:
        stride, rates = values.get("output_stride") or 32, values.get("atrous_rates") or [*RATES[16]]
        if stride not in RATES or asked not in (None, stride):
            expected = asked or " or ".join(map(str, sorted(RATES)))
            raise WeightsError(f"config.json says output_stride is {stride}, expected {expected}")
        if not isinstance(rates, list) or len(rates) != 3 or not all(type(r) is int and r > 0 for r in rates):
            raise WeightsError(f"config.json says atrous_rates is {rates}, expected three whole numbers from 1 on")
        return stride, tuple(rates), ()
    if asked is not None:
        return asked, RATES[asked], ()
    if origin.family == "ml-cvnets" and head.channels == WIDE:
        note = f"a pyramid of {WIDE} channels: taken for ml-cvnets' recipe of output stride 8; use --output-stride"
        return 8, RATES[8], (note,)
    return 16, RATES[16], ()
