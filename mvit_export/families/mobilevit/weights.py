"""Load weights from anywhere under our names, with what belongs to them: variant, classes, preprocessing, labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mvit_export.data.preprocessing import DEFAULT_PREPROCESSING, FAMILY_PREPROCESSING, Preprocessing
from mvit_export.errors import UsageError, WeightsError
from mvit_export.families.mobilevit.configs import (
    check_hf_config,
    check_timm_config,
    hf_labels,
    hf_preprocessing,
    read_json,
    timm_preprocessing,
)
from mvit_export.families.mobilevit.names import classes_in, closest_variant, map_state, recognise
from mvit_export.families.mobilevit.network import PATCH_CONFIGS, VARIANTS, MobileViT, MobileViTConfig
from mvit_export.families.mobilevit.variants import CUSTOM
from mvit_export.models.checkpoints import Checkpoint, blame, find_weights, read_checkpoint
from mvit_export.models.fit import check_classes
from mvit_export.models.hub import Place, locate
from mvit_export.system.files import write_whole

OFFICIAL = {
    "xxs": "hf:apple/mobilevit-xx-small",
    "xs": "hf:apple/mobilevit-x-small",
    "s": "hf:apple/mobilevit-small",
}
OURS = "mvit-export"  # our family, and the key of our JSON in a safetensors file's metadata


@dataclass(frozen=True)
class LoadedWeights:
    """A checkpoint ready for `MobileViT(config).load_state_dict(state)`."""

    state: Mapping[str, Tensor]  # our names, fp32, contiguous
    config: MobileViTConfig
    variant: str  # "xxs", "xs", "s", or "custom" for one of our own files with other sizes
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

    config: MobileViTConfig
    variant: str
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None = None


def load_weights(
    source: str,
    *,
    variant: str | None = None,
    num_classes: int | None = None,
    patch_config: str | None = None,
    ema: bool | None = True,
    place: Place | None = None,
) -> LoadedWeights:
    """Load `source`: a file, a folder from transformers or timm, `hf:ID[@REVISION]` or `timm:ID[@REVISION]`.

    `variant` and `num_classes` come from the checkpoint; if given, they must match it. `patch_config` leaves no trace
    in the weights of other families and defaults to "A". `ema` as in `find_entry`; `place` is where `source` was found.
    Raises WeightsError (unreadable or unfit), HubError (unavailable), UsageError (no such variant or patches).
    """
    if variant is not None and variant not in VARIANTS:
        raise UsageError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    if patch_config not in (None, *PATCH_CONFIGS):
        raise UsageError(f"patch configuration is {patch_config!r}, expected one of {', '.join(PATCH_CONFIGS)}")
    path, name, revision = place or locate(source)
    folder = path if path.is_dir() else None
    with blame(name):
        weights_file = find_weights(path) if folder else path
    checkpoint = read_checkpoint(weights_file, ema=ema)
    with blame(name):
        family, names = recognise(checkpoint.tensors, ema)
        checkpoint = checkpoint.aligned(names, ema)
        details = describe(checkpoint, family, folder, variant, patch_config)
        check_classes(details.config.num_classes, num_classes)
        state = map_state(checkpoint.tensors, family, details.config)
    return LoadedWeights(
        state, details.config, details.variant, family, details.preprocessing, details.labels,
        name, checkpoint.sha256, revision, checkpoint.ema, checkpoint.notes,
    )  # fmt: skip


def describe(
    checkpoint: Checkpoint, family: str, folder: Path | None, variant: str | None, patch_config: str | None
) -> Details:
    """Everything but the tensors: from our metadata, or from the shapes and the JSON files of `folder`."""
    classes = classes_in(checkpoint.tensors, family)
    if family == OURS and OURS in checkpoint.metadata:
        return our_details(checkpoint.metadata[OURS], variant, patch_config)
    chosen = variant or closest_variant(checkpoint.tensors, family)[0]
    config = replace(VARIANTS[chosen], num_classes=classes, patch_config=patch_config or "A")
    values = (read_json(folder / "config.json") if folder else None) or {}
    details = Details(config, chosen, family_preprocessing(family))
    if folder and family == "hf":
        return hf_details(values, read_json(folder / "preprocessor_config.json"), details, checkpoint.tensors)
    if folder and family == "timm":
        check_timm_config(values, config, chosen)
        return replace(details, preprocessing=timm_preprocessing(values))
    return details


def hf_details(values: dict[str, Any], processor: dict[str, Any] | None, details: Details, state: Mapping) -> Details:
    map_state(state, "hf", details.config)  # a wrong variant is identified by its weights, not by its config.json
    check_hf_config(values, details.config)
    return replace(
        details,
        config=replace(details.config, output_stride=values.get("output_stride") or 32),
        preprocessing=hf_preprocessing(processor) if processor else details.preprocessing,
        labels=hf_labels(values, details.config.num_classes),
    )


def family_preprocessing(family: str) -> Preprocessing:
    return FAMILY_PREPROCESSING.get(family) or replace(DEFAULT_PREPROCESSING, source="default (the file carries none)")


def our_details(text: str, variant: str | None, patch_config: str | None) -> Details:
    """Read back what `save_weights` wrote."""
    try:
        data = json.loads(text)
        values = {f.name: data["config"][f.name] for f in fields(MobileViTConfig)}
        sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        config = MobileViTConfig(**sizes)
        preprocessing = Preprocessing.from_json(data["preprocessing"])
        labels = None if data.get("labels") is None else tuple(map(str, data["labels"]))
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise WeightsError(f"its {OURS} metadata is damaged ({error}), expected what save_weights writes") from error
    if variant is not None:
        config = replace(
            VARIANTS[variant],
            num_classes=config.num_classes,
            patch_config=config.patch_config,
            output_stride=config.output_stride,
        )
    if patch_config not in (None, config.patch_config):
        message = f"saved with patch configuration {config.patch_config}, asked for {patch_config}"
        raise WeightsError(f"{message}: leave --patch-config out or use --patch-config {config.patch_config}")
    return Details(config, variant_of(config), preprocessing, labels)


def variant_of(config: MobileViTConfig) -> str:
    """The variant whose sizes `config` has, "custom" if none."""
    for name, row in VARIANTS.items():
        same = (row.stem, row.stages, row.widths, row.head, row.expansion)
        if same == (config.stem, config.stages, config.widths, config.head, config.expansion):
            return name
    return CUSTOM


def save_weights(
    model: MobileViT,
    path: str | Path,
    *,
    preprocessing: Preprocessing,
    variant: str | None = None,
    labels: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write our own safetensors file, whole or not at all, with everything that `load_weights` needs in its metadata.

    `variant`, if given, must be what the model is. `dtype` is that of the stored floats. Raises WeightsError.
    """
    path, actual = Path(path), variant_of(model.config)
    if variant not in (None, actual):
        raise WeightsError(f"{path}: the model is variant {actual}, asked to be saved as {variant}")
    if labels is not None and len(labels) != model.config.num_classes:
        raise WeightsError(f"{path}: {len(labels)} labels, expected {model.config.num_classes}, one for each class")
    state = {k: v.detach().cpu().to(dtype if v.is_floating_point() else v.dtype) for k, v in model.state_dict().items()}
    bad = next((key for key, tensor in state.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise WeightsError(f"{path}: {bad} has NaN or Inf as {dtype}, expected finite weights; nothing was written")
    data = {
        "format": 1,
        "config": asdict(model.config),
        "preprocessing": preprocessing.to_json(),
        "labels": None if labels is None else list(labels),
    }
    metadata = {OURS: json.dumps(data), "format": "pt"}
    try:
        content = safetensors.torch.save({k: v.contiguous() for k, v in state.items()}, metadata)
        write_whole(path, with_sorted_header(content))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written ({error.strerror or error}): check the folder") from error


def with_sorted_header(content: bytes) -> bytes:
    """The same safetensors file with its metadata in order: the library's own order changes from call to call."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + content[8 + size :]
