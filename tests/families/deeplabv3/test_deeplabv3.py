"""DeepLabV3 on MobileViT: its size, and the scores of the implementations that its checkpoints come from.

transformers with random weights is an independent oracle; ml-cvnets has no package here, so its names are derived from
those of transformers by rules that are written out here a second time.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize
from safetensors.torch import save_file

from mvit_export import load_model
from mvit_export.errors import UsageError, WeightsError
from mvit_export.families.deeplabv3.names import build
from mvit_export.families.deeplabv3.network import RATES, HeadConfig
from mvit_export.families.deeplabv3.variants import VOC
from mvit_export.families.mobilevit.network import VARIANTS
from mvit_export.families.timm import import_timm
from mvit_export.models.loaded import count_parameters

import_timm()  # first: it makes torchvision importable
transformers = importlib.import_module("transformers")

TOLERANCE = 1e-5  # of the largest score: fp32 rounding of another order of operations
PARAMETERS = {"xxs": 1_854_853, "xs": 2_944_069, "s": 6_357_941}  # ml-cvnets', without the auxiliary head
HF_SIZES = {
    "xxs": {"hidden_sizes": [64, 80, 96], "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320], "expand_ratio": 2.0},
    "xs": {"hidden_sizes": [96, 120, 144], "neck_hidden_sizes": [16, 32, 48, 64, 80, 96, 384], "expand_ratio": 4.0},
    "s": {"hidden_sizes": [144, 192, 240], "neck_hidden_sizes": [16, 32, 64, 96, 128, 160, 640], "expand_ratio": 4.0},
}
Oracle = torch.nn.Module


def hf_model(variant: str, **options) -> Oracle:
    values = {"num_labels": 21, "output_stride": 16, **HF_SIZES[variant], **options}
    return randomize(transformers.MobileViTForSemanticSegmentation(transformers.MobileViTConfig(**values)))


@pytest.fixture(scope="module")
def hf_xxs() -> Oracle:
    return hf_model("xxs")


def cvnets_names(state: dict[str, torch.Tensor], *, classifier: str) -> dict[str, torch.Tensor]:
    """A state dict of transformers in ml-cvnets' names, with an auxiliary head as its files have one."""
    rules = [
        (r"^mobilevit\.conv_stem\.", "encoder.conv_1.block."),
        (r"^mobilevit\.encoder\.layer\.([01])\.layer\.(\d)\.", r"encoder.layer_@\1.\2.block."),
        (r"^mobilevit\.encoder\.layer\.(\d)\.downsampling_layer\.", r"encoder.layer_@\1.0.block."),
        (r"^mobilevit\.encoder\.layer\.(\d)\.transformer\.layer\.(\d)\.", r"encoder.layer_@\1.1.global_rep.\2."),
        (r"^mobilevit\.encoder\.layer\.(\d)\.layernorm\.", r"encoder.layer_@\1.1.global_rep.LAST\1."),
        (r"^mobilevit\.encoder\.layer\.(\d)\.conv_kxk\.", r"encoder.layer_@\1.1.local_rep.conv_3x3.block."),
        (r"^mobilevit\.encoder\.layer\.(\d)\.conv_1x1\.", r"encoder.layer_@\1.1.local_rep.conv_1x1.block."),
        (r"^mobilevit\.encoder\.layer\.(\d)\.conv_projection\.", r"encoder.layer_@\1.1.conv_proj.block."),
        (r"^mobilevit\.encoder\.layer\.(\d)\.fusion\.", r"encoder.layer_@\1.1.fusion.block."),
        (r"block\.expand_1x1\.", "block.exp_1x1.block."),
        (r"block\.conv_3x3\.(?=c|n)", "block.conv_3x3.block."),
        (r"block\.reduce_1x1\.", "block.red_1x1.block."),
        (r"layernorm_before", "pre_norm_mha.0"),
        (r"attention\.output\.dense", "pre_norm_mha.1.out_proj"),
        (r"layernorm_after", "pre_norm_ffn.0"),
        (r"intermediate\.dense", "pre_norm_ffn.1"),
        (r"output\.dense", "pre_norm_ffn.4"),
        (r"^segmentation_head\.classifier\.convolution", classifier),
        (r"^segmentation_head\.aspp\.convs\.4\.", "segmentation_head.aspp.convs.4.aspp_pool."),
        (r"^segmentation_head\.aspp\.(.*)\.conv_1x1\.", r"seg_head.aspp.aspp_layer.\1.conv_1x1.block."),
        (r"^segmentation_head\.aspp\.(convs\.\d|project)\.", r"seg_head.aspp.aspp_layer.\1.block."),
        (r"\.convolution\.", ".conv."),
        (r"\.normalization\.", ".norm."),
        (r"@(\d)", lambda found: str(int(found[1]) + 1)),
        (r"LAST(\d)", lambda found: {"2": "2", "3": "4", "4": "3"}[found[1]]),
    ]  # fmt: skip
    named = {}
    for key, tensor in state.items():
        if ".attention.attention." in key:
            continue
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        named[key] = tensor
    for key in [key for key in state if ".attention.attention.query." in key]:
        parts = [state[key.replace("query", part)] for part in ("query", "key", "value")]
        stage, encoder = re.findall(r"layer\.(\d)", key)
        place = f"encoder.layer_{int(stage) + 1}.1.global_rep.{encoder}.pre_norm_mha.1"
        named[f"{place}.qkv_proj.{key.rpartition('.')[2]}"] = torch.cat(parts)
    return named | {"seg_head.aux_head.0.block.conv.weight": torch.zeros(8, 64, 3, 3)}


