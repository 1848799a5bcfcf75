"""What ml-cvnets and Hugging Face call the weights of DeepLabV3 on MobileViT, and the strict mapping to our names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from mvit_export.errors import WeightsError
from mvit_export.families.deeplabv3.network import HeadConfig, Segmenter
from mvit_export.families.deeplabv3.variants import claims
from mvit_export.families.mobilevit.names import FAMILIES, Names, backbone_names, join_parts, pair_keys
from mvit_export.families.mobilevit.network import VARIANTS, Backbone, MobileViTConfig
from mvit_export.models.fit import fit
from mvit_export.models.prefixes import align

BACKBONE = "backbone."  # before the backbone's own names in ours
AUXILIARY = "seg_head.aux_head."  # a second head on an earlier map, which training alone uses


@dataclass(frozen=True)
class Origin:
    """A way of naming the weights, and what it tells about the network they were trained in.

    ml-cvnets renamed its classifier in the version that began to upsample with aligned corners and to read RGB, so the
    one tells the others.
    """

    family: str  # of the backbone's names
    prefix: str  # before them
    classifier: str
    align_corners: bool = False


ORIGINS = (
    Origin("ml-cvnets", "encoder.", "seg_head.classifier.classifier.block.conv"),  # v0.1
    Origin("ml-cvnets", "encoder.", "seg_head.classifier.block.conv", align_corners=True),  # v0.2 and later
    Origin("hf", "", "segmentation_head.classifier.convolution"),
)
Config = tuple[MobileViTConfig, HeadConfig]


def head_names(origin: Origin) -> Iterator[tuple[str, str]]:
    """(our module, theirs) of everything after the backbone, whichever that is."""
    if origin.family == "hf":
        pyramid, conv, norm, pool = "segmentation_head.aspp", "convolution", "normalization", "convs.4.conv_1x1"
    else:
        pyramid, conv, norm = "seg_head.aspp.aspp_layer", "block.conv", "block.norm"
        pool = "convs.4.aspp_pool.conv_1x1"
    parts = {f"branches.{index}": f"convs.{index}" for index in range(4)} | {"pool": pool, "project": "project"}
    for ours, theirs in parts.items():
        yield f"head.pyramid.{ours}.conv", f"{pyramid}.{theirs}.{conv}"
        yield f"head.pyramid.{ours}.norm", f"{pyramid}.{theirs}.{norm}"
    yield "head.classifier", origin.classifier


def build(config: Config, *, output: str) -> Segmenter:
    """The network without weights of its own yet."""
    backbone, head = config
    return Segmenter(Backbone(backbone), backbone.stages[-1], head, output=output)


@lru_cache
def skeleton(config: Config) -> dict[str, Tensor]:
    """Our state dict without data: names, shapes and dtypes."""
    with torch.random.fork_rng(devices=[]):
        state = build(config, output="scores").state_dict()
    return {key: torch.empty_like(tensor, device="meta") for key, tensor in state.items()}


def key_table(origin: Origin, config: Config) -> dict[str, dict[str, Tensor]]:
    """Our key -> the keys of `origin` that hold it, each with the tensor expected there, without data."""

    def theirs(names: Names) -> str:
        return origin.prefix + FAMILIES[origin.family](names)

    backbone = {BACKBONE + names.ours: theirs(names) for names in backbone_names(config[0])}
    return pair_keys(skeleton(config), backbone | dict(head_names(origin)))


def expected_tensors(origin: Origin, config: Config) -> dict[str, Tensor]:
    """The state dict that a checkpoint of `origin` must match, in its own names."""
    return {name: tensor for parts in key_table(origin, config).values() for name, tensor in parts.items()}


def map_state(state: Mapping[str, Tensor], origin: Origin, config: Config) -> dict[str, Tensor]:
    """Rename `state` to our names, fp32 and contiguous; it must fit `config` key by key, else WeightsError."""
    return join_parts(fit(state, expected_tensors(origin, config)), key_table(origin, config))


def without_auxiliary(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The state without the auxiliary head, and how many numbers that has."""
    kept = {key: tensor for key, tensor in state.items() if AUXILIARY not in f"{key}."}
    return kept, sum(tensor.numel() for key, tensor in state.items() if key not in kept)


def recognise(state: Mapping[str, Tensor], ema: bool | None = True) -> tuple[Origin, frozenset[str]]:
    """The origin whose names the keys are, but for what wrappers put before them, and all its names.

    Raises WeightsError for other networks. `ema` as in `find_entry`.
    """
    if not claims(state):
        keys = ", ".join(list(state)[:3])
        raise WeightsError(
            f"its names ({keys}, …) are not those of a DeepLabV3, expected a segmentation checkpoint of ml-cvnets or "
            "Hugging Face; leave --variant out if it is a classifier's"
        )
    names = {origin: frozenset(expected_tensors(origin, (VARIANTS["xxs"], HeadConfig()))) for origin in ORIGINS}
    found = {origin: align(state, names[origin], ema).tensors for origin in ORIGINS}
    best = max(ORIGINS, key=lambda origin: len(found[origin].keys() & names[origin]))
    check_head(found[best], best)
    return best, names[best]


def check_head(state: Mapping[str, Tensor], origin: Origin) -> None:
    """Raises WeightsError for another head than DeepLabV3's, such as PSPNet's, or another backbone."""
    other = next((key for key in state if "psp_layer" in key), None)
    if other is not None:
        raise WeightsError(f"a segmentation checkpoint of PSPNet, expected DeepLabV3's (found {other})")
    second = next((key for key in state if "local_rep.0." in key or "mobilevitv2." in key), None)
    if second is not None:
        raise WeightsError(f"a segmentation checkpoint on MobileViTv2, expected MobileViT (found {second})")
    if f"{origin.classifier}.weight" not in state:
        raise WeightsError(f"{origin.classifier}.weight is missing, expected a segmentation checkpoint with its head")


def sizes_in(state: Mapping[str, Tensor], origin: Origin) -> HeadConfig:
    """Channels and classes, read from the head's shapes; rates leave no trace there."""
    branch = next(theirs for ours, theirs in head_names(origin) if ours == "head.pyramid.branches.0.conv")
    shapes = {}
    for name in (branch, origin.classifier):
        tensor = state.get(f"{name}.weight")
        if tensor is None or tensor.ndim != 4 or not len(tensor):
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise WeightsError(f"{name}.weight is {found}, expected four dimensions: the head of a DeepLabV3")
        shapes[name] = len(tensor)
    return HeadConfig(shapes[branch], num_classes=shapes[origin.classifier], align_corners=origin.align_corners)


def closest_backbone(state: Mapping[str, Tensor], origin: Origin, head: HeadConfig) -> str:
    """The variant of MobileViT that matches most shapes."""

    def wrong(backbone: str) -> int:
        expected = expected_tensors(origin, (replace(VARIANTS[backbone], output_stride=16), head))
        return sum(key in state and state[key].shape != want.shape for key, want in expected.items())

    return min(VARIANTS, key=wrong)
