"""Weights of the other three families give our network the logits of the implementation they come from.

transformers and timm, with random weights, are independent oracles; ml-cvnets has no package here, so its names are
written out a second time, as rules, and checked against the table.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomize
from PIL import Image
from safetensors.torch import save_file

from mvit_export.data.preprocessing import FAMILY_PREPROCESSING, Preprocessing, to_picture, to_tensor
from mvit_export.families.mobilevit.names import FAMILIES, expected_tensors, map_state, name_table, recognise
from mvit_export.families.mobilevit.network import VARIANTS, MobileViT, create_mobilevit
from mvit_export.families.mobilevit.weights import load_weights
from mvit_export.families.timm import import_timm
from mvit_export.models.checkpoints import read_checkpoint
from mvit_export.models.fit import load_into
from mvit_export.models.own_files import save_weights

timm = import_timm()  # first: it makes torchvision importable for both
transformers = importlib.import_module("transformers")

SIZES = [(256, 256), (224, 224), (240, 272)]
TOLERANCE = 1e-5  # of the largest logit: fp32 rounding of another order of operations
HF_SIZES = {
    "xxs": {
        "hidden_sizes": [64, 80, 96],
        "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320],
        "expand_ratio": 2.0,
    },
    "xs": {"hidden_sizes": [96, 120, 144], "neck_hidden_sizes": [16, 32, 48, 64, 80, 96, 384], "expand_ratio": 4.0},
    "s": {"hidden_sizes": [144, 192, 240], "neck_hidden_sizes": [16, 32, 64, 96, 128, 160, 640], "expand_ratio": 4.0},
}


def hf_model(variant: str, *, seed: int = 0, **options) -> torch.nn.Module:
    config = transformers.MobileViTConfig(**{"num_labels": 1000, **HF_SIZES[variant], **options})
    return randomize(transformers.MobileViTForImageClassification(config), seed)


def timm_model(variant: str, **options) -> torch.nn.Module:
    return randomize(timm.create_model(f"mobilevit_{variant}", **options))


def image(size: tuple[int, int], seed: int = 1) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def network(loaded) -> MobileViT:
    """As a user builds it from what `load_weights` returned."""
    model = MobileViT(loaded.config)
    model.load_state_dict(loaded.state, strict=True)
    return model.eval()


@torch.inference_mode()
def assert_same_logits(model: MobileViT, oracle: torch.nn.Module, size: tuple[int, int]) -> None:
    x = image(size)
    got, want = model(x), oracle(x)
    want = getattr(want, "logits", want)
    scale = want.abs().max()
    assert want.std() > 0.05 * scale and (want[0] - want[1]).abs().max() > 1e-3 * scale  # an oracle that says something
    assert (got - want).abs().max() <= TOLERANCE * scale


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_hf_folder(variant: str, tmp_path: Path) -> None:
    oracle = hf_model(variant)
    oracle.save_pretrained(tmp_path)
    loaded = load_weights(str(tmp_path))
    assert (loaded.family, loaded.variant, loaded.config.num_classes) == ("hf", variant, 1000)
    assert loaded.labels is None  # LABEL_0, LABEL_1, ... are no names
    for size in SIZES:
        assert_same_logits(network(loaded), oracle, size)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_file(variant: str, tmp_path: Path) -> None:
    oracle = timm_model(variant)
    torch.save(oracle.state_dict(), tmp_path / "weights.pth")
    loaded = load_weights(str(tmp_path / "weights.pth"))
    assert (loaded.family, loaded.variant) == ("timm", variant)
    assert loaded.preprocessing == FAMILY_PREPROCESSING["timm"]
    for size in SIZES:
        assert_same_logits(network(loaded), oracle, size)


@pytest.mark.parametrize("stride", [16, 8])
def test_output_stride_of_the_hf_config_is_honoured(stride: int, tmp_path: Path) -> None:
    oracle = hf_model("xxs", output_stride=stride)
    oracle.save_pretrained(tmp_path)
    loaded = load_weights(str(tmp_path))
    assert loaded.config.output_stride == stride
    assert_same_logits(network(loaded), oracle, (224, 224))


@pytest.mark.parametrize("size", [256, 224])
def test_patch_configuration_b_runs(size: int, tmp_path: Path) -> None:
    hf_model("xxs", num_labels=10).save_pretrained(tmp_path)
    a, b = (network(load_weights(str(tmp_path), patch_config=patches)) for patches in "AB")
    with torch.inference_mode():
        x = image((size, size))
        assert b(x).shape == (2, 10) and b(x).isfinite().all()
        assert (a(x) - b(x)).abs().max() > 1e-3  # it is another network on the same weights


def test_bin_and_half_precision(tmp_path: Path) -> None:
    state = hf_model("xxs").state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    whole = load_weights(str(tmp_path / "pytorch_model.bin"))
    for dtype in (torch.float16, torch.bfloat16):
        cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
        torch.save(cast, tmp_path / "half.bin")
        half = load_weights(str(tmp_path / "half.bin"))
        assert all(v.dtype == torch.float32 and v.is_contiguous() for k, v in half.state.items() if "batches" not in k)
        assert torch.equal(half.state["stem.conv.weight"], whole.state["stem.conv.weight"].to(dtype).float())
        assert half.sha256 != whole.sha256


def test_timm_folder_has_its_own_preprocessing(tmp_path: Path) -> None:
    oracle = timm_model("xxs", num_classes=7)
    save_file(oracle.state_dict(), tmp_path / "model.safetensors")
    cfg = {"input_size": [3, 224, 224], "crop_pct": 0.8, "interpolation": "bilinear", "mean": [0.5, 0.4, 0.3]}
    cfg |= {"std": [0.2, 0.3, 0.4], "crop_mode": "center"}
    config = {"architecture": "mobilevit_xxs", "num_classes": 7, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_weights(str(tmp_path), num_classes=7)
    assert loaded.preprocessing == Preprocessing(
        "RGB",
        crop=(224, 224),
        resize_ratio=1.25,
        interpolation="bilinear",
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        source="config.json (pretrained_cfg)",
    )
    assert_same_logits(network(loaded), oracle, (224, 224))


# --- ml-cvnets: the names once more, as rules on timm's, independent of the package's table -----------------------

CVNETS_RULES = [
    (r"^stem\.", "conv_1.block."),
    (r"^final_conv\.", "conv_1x1_exp.block."),
    (r"^head\.fc\.", "classifier.fc."),
    (r"^stages\.(\d)", lambda m: f"layer_{int(m[1]) + 1}"),
    (r"\.conv1_1x1\.", ".block.exp_1x1.block."),
    (r"\.conv2_kxk\.", ".block.conv_3x3.block."),
    (r"\.conv3_1x1\.", ".block.red_1x1.block."),
    (r"\.conv_kxk\.", ".local_rep.conv_3x3.block."),
    (r"\.conv_1x1\.weight", ".local_rep.conv_1x1.block.conv.weight"),
    (r"\.transformer\.", ".global_rep."),
    (r"\.attn\.qkv\.", ".pre_norm_mha.1.qkv_proj."),
    (r"\.attn\.proj\.", ".pre_norm_mha.1.out_proj."),
    (r"\.norm1\.", ".pre_norm_mha.0."),
    (r"\.norm2\.", ".pre_norm_ffn.0."),
    (r"\.mlp\.fc1\.", ".pre_norm_ffn.1."),
    (r"\.mlp\.fc2\.", ".pre_norm_ffn.4."),
    (r"\.conv_proj\.", ".conv_proj.block."),
    (r"\.conv_fusion\.", ".fusion.block."),
    (r"(layer_3\.1)\.norm\.", r"\1.global_rep.2."),
    (r"(layer_4\.1)\.norm\.", r"\1.global_rep.4."),
    (r"(layer_5\.1)\.norm\.", r"\1.global_rep.3."),
    (r"\.bn\.", ".norm."),
]


def cvnets_name(key: str) -> str:
    for pattern, replacement in CVNETS_RULES:
        key = re.sub(pattern, replacement, key)
    return key


@pytest.mark.parametrize("variant", VARIANTS)
def test_ml_cvnets(variant: str, tmp_path: Path) -> None:
    oracle = timm_model(variant)
    state = {cvnets_name(key): value for key, value in oracle.state_dict().items()}
    assert len(state) == 311
    for key in (
        "conv_1.block.conv.weight",
        "layer_1.0.block.exp_1x1.block.norm.running_mean",
        "layer_3.1.local_rep.conv_1x1.block.conv.weight",
        "layer_4.1.global_rep.3.pre_norm_mha.1.qkv_proj.bias",
        "layer_5.1.global_rep.3.weight",
        "layer_5.1.fusion.block.conv.weight",
        "conv_1x1_exp.block.norm.bias",
        "classifier.fc.weight",
    ):
        assert key in state
    torch.save(state, tmp_path / "mobilevit.pt")
    loaded = load_weights(str(tmp_path / "mobilevit.pt"), variant=variant)
    assert (loaded.family, loaded.variant) == ("ml-cvnets", variant)
    assert loaded.preprocessing.channel_order == "BGR"
    assert_same_logits(network(loaded), oracle, (224, 224))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_are_one_to_one_and_survive_a_round_trip(variant: str, family: str) -> None:
    """Our state, renamed to the family and mapped back, is what it was: nothing is dropped, doubled or swapped."""
    config = VARIANTS[variant]
    ours = randomize(MobileViT(config)).state_dict()
    theirs = {}
    for names in name_table(config):
        name = FAMILIES[family](names)
        for key in (key for key in ours if key.rpartition(".")[0] == names.ours):
            parts = ("query", "key", "value") if "*" in name else ("",)
            for part, rows in zip(parts, ours[key].chunk(len(parts)) if len(parts) > 1 else [ours[key]], strict=True):
                theirs[f"{name.replace('*', part)}.{key.rpartition('.')[2]}"] = rows
    assert theirs.keys() == expected_tensors(family, config).keys()
    assert len(theirs) == (347 if family == "hf" else 311)
    assert recognise(theirs)[0] == family
    back = map_state(theirs, family, config)
    assert all(torch.equal(back[key], value) for key, value in ours.items())


def test_oracles_have_exactly_the_names_of_the_table() -> None:
    for variant, config in VARIANTS.items():
        assert hf_model(variant).state_dict().keys() == expected_tensors("hf", config).keys()
        assert timm_model(variant).state_dict().keys() == expected_tensors("timm", config).keys()


@pytest.mark.slow
def test_every_weight_matters() -> None:
    """Each tensor, changed a little, moves the logits: so no comparison above can pass with one of them ignored."""
    model = randomize(create_mobilevit("xxs", num_classes=10))
    x = image((64, 64))
    with torch.inference_mode():
        before = model(x)
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            kept = tensor.clone()
            change = torch.linspace(0.5, 1.5, tensor.numel()).reshape(tensor.shape)
            tensor.mul_(change)
            moved = (model(x) - before).abs().max() / before.abs().max()
            tensor.copy_(kept)
            # A key bias shifts all scores of a query alike, which softmax forgets; q and v are in the same tensor.
            assert moved > 1e-4, name


# --- what stands beside the weights -------------------------------------------------------------------------------

APPLE = {  # as the official repositories have it
    "crop_size": {"height": 256, "width": 256},
    "do_center_crop": True,
    "do_flip_channel_order": True,
    "do_resize": True,
    "feature_extractor_type": "MobileViTFeatureExtractor",
    "resample": 2,
    "size": {"shortest_edge": 288},
}


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    names = {0: "cat", 1: "dog", 2: "coffee, cup"}
    model = hf_model("xxs", num_labels=3, id2label=names, label2id={name: index for index, name in names.items()})
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Preprocessing("BGR")),
        ({"size": 288, "crop_size": 256}, Preprocessing("BGR")),
        ({"do_flip_channel_order": False}, Preprocessing("RGB")),
        ({"resample": 3}, Preprocessing("BGR", interpolation="bicubic")),
        ({"do_rescale": True, "rescale_factor": 0.00392156862745098}, Preprocessing("BGR")),
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            Preprocessing("BGR", crop=(224, 224), resize_ratio=256 / 224),
        ),
        (
            {"size": {"height": 240, "width": 272}, "do_center_crop": False},
            Preprocessing("BGR", crop=(240, 272), resize_ratio=None),
        ),
        ({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}, Preprocessing("BGR")),  # not switched on
        (
            {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
            Preprocessing("BGR", mean=(0.3, 0.2, 0.1), std=(0.6, 0.5, 0.4)),
        ),
    ],
)
def test_preprocessor_config_wins(change: dict, expected: Preprocessing, hf_folder: Path) -> None:
    file = hf_folder / "preprocessor_config.json"
    file.write_text(json.dumps(APPLE | change))
    try:
        loaded = load_weights(str(hf_folder))
    finally:
        file.unlink()
    assert loaded.preprocessing.source == "preprocessor_config.json"
    assert loaded.preprocessing.with_size(expected.crop) == loaded.preprocessing
    assert {**loaded.preprocessing.to_json(), "source": "default"} == expected.to_json()
    assert loaded.labels == ("cat", "dog", "coffee, cup")


def test_pixels_are_those_of_transformers(hf_folder: Path, tmp_path: Path) -> None:
    """A file that transformers' own processor wrote makes the same tensor from the same picture."""
    name = "transformers.models.mobilevit.image_processing_pil_mobilevit"
    pil_processor = pytest.importorskip(name, reason="a transformers with the PIL processor").MobileViTImageProcessorPil
    processor = pil_processor(size={"shortest_edge": 288}, resample=2)
    processor.save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        (tmp_path / file).symlink_to(hf_folder / file)
    preprocessing = load_weights(str(tmp_path)).preprocessing
    assert preprocessing.source == "preprocessor_config.json"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 431, 3), dtype=np.uint8))
    want = processor(picture, return_tensors="np")["pixel_values"]  # (1, 3, 256, 256)
    got = to_tensor(to_picture(picture, preprocessing)[None], preprocessing)
    assert got.shape == want.shape == (1, 3, 256, 256)
    assert np.abs(got - want).max() <= 1e-6
    assert np.abs(got[:, ::-1] - want).max() > 0.5  # the channel order shows