def assert_same_scores(found: torch.nn.Module, expected: torch.Tensor, x: torch.Tensor) -> None:
    scores = found(x)
    scale = expected.abs().max()
    assert expected.std() > 0.05 * scale and (expected[0] - expected[1]).abs().max() > 1e-3 * scale
    assert scores.shape == expected.shape
    assert (scores - expected).abs().max() <= TOLERANCE * scale


def pictures(size: tuple[int, int]) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_published_networks(variant: str) -> None:
    loaded = load_model(f"deeplabv3-{variant}", image_size=64)
    assert loaded.info.params == PARAMETERS[variant]
    assert (loaded.info.task, loaded.info.labels, loaded.output_names) == ("image-segmentation", VOC, ("scores",))


def test_parameters_of_the_recipe_of_output_stride_8() -> None:
    backbone = VARIANTS["s"].__class__(**{**VARIANTS["s"].__dict__, "output_stride": 8})
    assert count_parameters(build((backbone, HeadConfig(512, RATES[8])), output="scores")) == 8_537_269


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_hf_folder(variant: str, tmp_path: Path) -> None:
    oracle = hf_model(variant)
    oracle.save_pretrained(tmp_path)
    coarse = load_model(weights=tmp_path, output="coarse")
    assert (coarse.info.variant, coarse.weights.family) == (f"deeplabv3-{variant}", "hf")
    assert coarse.info.params == PARAMETERS[variant]
    for size in [(256, 256), (272, 240)]:
        assert_same_scores(coarse.module, oracle(pictures(size)).logits, pictures(size))


@torch.no_grad()
def test_scores_of_hf_are_upsampled_without_aligned_corners(hf_xxs: Oracle, tmp_path: Path) -> None:
    hf_xxs.save_pretrained(tmp_path)
    x = pictures((128, 96))
    expected = F.interpolate(hf_xxs(x).logits, size=(128, 96), mode="bilinear", align_corners=False)
    assert_same_scores(load_model(weights=tmp_path).module, expected, x)
    labels = load_model(weights=tmp_path, output="labels")
    assert labels.output_names == ("labels",)
    found = labels.module(x)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected.argmax(dim=1))


@torch.no_grad()
@pytest.mark.parametrize(
    ("classifier", "aligned", "order"),
    [
        ("seg_head.classifier.classifier.block.conv", False, "BGR"),
        ("seg_head.classifier.block.conv", True, "RGB"),
    ],
)
def test_a_name_of_cvnets_tells_how_it_upsamples(
    classifier: str, aligned: bool, order: str, hf_xxs: Oracle, tmp_path: Path
) -> None:
    torch.save(cvnets_names(hf_xxs.state_dict(), classifier=classifier), tmp_path / "deeplabv3.pt")
    loaded = load_model(weights=tmp_path / "deeplabv3.pt")
    assert loaded.weights.family == "ml-cvnets" and loaded.info.settings["align_corners"] is aligned
    assert loaded.preprocessing and loaded.preprocessing.channel_order == order
    assert loaded.preprocessing.resize_ratio is None and loaded.preprocessing.crop == (512, 512)
    assert any(note.startswith("the auxiliary head (4,608 weights)") for note in loaded.notes)
    x = pictures((128, 96))
    expected = F.interpolate(hf_xxs(x).logits, size=(128, 96), mode="bilinear", align_corners=aligned)
    assert_same_scores(loaded.module, expected, x)


