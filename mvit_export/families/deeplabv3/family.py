"""The row of DeepLabV3 on MobileViT: its variants, and how one is built from a seed or from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mvit_export.artifact import ModelInfo, WeightsInfo
from mvit_export.data.preprocessing import Preprocessing
from mvit_export.families.base import Family, FamilyOption, Request
from mvit_export.families.deeplabv3.variants import OUTPUTS, PREFIX, SCORES, VARIANT_NAMES, VOC, claims
from mvit_export.models.loaded import LoadedModel, call_guarded, count_parameters, seeded, state_digest
from mvit_export.tasks.segmentation import SEGMENTATION

if TYPE_CHECKING:
    from mvit_export.families.deeplabv3.network import Segmenter
    from mvit_export.families.mobilevit.network import MobileViTConfig

UNTRAINED = Preprocessing("RGB", (512, 512), None)


def load(asked: Request) -> LoadedModel:
    """A variant, untrained or with the requested weights; without a name, the checkpoint's own."""
    output = asked.options.get("output") or SCORES
    if asked.weights is None and not asked.pretrained:
        return untrained(asked, output)
    from mvit_export.families.deeplabv3.names import build
    from mvit_export.families.deeplabv3.weights import OFFICIAL, load_weights

    found = load_weights(OFFICIAL[asked.variant] if asked.pretrained and asked.variant else str(asked.weights), asked)
    module = build(found.config, output=output)
    module.load_state_dict(dict(found.state))
    origin = WeightsInfo(
        found.source, found.family, found.sha256, state_digest(module), True, None, found.revision, found.ema
    )
    info = replace(describe(module, found.variant), labels=found.labels)
    return LoadedModel(module.eval(), info, origin, found.preprocessing, (), (), found.notes)


def untrained(asked: Request, output: str) -> LoadedModel:
    from mvit_export.families.deeplabv3.names import build
    from mvit_export.families.deeplabv3.network import RATES, HeadConfig
    from mvit_export.families.mobilevit.network import VARIANTS

    variant, classes = asked.variant, asked.num_classes or len(VOC)
    assert variant is not None
    stride, patches = int(asked.options.get("output_stride") or 16), asked.options.get("patch_config") or "A"
    backbone = replace(VARIANTS[variant.removeprefix(PREFIX)], output_stride=stride, patch_config=patches)
    head = HeadConfig(rates=RATES[stride], num_classes=classes)
    with seeded(asked.seed):
        module = call_guarded(lambda: build((backbone, head), output=output), f"variant {variant}")
        module.init_weights()
    origin = WeightsInfo(None, None, None, state_digest(module), trained=False, seed=asked.seed)
    info = replace(describe(module, variant), labels=VOC if classes == len(VOC) else None)
    return LoadedModel(module.eval(), info, origin, UNTRAINED, (), ())


def describe(module: Segmenter, variant: str) -> ModelInfo:
    config = module.config
    backbone: MobileViTConfig = module.backbone.config  # type: ignore[assignment]  # a module's attribute
    return ModelInfo(
        name=f"deeplabv3_mobilevit_{variant.removeprefix(PREFIX)}",
        source=variant,
        task=SEGMENTATION.name,
        params=count_parameters(module),
        macs=0,  # counted once the input's shape is known
        variant=variant,
        num_classes=config.num_classes,
        settings={
            "patch_config": backbone.patch_config,
            "output_stride": backbone.output_stride,
            "output": module.output,
            "align_corners": config.align_corners,
        },
    )


DEEPLABV3 = Family(
    title="DeepLabV3",
    owns=VARIANT_NAMES.__contains__,
    load=load,
    claims=claims,
    variants=VARIANT_NAMES,
    counts_classes=True,
    options={
        "patch_config": FamilyOption("patch configuration", ("A", "B")),
        "output": FamilyOption("output", OUTPUTS),
        "output_stride": FamilyOption("output stride", ("16", "8")),
    },
    smallest_image=32,
)