def test_hf_folder_without_preprocessor_config(hf_folder: Path) -> None:
    assert load_weights(str(hf_folder)).preprocessing == FAMILY_PREPROCESSING["hf"]


def test_source_and_hash(hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.chdir(hf_folder.parent)
    loaded = load_weights(hf_folder.name)
    assert loaded.source == str(hf_folder)
    assert loaded.revision is None
    assert loaded.sha256 == hashlib.sha256((hf_folder / "model.safetensors").read_bytes()).hexdigest()


# --- our own files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load(dtype: torch.dtype, tmp_path: Path) -> None:
    model = randomize(create_mobilevit("xs", num_classes=3, patch_config="B", output_stride=16))
    preprocessing = Preprocessing("BGR", crop=(192, 192), mean=(0.1, 0.2, 0.3), source="test")
    labels = ["a", "b", "c"]
    save_weights(
        model, tmp_path / "w.safetensors", preprocessing=preprocessing, variant="xs", labels=labels, dtype=dtype
    )
    loaded = load_weights(str(tmp_path / "w.safetensors"))
    assert (loaded.family, loaded.variant, loaded.labels) == ("mvit-export", "xs", ("a", "b", "c"))
    assert (loaded.config, loaded.preprocessing) == (model.config, preprocessing)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state[key], value.to(dtype).float() if value.is_floating_point() else value)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_equal_networks_are_equal_files(tmp_path: Path) -> None:
    model, preprocessing = create_mobilevit("xxs", num_classes=2), FAMILY_PREPROCESSING["timm"]
    for name in "abcdef":
        save_weights(model, tmp_path / name, preprocessing=preprocessing, labels=("Katze", "Hündin"))
    first = (tmp_path / "a").read_bytes()
    assert all((tmp_path / name).read_bytes() == first for name in "bcdef")
    assert int.from_bytes(first[:8], "little") % 8 == 0
    assert load_weights(str(tmp_path / "a")).labels == ("Katze", "Hündin")


