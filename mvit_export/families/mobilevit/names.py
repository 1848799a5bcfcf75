"""What the four families of checkpoints call every weight, and the strict mapping from their names to ours.

All variants have the same modules, so a name reveals the family and a shape the variant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from mvit_export.families.mobilevit.network import DEPTHS, VARIANTS, MobileViT, MobileViTConfig
from mvit_export.models.fit import fit
from mvit_export.models.sources import NO_CLASSIFIERS, Refused, classes_in, closest, find_source, refuse_others


@dataclass(frozen=True)
class Names:
    """One module that owns weights. A `*` stands for the three parts, in order, that make up our fused qkv."""

    ours: str
    cvnets: str
    hf: str
    timm: str


# The field of `Names` for each family.
FAMILIES: dict[str, Callable[[Names], str]] = {
    "mvit-export": lambda names: names.ours,
    "ml-cvnets": lambda names: names.cvnets,
    "hf": lambda names: names.hf,
    "timm": lambda names: names.timm,
}
QKV_PARTS = ("query", "key", "value")


def name_table(config: MobileViTConfig) -> list[Names]:
    """Every module with weights, in the order in which the network runs them."""
    table = [*conv_norm("stem", "conv_1", "mobilevit.conv_stem", "stem")]
    for index in range(len(config.stages)):
        table += conv_stage_names(index) if index < 2 else transformer_stage_names(index, DEPTHS[index - 2])
    table += conv_norm("head", "conv_1x1_exp", "mobilevit.conv_1x1_exp", "final_conv")
    table += [Names("classifier", "classifier.fc", "classifier", "head.fc")]
    return table


def conv_norm(ours: str, cvnets: str, hf: str, timm: str) -> Iterator[Names]:
    """A convolution and its BatchNorm."""
    yield Names(f"{ours}.conv", f"{cvnets}.block.conv", f"{hf}.convolution", f"{timm}.conv")
    yield Names(f"{ours}.norm", f"{cvnets}.block.norm", f"{hf}.normalization", f"{timm}.bn")


def inverted_residual_names(ours: str, cvnets: str, hf: str, timm: str) -> Iterator[Names]:
    yield from conv_norm(f"{ours}.expand", f"{cvnets}.block.exp_1x1", f"{hf}.expand_1x1", f"{timm}.conv1_1x1")
    yield from conv_norm(f"{ours}.depthwise", f"{cvnets}.block.conv_3x3", f"{hf}.conv_3x3", f"{timm}.conv2_kxk")
    yield from conv_norm(f"{ours}.reduce", f"{cvnets}.block.red_1x1", f"{hf}.reduce_1x1", f"{timm}.conv3_1x1")


def conv_stage_names(index: int) -> Iterator[Names]:
    """Stages 1 and 2: one and three inverted residuals."""
    for j in range((1, 3)[index]):
        here = f"stages.{index}.{j}"
        yield from inverted_residual_names(
            here, f"layer_{index + 1}.{j}", f"mobilevit.encoder.layer.{index}.layer.{j}", here
        )


def transformer_stage_names(index: int, depth: int) -> Iterator[Names]:
    """Stages 3 to 5: an inverted residual, then a MobileViT block with `depth` encoders."""
    stage, cvnets, hf = f"stages.{index}", f"layer_{index + 1}", f"mobilevit.encoder.layer.{index}"
    yield from inverted_residual_names(f"{stage}.0", f"{cvnets}.0", f"{hf}.downsampling_layer", f"{stage}.0")
    block, local, deep = f"{stage}.1", f"{cvnets}.1.local_rep", f"{cvnets}.1.global_rep"
    yield from conv_norm(f"{block}.local", f"{local}.conv_3x3", f"{hf}.conv_kxk", f"{block}.conv_kxk")
    yield Names(f"{block}.to_tokens", f"{local}.conv_1x1.block.conv", f"{hf}.conv_1x1.convolution", f"{block}.conv_1x1")
    for k in range(depth):
        yield from encoder_names(
            f"{block}.encoders.{k}", f"{deep}.{k}", f"{hf}.transformer.layer.{k}", f"{block}.transformer.{k}"
        )
    yield Names(f"{block}.norm", f"{deep}.{depth}", f"{hf}.layernorm", f"{block}.norm")
    yield from conv_norm(f"{block}.from_tokens", f"{cvnets}.1.conv_proj", f"{hf}.conv_projection", f"{block}.conv_proj")
    yield from conv_norm(f"{block}.fuse", f"{cvnets}.1.fusion", f"{hf}.fusion", f"{block}.conv_fusion")


def encoder_names(ours: str, cvnets: str, hf: str, timm: str) -> list[Names]:
    rows = (
        # ours             ml-cvnets                  HF                            timm
        ("norm1", "pre_norm_mha.0", "layernorm_before", "norm1"),
        ("attention.qkv", "pre_norm_mha.1.qkv_proj", "attention.attention.*", "attn.qkv"),
        ("attention.proj", "pre_norm_mha.1.out_proj", "attention.output.dense", "attn.proj"),
        ("norm2", "pre_norm_ffn.0", "layernorm_after", "norm2"),
        ("mlp.expand", "pre_norm_ffn.1", "intermediate.dense", "mlp.fc1"),
        ("mlp.reduce", "pre_norm_ffn.4", "output.dense", "mlp.fc2"),
    )
    return [Names(f"{ours}.{a}", f"{cvnets}.{b}", f"{hf}.{c}", f"{timm}.{d}") for a, b, c, d in rows]


@lru_cache
def skeleton(config: MobileViTConfig) -> dict[str, Tensor]:
    """Our state dict without data: names, shapes and dtypes. torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):  # the meta device would be slower: 1.2 s the first time
        state = MobileViT(config).state_dict()
    return {key: torch.empty_like(tensor, device="meta") for key, tensor in state.items()}


