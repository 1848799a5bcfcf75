"""Folders that transformers writes: the network, its preprocessing and labels as transformers has them, or an error."""

from __future__ import annotations

import importlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, run_module
from hub_server import COMMIT, environment, repository, serve
from safetensors.torch import load_file, save_file
from tiny_hf import CLASSES, SETTINGS, SIDE, edit_config, make_network, save, save_processor

from mvit_export import export
from mvit_export.artifact import Manifest
from mvit_export.converters.manifest import draft_manifest
from mvit_export.data.preprocessing import UNSTATED, to_picture, to_tensor
from mvit_export.data.synthetic import open_photo
from mvit_export.errors import MvitExportError, UsageError, WeightsError
from mvit_export.families.load import load_model, rebuild_model
from mvit_export.families.transformers.config import MODEL_TYPES
from mvit_export.families.transformers.network import import_transformers, quiet
from mvit_export.formats.targets import plan_targets
from mvit_export.models.loaded import LoadedModel

NAMES = {0: "cat", 1: "dog", 2: "cup", 3: "hat", 4: "cat"}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it: `copy_of` makes one that may be changed."""
    return save(make_network("vit"), tmp_path_factory.mktemp("hf") / "tiny-vit")


@pytest.fixture
def copy_of(vit: Path, tmp_path: Path) -> Callable[..., Path]:
    """`copy_of(field=value)` -> the folder with changed fields in config.json."""

    def make(**changes: Any) -> Path:
        place = tmp_path / "tiny-vit"
        place.mkdir()
        for file in vit.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        edit_config(place, **changes)
        return place

    return make


def answer(network: Any, pictures: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = network(pixel_values=pictures).logits
    return logits


def same(model: LoadedModel, network: Any) -> bool:
    pictures = torch.rand(model.input_shapes[0], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = model.module(pictures), answer(network, pictures)
    return bool((found - expected).abs().max() <= 1e-6 * expected.abs().max())


def manifest_of(model: LoadedModel) -> Manifest:
    (target,) = plan_targets("onnx")
    return Manifest.from_json(json.loads(json.dumps(draft_manifest(model, target, {}).to_json())))


def test_every_known_network_is_tried() -> None:
    assert SETTINGS.keys() == MODEL_TYPES.keys()


@pytest.mark.parametrize("kind", SETTINGS)
def test_answers_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    network = make_network(kind)
    folder = save(network, tmp_path / f"my {kind}@1")
    model = load_model(weights=folder, image_size=64 if kind in ("hiera", "levit", "mobilevitv2") else SIDE)
    assert same(model, network)
    assert model.notes == ()
    info = model.info
    assert (info.name, info.task, info.num_classes, info.labels) == (
        f"my_{kind.replace('-', '_')}_1", "image-classification", CLASSES, None,
    )  # fmt: skip
    assert info.source.startswith(f"transformers:{type(network).__name__}:")
    assert info.params == sum(parameter.numel() for parameter in network.parameters())
    assert (model.weights.source, model.weights.family, model.weights.trained) == (str(folder), "hf", True)
    assert rebuild_model(manifest_of(model)).weights == model.weights


PROCESSORS: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": SIDE},
    "deit": {"feature_extractor_type": "DeiTFeatureExtractor", "size": 40, "crop_size": SIDE},
    "levit": {"image_processor_type": "LevitImageProcessor", "size": 64, "crop_size": 64},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": SIDE}},
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_picture_is_prepared_as_by_transformers(kind: str, tmp_path: Path) -> None:
    """The whole way: the folder's processor and network, against ours."""
    network = make_network(kind)
    save_processor(save(network, tmp_path), PROCESSORS[kind])
    with quiet():
        auto = importlib.import_module("transformers").AutoImageProcessor
        processor = auto.from_pretrained(tmp_path, backend="pil", local_files_only=True)
    expected = answer(network, processor(open_photo("coffee"), return_tensors="pt")["pixel_values"])
    assert our_answer(load_model(weights=tmp_path)) == pytest.approx(expected.numpy(), abs=1e-4)