def test_own_file_without_metadata(tmp_path: Path) -> None:
    model = randomize(create_mobilevit("xxs", num_classes=5))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_weights(str(tmp_path / "w.safetensors"))
    assert (loaded.variant, loaded.config) == ("xxs", model.config)
    assert loaded.preprocessing.source == "default (the file carries none)"


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "state_dict_ema"])
def test_wrapped_checkpoints(wrapper: str, tmp_path: Path) -> None:
    state = randomize(create_mobilevit("xxs", num_classes=5)).state_dict()
    parallel = {f"module.{key}": value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save({"epoch": 3, wrapper: parallel, "optimizer": {"lr": 0.1}}, tmp_path / "checkpoint.tar")
    loaded = load_weights(str(tmp_path / "checkpoint.tar"))
    assert torch.equal(loaded.state["classifier.bias"], state["classifier.bias"])
    network(loaded)  # the counters that the file lacks are there


def test_load_strict_for_any_module(tmp_path: Path) -> None:
    class Masked(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    module, other = Masked(), Masked()
    torch.save(other.state_dict(), tmp_path / "linear.pth")
    file = tmp_path / "linear.pth"
    digest = load_into(module, read_checkpoint(file), file).sha256
    assert len(digest) == 64
    assert torch.equal(module.weight, other.weight) and torch.equal(module.mask, other.mask)
