"""The row of MobileViT: its variants, and how one is built from a seed or from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mvit_export.artifact import ModelInfo, WeightsInfo
from mvit_export.data.preprocessing import DEFAULT_PREPROCESSING
from mvit_export.families.base import Family, FamilyOption, Request
from mvit_export.families.mobilevit.variants import CUSTOM, VARIANT_NAMES
from mvit_export.models.loaded import LoadedModel, call_guarded, count_parameters, seeded, state_digest
from mvit_export.models.outputs import distinguish

if TYPE_CHECKING:
    from mvit_export.families.mobilevit.network import MobileViT

SMALLEST_IMAGE = 32  # below this the last stages have no pixels left


def load(asked: Request) -> LoadedModel:
    """A variant, untrained or with the requested weights; without a name, the checkpoint's own."""
    if asked.weights is None and not asked.pretrained:
        return untrained(asked)
    from mvit_export.families.mobilevit.network import MobileViT
    from mvit_export.families.mobilevit.weights import OFFICIAL, load_weights

    source = OFFICIAL[asked.variant] if asked.pretrained and asked.variant else asked.stored or str(asked.weights)
    found = load_weights(source, variant=asked.variant, num_classes=asked.num_classes, ema=asked.ema, **asked.options)
    module = MobileViT(found.config)
    module.load_state_dict(dict(found.state))
    origin = WeightsInfo(
        found.source, found.family, found.sha256, state_digest(module), True, None, found.revision, found.ema
    )
    info = replace(describe(module, found.variant), labels=distinguish(found.labels))
    return LoadedModel(module.eval(), info, origin, found.preprocessing, (), (), found.notes)


def untrained(asked: Request) -> LoadedModel:
    from mvit_export.families.mobilevit.network import create_mobilevit

    variant = asked.variant
    assert variant is not None
    patches = asked.options.get("patch_config", "A")
    with seeded(asked.seed):
        module = call_guarded(
            lambda: create_mobilevit(variant, num_classes=asked.num_classes or 1000, patch_config=patches),
            f"variant {variant}",
        )
    origin = WeightsInfo(None, None, None, state_digest(module), trained=False, seed=asked.seed)
    return LoadedModel(module.eval(), describe(module, variant), origin, DEFAULT_PREPROCESSING, (), ())


def describe(module: MobileViT, variant: str) -> ModelInfo:
    config = module.config
    return ModelInfo(
        name=f"mobilevit_{variant}",
        source=variant,
        task="image-classification",
        params=count_parameters(module),
        macs=0,  # counted once the input's shape is known
        variant=variant,
        num_classes=config.num_classes,
        settings={"patch_config": config.patch_config, "output_stride": config.output_stride},
    )


MOBILEVIT = Family(
    title="MobileViT",
    owns=(*VARIANT_NAMES, CUSTOM).__contains__,
    load=load,
    variants=VARIANT_NAMES,
    counts_classes=True,
    options={"patch_config": FamilyOption("patch configuration", ("A", "B"))},
    smallest_image=SMALLEST_IMAGE,
    forms="mvit_export.families.mobilevit.forms",
)