def test_a_picture_is_prepared_as_by_timm(tmp_path: Path) -> None:
    cfg = {"input_size": [3, SIDE, SIDE], "crop_pct": 0.8, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    network = make_network("timm_wrapper", pretrained_cfg={**cfg, "interpolation": "bilinear"})
    save(network, tmp_path)
    module = importlib.import_module("transformers.models.timm_wrapper.image_processing_timm_wrapper")
    processor = module.TimmWrapperImageProcessor.from_pretrained(tmp_path)
    expected = answer(network, processor(open_photo("coffee"))["pixel_values"])
    model = load_model(weights=tmp_path)
    assert model.input_shapes == ((1, 3, SIDE, SIDE),)
    assert our_answer(model) == pytest.approx(expected.numpy(), abs=1e-4)


def our_answer(model: LoadedModel) -> Any:
    assert model.preprocessing
    picture = to_picture(open_photo("coffee"), model.preprocessing)
    with torch.no_grad():
        return model.module(torch.from_numpy(to_tensor(picture[None], model.preprocessing))).numpy()


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "by the weights"])
@pytest.mark.parametrize(
    "name",
    [
        "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher",
        "LevitForImageClassification", "LevitForImageClassificationWithTeacher",
    ],
)  # fmt: skip
def test_a_second_head_is_found(name: str, stated: bool, tmp_path: Path) -> None:
    """Its answer is the mean of both, as transformers has it."""
    kind = "deit" if name.startswith("DeiT") else "levit"
    network = make_network(kind, name)
    save(network, tmp_path)
    if not stated:
        edit_config(tmp_path, architectures=None)
    model = load_model(weights=tmp_path, image_size=SIDE if kind == "deit" else 64)
    assert model.info.source.split(":")[1] == name
    assert same(model, network)


def test_labels_are_those_of_the_folder(copy_of: Callable[..., Path]) -> None:
    model = load_model(weights=copy_of(id2label=NAMES))
    assert model.info.labels == ("cat", "dog", "cup", "hat", "cat (4)")


def test_labels_of_timm(tmp_path: Path) -> None:
    save(make_network("timm_wrapper"), tmp_path)
    edit_config(tmp_path, label_names=["a", "b", "c", "d", "e"])
    assert load_model(weights=tmp_path, image_size=SIDE).info.labels == ("a", "b", "c", "d", "e")


def test_without_a_processor_the_size_is_the_networks(vit: Path) -> None:
    model = load_model(weights=vit)
    assert model.preprocessing
    assert (model.preprocessing.crop, model.preprocessing.source) == ((SIDE, SIDE), UNSTATED)