@torch.no_grad()
def test_output_stride_and_rates_of_the_hf_config_are_honoured(tmp_path: Path) -> None:
    oracle = hf_model("xxs", output_stride=8, atrous_rates=[2, 5, 9], aspp_out_channels=32, num_labels=5)
    oracle.save_pretrained(tmp_path)
    loaded = load_model(weights=tmp_path, output="coarse")
    assert (loaded.info.num_classes, loaded.info.settings["output_stride"], loaded.info.labels) == (5, 8, None)
    assert_same_scores(loaded.module, oracle(pictures((128, 128))).logits, pictures((128, 128)))
    with pytest.raises(WeightsError, match=r"config\.json says output_stride is 8, expected 16"):
        load_model(weights=tmp_path, output_stride="16")


def test_stride_8_alone_gives_other_scores(tmp_path: Path) -> None:
    x = torch.rand(1, 3, 64, 64)
    by_stride = {stride: load_model("deeplabv3-xxs", output="coarse", output_stride=stride) for stride in ("16", "8")}
    assert {stride: tuple(loaded.module(x).shape[2:]) for stride, loaded in by_stride.items()} == {
        "16": (4, 4),
        "8": (8, 8),
    }


def test_labels_and_pictures_of_a_hf_folder(hf_xxs: Oracle, tmp_path: Path) -> None:
    hf_xxs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = [f"thing {index}" for index in range(21)]
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": dict(enumerate(names))}))
    processor = {"size": {"shortest_edge": 544}, "crop_size": {"height": 512, "width": 512}, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    loaded = load_model(weights=tmp_path)
    assert loaded.info.labels == tuple(names)
    assert loaded.preprocessing and loaded.preprocessing.resize_ratio == 544 / 512
    assert loaded.input_shapes == ((1, 3, 512, 512),)


REFUSED = {
    "a classifier, asked for as a segmenter": (
        {"variant": "deeplabv3-xxs"},
        lambda state: {"conv_1.block.conv.weight": torch.zeros(16, 3, 3, 3)},
        "are not those of a DeepLabV3",
    ),
    "a segmenter, asked for as a classifier": ({"variant": "xxs"}, dict, "a segmentation checkpoint (DeepLabV3)"),
    "another variant": ({"variant": "deeplabv3-s"}, dict, "this is deeplabv3-xxs, asked for deeplabv3-s"),
    "other classes": ({"num_classes": 5}, dict, "the checkpoint has 21 classes, asked for 5"),
    "a missing weight": (
        {},
        lambda state: {k: v for k, v in state.items() if k != "segmentation_head.aspp.convs.2.convolution.weight"},
        "segmentation_head.aspp.convs.2.convolution.weight is missing",
    ),
    "a weight too many": (
        {},
        lambda state: {**state, "segmentation_head.aspp.convs.5.convolution.weight": torch.zeros(1)},
        "the network has no such weight",
    ),
    "another head": (
        {},
        lambda state: {"seg_head.psp_layer.fusion.0.block.conv.weight": torch.zeros(1)},
        "PSPNet",
    ),
    "no classifier": (
        {},
        lambda state: {k: v for k, v in state.items() if "segmentation_head.classifier" not in k},
        "segmentation_head.classifier.convolution.weight is missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_checkpoint_is_refused(case: str, hf_xxs: Oracle, tmp_path: Path) -> None:
    options, change, message = REFUSED[case]
    save_file(change({k: v.contiguous() for k, v in hf_xxs.state_dict().items()}), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=re.escape(message)) as caught:
        load_model(weights=tmp_path / "model.safetensors", **options)
    assert "\n" not in str(caught.value)


def test_options_of_another_family_are_refused() -> None:
    with pytest.raises(UsageError, match="--output is not an option of MobileViT"):
        load_model("xxs", output="labels")
    with pytest.raises(UsageError, match="output"):
        load_model("deeplabv3-xxs", output="heatmap")