def key_table(family: str, config: MobileViTConfig) -> dict[str, dict[str, Tensor]]:
    """Our key -> the keys of `family` that hold it, each with the (data-less) tensor expected there."""
    name_of = {names.ours: FAMILIES[family](names) for names in name_table(config)}
    table = {}
    for key, tensor in skeleton(config).items():
        module, _, parameter = key.rpartition(".")
        name = f"{name_of[module]}.{parameter}"
        if "*" in name:
            table[key] = {name.replace("*", part): t for part, t in zip(QKV_PARTS, tensor.chunk(3), strict=True)}
        else:
            table[key] = {name: tensor}
    return table


def expected_tensors(family: str, config: MobileViTConfig) -> dict[str, Tensor]:
    """The state dict that a checkpoint of `family` must match, in its own names."""
    return {name: tensor for parts in key_table(family, config).values() for name, tensor in parts.items()}


def map_state(state: Mapping[str, Tensor], family: str, config: MobileViTConfig) -> dict[str, Tensor]:
    """Rename `state` from the names of `family` to ours, fp32 and contiguous; it must fit `config` key by key.

    Raises WeightsError with the first key (as the checkpoint calls it) that is missing, superfluous, of another shape
    or dtype, or not finite.
    """
    fitted = fit(state, expected_tensors(family, config), hint=lambda key: other_variant(state, family, config, key))
    table = key_table(family, config)
    return {
        key: fitted[next(iter(parts))] if len(parts) == 1 else torch.cat([fitted[name] for name in parts])
        for key, parts in table.items()
    }


def classes_of(state: Mapping[str, Tensor], family: str) -> int:
    """The number of classes, read from the classifier. Raises WeightsError if there is none."""
    bias = list(expected_tensors(family, VARIANTS["xxs"]))[-1]
    return classes_in(state, bias.replace("bias", "weight"))


def closest_variant(state: Mapping[str, Tensor], family: str) -> tuple[str, bool]:
    """The variant that matches most shapes, and whether it matches all."""
    classes = classes_of(state, family)
    return closest(
        state,
        {name: expected_tensors(family, replace(config, num_classes=classes)) for name, config in VARIANTS.items()},
    )


def other_variant(state: Mapping[str, Tensor], family: str, config: MobileViTConfig, key: str) -> str | None:
    """The message that says so if the checkpoint is another variant throughout."""
    wanted = next((name for name, row in VARIANTS.items() if row.stages == config.stages), "this configuration")
    found, sure = closest_variant(state, family)
    if not sure or found == wanted:
        return None
    want = tuple(expected_tensors(family, config)[key].shape)
    shape = tuple(state[key].shape)
    return f"this is variant {found}: its {key} has shape {shape}, {wanted} needs {want}; use --variant {found}"


REFUSED: tuple[Refused, ...] = (
    (
        ("mvit.0.", "mv2.0."),
        "a checkpoint of the re-implementation chinhsuanwu/mobilevit-pytorch, which is another network than the paper's"
        " (fixed head size, no qkv bias, no final LayerNorm, other FFN widths) and cannot be loaded here;"
        " expected ml-cvnets, Hugging Face or timm weights",
    ),
    (
        ("conv_stem.",),
        "a Hugging Face MobileViTModel: classifier.weight is missing, expected a MobileViTForImageClassification",
    ),
    *NO_CLASSIFIERS,
)


def recognise(state: Mapping[str, Tensor], ema: bool | None = True) -> tuple[str, frozenset[str]]:
    """The family whose names the keys are, but for what wrappers put before them, and all its names.

    Raises WeightsError for other networks, naming those that are known. `ema` as in `find_entry`.
    """
    refuse_others(state, REFUSED)
    names = {family: frozenset(expected_tensors(family, VARIANTS["xxs"])) for family in FAMILIES}
    best = find_source(state, names, ema, "MobileViT")
    return best, names[best]