@pytest.mark.parametrize("kind", ["shards", "pickle", "float16", "bfloat16", "no architectures"])
def test_ways_to_write_the_same_weights(kind: str, vit: Path, copy_of: Callable[..., Path]) -> None:
    folder, network = copy_of(), make_network("vit")
    state = load_file(folder / "model.safetensors")
    if kind == "shards":
        (folder / "model.safetensors").unlink()
        save(network, folder, max_shard_size="8KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    elif kind == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "no architectures":
        edit_config(folder, architectures=None)
    else:
        half = {name: tensor.to(getattr(torch, kind)) for name, tensor in state.items()}
        save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
        edit_config(folder, dtype=kind)
        network = network.to(getattr(torch, kind)).float()
    model = load_model(weights=folder)
    assert same(model, network)
    assert {tensor.dtype for tensor in model.module.state_dict().values()} == {torch.float32}
    assert rebuild_model(manifest_of(model)).weights == model.weights
    assert (load_model(weights=vit).weights.state_sha256 == model.weights.state_sha256) == ("float" not in kind)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another task": ({"model_type": "bert"}, 'model_type is "bert", expected one of mobilevit, beit, bit, convnext, '),
    "another head": (
        {"architectures": ["ViTForMaskedImageModeling"]},
        'architectures is ["ViTForMaskedImageModeling"], expected ViTForImageClassification',
    ),
    "code": ({"auto_map": {"AutoModel": "m.Model"}}, "auto_map, Python code that comes with the model, which is never"),
    "several labels": ({"problem_type": "multi_label_classification"}, "problem_type is multi_label_classification"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config, expected weights in float"),
    "grey": ({"num_channels": 1}, "num_channels is 1, expected 3"),
    "more classes": (
        {"id2label": None, "label2id": None, "num_labels": 7},
        "classifier.bias has shape (5,), expected (7,): config.json describes 7 classes",
    ),
    "more names": ({"id2label": {str(i): f"n{i}" for i in range(6)}}, "(5,), expected (6,): config.json describes 6"),
    "odd names": (
        {"id2label": {str(i + 1): f"n{i}" for i in range(5)}},
        "config.json names 5 classes in id2label, the classifier has 5: expected one name for each index from 0 to 4",
    ),
    "wider": ({"hidden_size": 32}, "classifier.weight has shape (5, 16), expected (5, 32)"),
    "deeper": ({"num_hidden_layers": 3}, "vit.layers.2."),
    "shallower": ({"num_hidden_layers": 1}, "is in the checkpoint, but a ViTForImageClassification has no such weight"),
    "no number": ({"hidden_size": "x"}, "config.json is not one of a vit"),
    "no heads": ({"num_attention_heads": 0}, "describes no ViTForImageClassification ("),
    "endless": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, the weights are 40 tensors in all"),
    "huge": ({"hidden_size": 2**20}, "weights, the checkpoint holds 7,941"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_one_line(name: str, copy_of: Callable[..., Path]) -> None:
    changes, message = REFUSED[name]
    folder = copy_of(**changes)
    with pytest.raises(WeightsError) as found:
        load_model(weights=folder)
    assert message in str(found.value)
    assert str(found.value).startswith(f"{folder}: ")
    assert "\n" not in str(found.value)


def test_weights_that_are_none(copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    state = load_file(folder / "model.safetensors")
    for value, message in ((torch.tensor(float("nan")), "has 1 NaN or Inf of 5"), (None, "classifier.bias is missing")):
        bias = state["classifier.bias"].clone()
        if value is not None:
            bias[0] = value
        changed = {**state, "classifier.bias": bias} if value is not None else {**state}
        if value is None:
            del changed["classifier.bias"]
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(WeightsError, match=message):
            load_model(weights=folder)


ODD = (None, "\x1b[2J\n::error::x", [[1], "x"], {"a": {"b": 1}}, -1, 10**30, float("nan"), True, 0, float("inf"), "")


@pytest.mark.parametrize("kind", ["swin", "timm_wrapper", "vit"])
def test_odd_settings_are_one_line(kind: str, tmp_path: Path) -> None:
    """Any field with any value: the network, or one line of error."""
    save(make_network(kind), tmp_path)
    save_processor(tmp_path, {"size": SIDE, "crop_size": SIDE, "do_center_crop": False, "rescale_factor": 1 / 255})
    refused = 0
    for file in ("config.json", "preprocessor_config.json"):
        sound = json.loads((tmp_path / file).read_text())
        for place, name in enumerate(sound):
            (tmp_path / file).write_text(json.dumps({**sound, name: ODD[place % len(ODD)]}))
            try:
                load_model(weights=tmp_path, image_size=SIDE)
            except MvitExportError as error:
                refused += 1
                assert str(error).isprintable(), name
        (tmp_path / file).write_text(json.dumps(sound))
    assert refused > 5


SHARDS: dict[str, tuple[Any, str]] = {
    "elsewhere": ({"a": "../model.safetensors"}, "names '../model.safetensors', expected files beside it"),
    "gone": ({"a": "model-1.safetensors"}, "no such file"),
    "no map": ([], "has no weight_map, expected the file of each tensor"),
    "nothing": ({}, "names 0 files, expected 1 to 1000"),
    "moved": ({"a": "part.safetensors", "b": "part.safetensors"}, "disagree on where b is"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_an_index_that_is_wrong(name: str, copy_of: Callable[..., Path]) -> None:
    where, message = SHARDS[name]
    folder = copy_of()
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.zeros(2)}, folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(WeightsError, match=message):
        load_model(weights=folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "hf-hub:owner/net"}, "architecture is 'hf-hub:owner/net', expected a model that timm has"),
        ({"architecture": "local-dir:/tmp"}, "architecture is 'local-dir:/tmp', expected a model that timm has"),
        ({"architecture": "no_such"}, "architecture is 'no_such', expected a model that timm has"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "model_args.checkpoint_path is"),
        ({"model_args": {"pretrained": True}}, "model_args.pretrained is true, expected none of that name"),
        ({"model_args": {"in_chans": 1}}, "model_args.in_chans is 1, expected 3"),
        ({"model_args": {"x": {"y": 1}}}, "model_args.x is"),
    ],
)
def test_what_timm_would_fetch_or_open(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(make_network("timm_wrapper"), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(WeightsError, match=message.replace("[", r"\[")):
        load_model(weights=tmp_path, image_size=SIDE)


def test_nothing_is_fetched(vit: Path, copy_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    named = {
        "_name_or_path": "owner/net",
        "_attn_implementation": "owner/kernel",
        "attn_implementation": "owner/kernel",
    }
    assert load_model(weights=copy_of(**named)).weights.state_sha256 == load_model(weights=vit).weights.state_sha256


def test_a_changed_description_is_not_rebuilt(copy_of: Callable[..., Path]) -> None:
    folder = copy_of(id2label=NAMES)
    manifest = manifest_of(load_model(weights=folder))
    edit_config(folder, id2label={str(index): f"other {index}" for index in NAMES}, transformers_version="5.0.0")
    assert rebuild_model(manifest).info.labels == manifest.model.labels  # what the file was exported with
    edit_config(folder, hidden_act="relu")
    with pytest.raises(WeightsError, match=r"the manifest says transformers:.*: it has changed since"):
        rebuild_model(manifest)


def test_mobilevit_keeps_its_own_family(tmp_path: Path) -> None:
    library = import_transformers()
    config = library.MobileViTConfig(
        hidden_sizes=[64, 80, 96], neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320], expand_ratio=2.0, num_labels=3
    )
    save(library.MobileViTForImageClassification(config), tmp_path)
    assert load_model(weights=tmp_path, image_size=32).info.source == "xxs"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "hf:owner/net", "pretrained": True}, "--model hf:owner/net brings its own weights; leave --pretrai"),
        ({"model": "hf:owner/net", "weights": "w.pt"}, "brings its own weights; leave --weights out"),
        ({"model": "transformers:ViTForImageClassification:0"}, "names a class alone; pass --weights FOLDER"),
        ({"num_classes": 7}, "the checkpoint has 5 classes, asked for 7"),
        ({"input_shape": (1, 3, 32, 32)}, "--input-shape belongs to --model; a checkpoint's own model takes"),
    ],
)
def test_what_does_not_go_together(asked: dict[str, Any], message: str, vit: Path) -> None:
    with pytest.raises(MvitExportError, match=message) as found:
        load_model(**({"weights": vit} if "model" not in asked else {}) | asked)
    assert isinstance(found.value, UsageError) or "num_classes" in asked


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "to"), [("pvt_v2", "all"), ("swin", "onnx"), ("deit", "onnx")])
def test_files_are_proven(kind: str, to: str, tmp_path: Path) -> None:
    save(make_network(kind), tmp_path / kind)
    results = export(load_model(weights=tmp_path / kind, image_size=SIDE), to=to, precision="fp32", out=tmp_path)
    assert [verdict.status for result in results for verdict in result.verdicts] == ["pass"] * (3 if to == "all" else 1)


