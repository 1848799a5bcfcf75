"""Load weights from anywhere under our names, with what belongs to them: variant, classes, preprocessing, labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mvit_export.data.preprocessing import FAMILY_PREPROCESSING
from mvit_export.errors import UsageError, WeightsError
from mvit_export.families.mobilevit.configs import check_hf_config, check_timm_config
from mvit_export.families.mobilevit.names import classes_of, closest_variant, map_state, recognise
from mvit_export.families.mobilevit.network import PATCH_CONFIGS, VARIANTS, MobileViTConfig
from mvit_export.models.checkpoints import blame
from mvit_export.models.fit import check_classes
from mvit_export.models.own_files import OURS, read_own
from mvit_export.models.settings import read_json
from mvit_export.models.sources import Details, LoadedWeights, hf_details, preprocessing_of, timm_details
from mvit_export.models.stored import StoredWeights, read_stored

OFFICIAL = {
    "xxs": "hf:apple/mobilevit-xx-small",
    "xs": "hf:apple/mobilevit-x-small",
    "s": "hf:apple/mobilevit-small",
}


def load_weights(
    source: str | StoredWeights,
    *,
    variant: str | None = None,
    num_classes: int | None = None,
    patch_config: str | None = None,
    ema: bool | None = True,
) -> LoadedWeights:
    """Load `source`: a file, a folder from transformers or timm, `hf:ID[@REVISION]`, `timm:ID[@REVISION]`, or as read.

    `variant` and `num_classes` come from the checkpoint; if given, they must match it. `patch_config` leaves no trace
    in the weights of other families and defaults to "A". `ema` as in `find_entry`.
    Raises WeightsError (unreadable or unfit), HubError (unavailable), UsageError (no such variant or patches).
    """
    if variant is not None and variant not in VARIANTS:
        raise UsageError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    if patch_config not in (None, *PATCH_CONFIGS):
        raise UsageError(f"patch configuration is {patch_config!r}, expected one of {', '.join(PATCH_CONFIGS)}")
    stored = source if isinstance(source, StoredWeights) else read_stored(source, ema=ema)
    with blame(stored.name):
        family, names = recognise(stored.checkpoint.tensors, ema)
        checkpoint = stored.checkpoint.aligned(names, ema)
        details = describe(replace(stored, checkpoint=checkpoint), family, variant, patch_config)
        check_classes(details.config.num_classes, num_classes)
        state = map_state(checkpoint.tensors, family, details.config)
    return LoadedWeights(
        state, details.config, details.variant, family, details.preprocessing, details.labels,
        stored.name, checkpoint.sha256, stored.revision, checkpoint.ema, checkpoint.notes,
    )  # fmt: skip


def describe(stored: StoredWeights, family: str, variant: str | None, patch_config: str | None) -> Details:
    """Everything but the tensors: from our metadata, or from the shapes and the JSON files beside them."""
    checkpoint, folder = stored.checkpoint, stored.folder
    classes = classes_of(checkpoint.tensors, family)
    if family == OURS and OURS in checkpoint.metadata:
        return our_details(checkpoint.metadata[OURS], variant, patch_config)
    chosen = variant or closest_variant(checkpoint.tensors, family)[0]
    config = replace(VARIANTS[chosen], num_classes=classes, patch_config=patch_config or "A")
    values = (read_json(folder / "config.json") if folder else None) or {}
    details = Details(config, chosen, preprocessing_of(family, FAMILY_PREPROCESSING))
    if folder and family == "hf":
        return hf_details(folder, values, replace(details, config=hf_config(values, config, checkpoint.tensors)))
    if folder and family == "timm":
        check_timm_config(values, config, chosen)
        return timm_details(values, details)
    return details


def hf_config(values: dict[str, Any], config: MobileViTConfig, state: Mapping[str, Tensor]) -> MobileViTConfig:
    map_state(state, "hf", config)  # a wrong variant is identified by its weights, not by its config.json
    check_hf_config(values, config)
    return replace(config, output_stride=values.get("output_stride") or 32)


def our_details(text: str, variant: str | None, patch_config: str | None) -> Details:
    """Read back what `save_weights` wrote."""
    config, preprocessing, labels = read_own(text, MobileViTConfig)
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
    return Details(config, config.variant, preprocessing, labels)
