"""Every bad checkpoint that a user may hand over, and the one line that he gets: found, expected, what to do."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import randomize
from safetensors.torch import save, save_file

from mvit_export.data.preprocessing import DEFAULT_PREPROCESSING
from mvit_export.errors import HubError, MvitExportError, UsageError, WeightsError
from mvit_export.families.mobilevit.names import expected_tensors
from mvit_export.families.mobilevit.network import MobileViTConfig, create_mobilevit
from mvit_export.families.mobilevit.weights import load_weights
from mvit_export.models.checkpoints import read_checkpoint
from mvit_export.models.fit import load_into
from mvit_export.models.own_files import save_weights

State = dict[str, torch.Tensor]
MARK = Path(tempfile.gettempdir()) / f"mvit-export-ran-a-pickle-{os.getpid()}"


@cache
def states(family: str, variant: str = "xxs") -> State:
    """A sound state dict with five classes. Treat as read-only."""
    config = create_mobilevit(variant, num_classes=5).config
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.rand(want.shape, generator=generator).to(want.dtype)
        for key, want in expected_tensors(family, config).items()
    }


def torch_bytes(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, (f"mkdir {MARK}",)


def changed(family: str, key: str, value: torch.Tensor | None, variant: str = "xxs") -> bytes:
    """A sound state with `key` replaced, or removed by None."""
    state = dict(states(family, variant))
    if value is None:
        del state[key]
    else:
        state[key] = value
    return torch_bytes(state)


def with_bad_values(key: str) -> bytes:
    tensor = states("hf")[key].clone()
    tensor.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    return changed("hf", key, tensor)


def lookalike() -> State:
    names = ("conv1.0.weight", "mv2.0.conv.0.weight", "mvit.0.transformer.layers.0.0.norm.weight")
    return dict.fromkeys((*names, "mvit.0.conv4.0.weight", "conv2.0.weight", "fc.weight"), torch.zeros(1))


def prefixed(prefix: str, family: str = "ml-cvnets", **extra: torch.Tensor) -> bytes:
    return torch_bytes({prefix + key: value for key, value in states(family).items()} | extra)


Q = "mobilevit.encoder.layer.2.transformer.layer.0.attention.attention.query"

# (what is in the file, options of load_weights, fragments of the message in order). A callable gives the bytes.
BAD: dict[str, tuple[Callable[[], bytes | None], dict, list[str]]] = {
    # --- files that are no checkpoint
    "missing": (lambda: None, {}, ["no such file, expected a checkpoint: check the path"]),
    "empty": (lambda: b"", {}, ["the file is empty, expected a checkpoint: download it again"]),
    "html": (lambda: b"\n<!DOCTYPE html><html>", {}, ["an HTML or XML page, expected a checkpoint", "direct link"]),
    "lfs pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        {},
        ["a Git LFS pointer", "run `git lfs pull`"],
    ),
    "text": (lambda: b"hello world, these are no weights", {}, ["begins with b'hello wo', expected safetensors or a"]),
    "truncated zip": (lambda: torch_bytes(states("timm"))[:-4000], {}, ["truncated PyTorch file", "download it again"]),
    "truncated to the head of a zip": (lambda: torch_bytes(states("timm"))[:100], {}, ["truncated PyTorch file"]),
    "truncated legacy pickle": (
        lambda: torch_bytes(states("timm"), _use_new_zipfile_serialization=False)[:-4000],
        {},
        ["truncated PyTorch file", "expected a whole one"],
    ),
    "legacy pickle cut in a tensor's size": (
        lambda: torch_bytes({"a": torch.zeros(1000)}, _use_new_zipfile_serialization=False)[:-4003],
        {},
        ["truncated PyTorch file"],
    ),
    "zip with damaged names": (
        lambda: torch_bytes(states("timm")).replace(b"torch._utils", b"torch._\x01\nils"),
        {},
        ["this pickle wants to call", "refused"],
    ),
    "legacy pickle cut in its names": (
        lambda: torch_bytes(states("timm"), _use_new_zipfile_serialization=False)[:300],
        {},
        ["expected", "download it again"],
    ),
    "truncated safetensors": (
        lambda: save(states("timm"))[:-4000],
        {},
        ["a damaged or truncated safetensors file (", "expected a whole one: download it again"],
    ),
    "safetensors cut in its header": (lambda: save(states("timm"))[:500], {}, ["truncated safetensors file ("]),
    "safetensors without tensors": (lambda: save({}), {}, ["a safetensors file without tensors"]),
    # --- pickles
    "pickle that runs code": (
        lambda: torch_bytes({"state_dict": Malicious()}),
        {},
        ["this pickle wants to call", "system", "refused because a checkpoint that runs code", "model.state_dict()"],
    ),
    "bare pickle that runs code": (
        lambda: pickle.dumps(Malicious(), protocol=2),
        {},
        ["this pickle wants to call", "system", "refused"],
    ),
    "whole module": (
        lambda: torch_bytes(torch.nn.Linear(2, 2)),
        {},
        ["this pickle wants to call torch.nn.modules.linear.Linear, refused", "save model.state_dict()"],
    ),
    "list": (lambda: torch_bytes([torch.zeros(1)]), {}, ["holds a list, expected a state dict"]),
    "tensor": (lambda: torch_bytes(torch.zeros(1)), {}, ["holds a Tensor, expected a state dict"]),
    "no tensors": (
        lambda: torch_bytes({"epoch": 3, "name": "x"}),
        {},
        ["a dict with epoch (int), name (str), expected tensors by name"],
    ),
    "empty dict": (lambda: torch_bytes({}), {}, ["a dict with no entries, expected tensors"]),
    # --- other networks
    "lookalike": (
        lambda: torch_bytes(lookalike()),
        {},
        ["chinhsuanwu/mobilevit-pytorch, which is another network than the paper's", "(found mv2.0.conv.0.weight)"],
    ),
    "unknown network": (
        lambda: torch_bytes({"layer1.0.conv1.weight": torch.zeros(1), "layer1.0.bn1.weight": torch.zeros(1)}),
        {},
        ["its names (layer1.0.conv1.weight, layer1.0.bn1.weight, ...) are not MobileViT's; expected weights of mvit"],
    ),
    "cvnets segmentation": (
        lambda: prefixed("encoder.", **{"seg_head.classifier.classifier.block.conv.weight": torch.zeros(1)}),
        {},
        ["a segmentation checkpoint (DeepLabV3): only classification is exported so far", "(found seg_head.classifier"],
    ),
    "cvnets detection": (
        lambda: prefixed("encoder.", **{"ssd_heads.0.proj_layer.block.conv.weight": torch.zeros(1)}),
        {},
        ["a detection checkpoint (SSDLite): only classification is exported so far", "(found ssd_heads.0"],
    ),
    "cvnets encoder": (
        lambda: prefixed("encoder."),
        {},
        ["a detection or segmentation backbone", "(found encoder.con"],
    ),
    "hf segmentation": (
        lambda: changed("hf", "segmentation_head.classifier.convolution.weight", torch.zeros(1)),
        {},
        ["a segmentation checkpoint (DeepLabV3)", "(found segmentation_head.classifier.convolution.weight)"],
    ),
    # --- the right network, but
    "wrong variant": (
        lambda: torch_bytes(states("hf", "xs")),
        {"variant": "xxs"},
        [
            "this is variant xs: its mobilevit.encoder.layer.0.layer.0.expand_1x1.convolution.weight has shape"
            " (64, 16, 1, 1), xxs needs (32, 16, 1, 1); use --variant xs"
        ],
    ),
    "wrong variant of timm": (
        lambda: torch_bytes(states("timm")),
        {"variant": "s"},
        ["this is variant xxs: its stages.0.0.conv1_1x1.conv.weight", "use --variant xxs"],
    ),
    "unknown variant": (lambda: torch_bytes(states("timm")), {"variant": "m"}, ["variant is 'm', expected one of xxs"]),
    "unknown patches": (
        lambda: torch_bytes(states("timm")),
        {"patch_config": "C"},
        ["patch configuration is 'C', expected one of A, B"],
    ),
    "classes": (
        lambda: torch_bytes(states("timm")),
        {"num_classes": 1000},
        ["the checkpoint has 5 classes, asked for 1000: leave --num-classes out or use --num-classes 5"],
    ),
    "missing key": (
        lambda: changed("ml-cvnets", "layer_3.1.global_rep.2.bias", None),
        {},
        ["layer_3.1.global_rep.2.bias is missing, expected shape (64,): absent from the checkpoint"],
    ),
    "missing part of qkv": (
        lambda: changed("hf", f"{Q}.bias", None),
        {},
        [f"{Q}.bias is missing, expected shape (64,)"],
    ),
    "extra key": (
        lambda: changed("timm", "stages.2.1.transformer.2.norm1.weight", torch.zeros(64)),
        {},
        ["stages.2.1.transformer.2.norm1.weight (64,) is in the checkpoint, but the network has no such weight"],
    ),
    "wrong shape": (
        lambda: changed("timm", "stages.4.1.norm.weight", torch.zeros(95)),
        {},
        ["stages.4.1.norm.weight has shape (95,), expected (96,)"],
    ),
    "wrong shape of a part of qkv": (
        lambda: changed("hf", f"{Q}.weight", torch.zeros(192, 64)),
        {},
        [f"{Q}.weight has shape (192, 64), expected (64, 64)"],
    ),
    "nan and inf": (
        lambda: with_bad_values(f"{Q}.weight"),
        {},
        [f"{Q}.weight has 3 NaN or Inf of 4096 values, expected finite weights"],
    ),
    "integers": (
        lambda: changed("timm", "stem.conv.weight", torch.zeros(16, 3, 3, 3, dtype=torch.int8)),
        {},
        ["stem.conv.weight has dtype torch.int8, expected floating point"],
    ),
    "complex": (
        lambda: changed("timm", "stem.bn.bias", torch.zeros(16, dtype=torch.complex64)),
        {},
        ["stem.bn.bias has dtype torch.complex64, expected floating point"],
    ),
    "double out of range": (
        lambda: changed("timm", "stem.bn.bias", torch.full((16,), 1e300, dtype=torch.float64)),
        {},
        ["stem.bn.bias has 16 NaN or Inf of 16 values"],
    ),
    "timm without classifier": (
        lambda: changed("timm", "head.fc.weight", None),
        {},
        ["head.fc.weight is missing: a backbone without classifier, expected a classification checkpoint"],
    ),
    "hf without classifier": (
        lambda: changed("hf", "classifier.weight", None),
        {},
        ["classifier.weight is missing: a"],
    ),
    "hf without classifier bias": (
        lambda: changed("hf", "classifier.bias", None),
        {},
        ["classifier.bias is missing, expected shape (5,)"],
    ),
    "hf base model": (
        lambda: torch_bytes({key.removeprefix("mobilevit."): value for key, value in states("hf").items()}),
        {},
        ["a Hugging Face MobileViTModel: classifier.weight is missing", "(found conv_stem.convolution.weight)"],
    ),
    # --- our own
    "own metadata is no json": (
        lambda: save(states("mvit-export"), {"mvit-export": "{"}),
        {},
        ["its mvit-export metadata is damaged (", "expected what save_weights writes"],
    ),
    "own metadata lacks a field": (
        lambda: save(states("mvit-export"), {"mvit-export": '{"config": {}}'}),
        {},
        ["its mvit-export metadata is damaged ('stem')"],
    ),
}


def message_of(call: Callable[[], object], kind: type[MvitExportError] = MvitExportError) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message == message.strip()
    return message


def assert_says(message: str, fragments: list[str]) -> None:
    assert re.search(".*".join(map(re.escape, fragments)), message), message


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bad_file(name: str, suffix: str, tmp_path: Path) -> None:
    """The suffix changes nothing: the content decides."""
    make, options, fragments = BAD[name]
    file = tmp_path / f"weights{suffix}"
    content = make()
    if content is not None:
        file.write_bytes(content)
    kind = UsageError if name in ("unknown variant", "unknown patches") else WeightsError
    message = message_of(lambda: load_weights(str(file), **options), kind)
    assert_says(message, fragments)
    if kind is WeightsError:
        assert message.startswith(f"{file}: ") and message.count(str(file)) == 1
    assert not MARK.exists()


@pytest.mark.slow
def test_sound_states_of_the_table_load(tmp_path: Path) -> None:
    """The rows above fail for the fault that they name, not for something else."""
    for family in ("mvit-export", "ml-cvnets", "hf", "timm"):
        (tmp_path / "w").write_bytes(torch_bytes(states(family)))
        loaded = load_weights(str(tmp_path / "w"), variant="xxs", num_classes=5)
        assert (loaded.family, loaded.config.num_classes) == (family, 5)


# --- folders: (config.json, preprocessor_config.json), fragments -----------------------------------------------------

APPLE = {"do_flip_channel_order": True, "resample": 2, "size": {"shortest_edge": 288}, "crop_size": 256}
REAL = {"id2label": {"0": "a", "1": "b"}}
FOLDERS: dict[str, tuple[object, object, list[str]]] = {
    "activation": ({"hidden_act": "gelu"}, None, ['hidden_act is "gelu", expected "silu" or "swish"']),
    "heads": ({"num_attention_heads": 8}, None, ["num_attention_heads is 8, expected 4"]),
    "eps": ({"layer_norm_eps": 1e-6}, None, ["layer_norm_eps is 1e-06, expected 1e-05"]),
    "expansion": ({"expand_ratio": 4.0}, None, ["expand_ratio is 4.0, expected 2"]),
    "mlp": ({"mlp_ratio": 4}, None, ["mlp_ratio is 4, expected 2"]),
    "patch": ({"patch_size": 4}, None, ["patch_size is 4, expected 2 or [2, 2]"]),
    "stride": ({"output_stride": 4}, None, ["output_stride is 4, expected 32 or 16 or 8"]),
    "kernel": ({"conv_kernel_size": 5}, None, ["conv_kernel_size is 5, expected 3"]),
    "qkv bias": ({"qkv_bias": False}, None, ["qkv_bias is false, expected true"]),
    "channels": ({"num_channels": 1}, None, ["num_channels is 1, expected 3"]),
    "widths": ({"hidden_sizes": [1, 2, 3]}, None, ["hidden_sizes is [1, 2, 3], expected [64, 80, 96]"]),
    "another model": ({"model_type": "mobilevitv2"}, None, ['model_type is "mobilevitv2", expected "mobilevit"']),
    "labels": (REAL, None, ["config.json names 2 classes in id2label, the classifier has 5"]),
    "multi-label": (
        {"problem_type": "multi_label_classification"},
        None,
        ["problem_type is multi_label_classification, expected single_label_classification; only one-of-n"],
    ),
    "regression": ({"problem_type": "regression"}, None, ["problem_type is regression, expected single_label"]),
    "broken json": ("{", None, ["config.json is not readable JSON"]),
    "json list": ([1], None, ["config.json holds a list, expected a JSON object"]),
    "no resize": (
        {},
        APPLE | {"do_resize": False},
        ["preprocessor_config.json says do_resize is false, expected true"],
    ),
    "no rescale": ({}, APPLE | {"do_rescale": False}, ["do_rescale is false, expected true"]),
    "factor": ({}, APPLE | {"rescale_factor": 0.0078125}, ["rescale_factor is 0.0078125, expected 1/255"]),
    "box": ({}, APPLE | {"resample": 4}, ["resample is 4, expected one of 0 (nearest), 1 (lanczos)"]),
    "resample list": ({}, APPLE | {"resample": [2]}, ["resample is [2], expected one of 0 (nearest)"]),
    "huge mean": (
        {},
        APPLE | {"do_normalize": True, "image_mean": [10**400, 0, 0], "image_std": [1, 1, 1]},
        ["expected a list of 3 numbers"],
    ),
    "padding": ({}, APPLE | {"do_pad": True}, ["do_pad is true, expected no such step"]),
    "small": ({}, APPLE | {"size": {"shortest_edge": 224}}, ['size is {"shortest_edge": 224}, expected at least the']),
    "no crop": (
        {},
        APPLE | {"do_center_crop": False},
        ["do_center_crop is false, expected true where size gives only"],
    ),
    "oblong": ({}, APPLE | {"crop_size": {"height": 256, "width": 224}}, ["crop_size is", "expected a square"]),
    "bad size": ({}, APPLE | {"size": {"longest_edge": 288}}, ["size is", "expected height and width in pixels"]),
    "no mean": ({}, APPLE | {"do_normalize": True}, ["image_mean is null, expected three numbers"]),
    "zero std": (
        {},
        APPLE | {"do_normalize": True, "image_mean": [0, 0, 0], "image_std": [1, 0, 1]},
        ["image_std is [1, 0, 1], expected no zero"],
    ),
}
TIMM_FOLDERS: dict[str, tuple[dict, list[str]]] = {
    "architecture": (
        {"architecture": "mobilevitv2_050"},
        ['architecture is "mobilevitv2_050", expected "mobilevit_xxs"'],
    ),
    "classes": ({"num_classes": 1000}, ["num_classes is 1000, expected 5"]),
    "pooling": ({"global_pool": "max"}, ['global_pool is "max", expected "avg"']),
    "arguments": (
        {"model_args": {"output_stride": 16}},
        ["model_args.output_stride is 16, expected none of that name"],
    ),
    "crop mode": ({"pretrained_cfg": {"crop_mode": "squash"}}, ['pretrained_cfg.crop_mode is "squash", expected "cen']),
    "interpolation": ({"pretrained_cfg": {"interpolation": "random"}}, ['pretrained_cfg.interpolation is "random"']),
    "crop": ({"pretrained_cfg": {"crop_pct": 0}}, ["pretrained_cfg.crop_pct is 0, expected a number in (0, 1]"]),
    "mean": ({"pretrained_cfg": {"mean": [0.5]}}, ["mean is [0.5], expected a list of 3 numbers"]),
    "no cfg": ({"pretrained_cfg": [1]}, ["config.json says pretrained_cfg is [1], expected an object"]),
    "no arguments": ({"model_args": 5}, ["config.json says model_args is 5, expected an object"]),
    "input size": ({"pretrained_cfg": {"input_size": [1, 256, 256]}}, ["input_size is [1, 256, 256], expected [3, N"]),
}


def write_json(file: Path, content: object) -> None:
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_bad_hf_folder(name: str, tmp_path: Path) -> None:
    config, processor, fragments = FOLDERS[name]
    (tmp_path / "model.safetensors").write_bytes(save(states("hf")))
    write_json(tmp_path / "config.json", config)
    write_json(tmp_path / "preprocessor_config.json", processor)
    message = message_of(lambda: load_weights(str(tmp_path)), WeightsError)
    assert_says(message, fragments)
    assert message.startswith(f"{tmp_path}: ")


@pytest.mark.parametrize("name", TIMM_FOLDERS)
def test_bad_timm_folder(name: str, tmp_path: Path) -> None:
    config, fragments = TIMM_FOLDERS[name]
    (tmp_path / "pytorch_model.bin").write_bytes(torch_bytes(states("timm")))
    write_json(tmp_path / "config.json", config)
    assert_says(message_of(lambda: load_weights(str(tmp_path)), WeightsError), fragments)


def test_folder_without_weights(tmp_path: Path) -> None:
    expected = f"{tmp_path}: a folder without weights, expected model.safetensors or pytorch_model.bin in it"
    assert message_of(lambda: load_weights(str(tmp_path)), WeightsError) == expected
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert_says(message_of(lambda: load_weights(str(tmp_path))), ["model.safetensors.index.json has no weight_map"])


@pytest.mark.parametrize("source", ["hf:", "timm:", "hf:a/b/c", "hf:@main", "timm:a/b"])
def test_bad_hub_names(source: str) -> None:
    assert_says(message_of(lambda: load_weights(source), HubError), ["is not a repository name, expected OWNER/NAME"])


def test_variant_of_an_hf_folder_is_judged_by_its_weights(tmp_path: Path) -> None:
    save_file(states("hf", "xs"), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"expand_ratio": 4.0})
    message = message_of(lambda: load_weights(str(tmp_path), variant="xxs"), WeightsError)
    assert_says(message, ["this is variant xs: its ", "use --variant xs"])


# --- our own files -------------------------------------------------------------------------------------------------


def tiny() -> torch.nn.Module:
    from mvit_export.families.mobilevit.network import MobileViT

    return randomize(MobileViT(MobileViTConfig(8, (8, 8, 16, 16, 16), (16, 16, 16), 32, 2, 0.0, num_classes=4)))


def test_patch_configuration_of_the_file_counts(tmp_path: Path) -> None:
    model = create_mobilevit("xxs", num_classes=2, patch_config="B")
    file = tmp_path / "w.safetensors"
    save_weights(model, file, preprocessing=DEFAULT_PREPROCESSING)
    assert load_weights(str(file)).config.patch_config == "B"
    message = message_of(lambda: load_weights(str(file), patch_config="A"), WeightsError)
    assert_says(message, ["saved with patch configuration B, asked for A: leave --patch-config out"])


def test_own_sizes_round_trip_and_are_no_variant(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_weights(tiny(), file, preprocessing=DEFAULT_PREPROCESSING)
    loaded = load_weights(str(file))
    assert (loaded.variant, loaded.config) == ("custom", tiny().config)
    message = message_of(lambda: load_weights(str(file), variant="xxs"), WeightsError)
    assert_says(message, ["stem.conv.weight has shape (8, 3, 3, 3), expected (16, 3, 3, 3)"])


def test_refused_saves_leave_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"old")
    model = tiny()
    calls = [
        (lambda: save_weights(model, file, preprocessing=DEFAULT_PREPROCESSING, variant="xs"), "is variant custom"),
        (lambda: save_weights(model, file, preprocessing=DEFAULT_PREPROCESSING, labels=["a"]), "1 labels, expected 4"),
    ]
    for call, fragment in calls:
        assert_says(message_of(call, WeightsError), [f"{file}: ", fragment])
    with torch.no_grad():
        model.classifier.bias[0] = 1e6
    call = lambda: save_weights(model, file, preprocessing=DEFAULT_PREPROCESSING, dtype=torch.float16)  # noqa: E731
    assert_says(
        message_of(call, WeightsError), ["classifier.bias has NaN or Inf as torch.float16", "nothing was written"]
    )
    assert file.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "folder").mkdir()
    call = lambda: save_weights(tiny(), tmp_path / "folder", preprocessing=DEFAULT_PREPROCESSING)  # noqa: E731
    assert_says(message_of(call, WeightsError), ["folder: cannot be written ("])
    assert {path.name for path in tmp_path.iterdir()} == {"w.safetensors", "folder"}  # no temporary file stays
    absent = tmp_path / "no" / "w.safetensors"
    call = lambda: save_weights(tiny(), absent, preprocessing=DEFAULT_PREPROCESSING)  # noqa: E731
    assert_says(message_of(call, WeightsError), [f"{absent}: cannot be written (No such file or directory)"])


def test_load_strict_changes_nothing_on_error(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 2)
    before = module.weight.detach().clone()
    rows = [
        ({"weight": torch.zeros(2, 4)}, "bias is missing, expected shape (2,)"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, "weight has shape (2, 3), expected (2, 4)"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2), "x": torch.zeros(1)}, "x (1,) is in the checkpoint"),
        ({"weight": torch.full((2, 4), torch.nan), "bias": torch.zeros(2)}, "weight has 8 NaN or Inf of 8 values"),
    ]
    for state, fragment in rows:
        torch.save(state, tmp_path / "w.pt")
        assert_says(
            message_of(lambda: load_into(module, read_checkpoint(tmp_path / "w.pt"), tmp_path / "w.pt"), WeightsError),
            ["w.pt: ", fragment],
        )
        assert torch.equal(module.weight, before)