@pytest.mark.slow
def test_an_artifact_finds_its_folder_again(cli: Callable[..., Finished], vit: Path, tmp_path: Path) -> None:
    made = cli("--to", "onnx", "--weights", vit, "--out", tmp_path, "--no-verify", "--json")
    assert made.json["model"] == "tiny_vit", made.err
    name = "tiny_vit/onnx-fp32"
    place = tmp_path / name
    assert cli("verify", place, "--json").json["status"] == "pass"
    again = cli("--to", "onnx", "--like", place, "--out", tmp_path / "again", "--no-verify")
    assert again.code == 0, again.err
    one, other = (json.loads((file / "manifest.json").read_text()) for file in (place, tmp_path / "again" / name))
    assert [one[part] for part in ("model", "weights", "preprocessing")] == [
        other[part] for part in ("model", "weights", "preprocessing")
    ]
    refused = cli("verify", place, env={"XDG_STATE_HOME": str(tmp_path / "another user")})
    assert (refused.code, "which you have not exported" in refused.err) == (2, True)


@pytest.mark.slow
def test_a_model_on_the_hub(vit: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in vit.iterdir()}
    content = repository()
    content.files[COMMIT] = files
    options = ("--to", "onnx", "--model", "hf:owner/net@v2", "--out", str(tmp_path), "--no-verify", "--json")
    content.revisions["v2"] = COMMIT
    with serve(content) as endpoint:
        done = run_module(*options, env=environment(endpoint, tmp_path / "cache"))
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "net/onnx-fp32/manifest.json").read_text())
    assert manifest["model"]["source"].startswith("transformers:ViTForImageClassification:")
    assert (manifest["weights"]["source"], manifest["weights"]["revision"]) == ("hf:owner/net@v2", COMMIT)
