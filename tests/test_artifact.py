"""The artifact directory: its record, its golden vectors, how it is found, and that damage is refused."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TARGETS

from mvit_export import __version__, verify
from mvit_export.artifact import (
    GOLDEN,
    Artifact,
    FileInfo,
    Manifest,
    ModelInfo,
    TensorSpec,
    WeightsInfo,
    find_artifacts,
    hash_files,
    load_golden,
    read_artifact,
    read_manifest,
    save_golden,
    write_json,
)
from mvit_export.data.preprocessing import Preprocessing
from mvit_export.errors import ArtifactError
from mvit_export.formats.targets import Target

MANIFEST = Manifest(
    model=ModelInfo("net", "xxs", "image-classification", 12, 34, variant="xxs", num_classes=3, labels=("a", "b", "ü")),
    weights=WeightsInfo("net.pt", "timm", "5" * 64, "6" * 64, True, None, revision="main"),
    preprocessing=Preprocessing("BGR", crop=(64, 48), mean=(0.1, 0.2, 0.3), source="tests"),
    inputs=(TensorSpec("image", (None, 3, 64, 48), "float32", "NCHW", ((1, 3, 64, 48), (1, 3, 32, 32))),),
    outputs=(TensorSpec("logits", (None, 3), "float32", "NC"),),
    format="onnx",
    precision="fp32",
    target=Target("onnx", "fp32", opset=18, dynamic_batch=True),
    capture="torch.export",
    files=(),
    tools={"mvit-export": "0.1.0"},
    created="2025-01-01T00:00:00+00:00",
)
CASES = {
    "photo-b": {"image": np.arange(6, dtype=np.uint8).reshape(1, 2, 3), "logits": np.array([[1.5, -2.0]], np.float32)},
    "noise-0": {"image": np.zeros((1, 2, 3), np.uint8), "logits": np.ones((1, 2), np.float32)},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A sound artifact directory whose model is a few bytes."""
    return make_artifact(tmp_path / "net" / "onnx-fp32")


def make_artifact(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "net.onnx").write_bytes(b"model")
    save_golden(folder / GOLDEN, CASES)
    seal(folder)
    return folder


def seal(folder: Path, **changes: Any) -> None:
    """Write a manifest that fits the files as they are."""
    (folder / "manifest.json").unlink(missing_ok=True)
    write_json(folder / "manifest.json", {**MANIFEST.to_json(), "files": files_json(folder), **changes})


def files_json(folder: Path) -> list[dict[str, Any]]:
    return [{"path": info.path, "sha256": info.sha256, "bytes": info.bytes} for info in hash_files(folder)]


# The record


def test_manifest_round_trip() -> None:
    text = json.dumps(MANIFEST.to_json(), allow_nan=False)
    assert Manifest.from_json(json.loads(text)) == MANIFEST
    assert list(MANIFEST.to_json())[0] == "schema_version"  # noqa: RUF015 (readers look there first)


def test_manifest_without_optional_parts_round_trips() -> None:
    bare = Manifest(**{**vars(MANIFEST), "preprocessing": None, "model": ModelInfo("net", "f.py:net", "other", 1, 1)})
    assert Manifest.from_json(json.loads(json.dumps(bare.to_json()))) == bare


def test_fields_of_a_newer_minor_version_are_ignored(place: Path) -> None:
    data = json.loads((place / "manifest.json").read_text())
    data["colour"] = data["model"]["colour"] = data["files"][0]["colour"] = "blue"
    write_json(place / "manifest.json", data)
    assert read_manifest(place).model == MANIFEST.model


def test_sound_artifact_is_read(place: Path) -> None:
    artifact = read_artifact(place)
    assert artifact.path == place
    assert artifact.model_path == place / "net.onnx"
    assert artifact.model_bytes == len(b"model"), "the golden vectors are no part of the model"
    assert artifact.manifest.files == tuple(
        FileInfo(name, hashlib.sha256((place / name).read_bytes()).hexdigest(), (place / name).stat().st_size)
        for name in (GOLDEN, "net.onnx")
    )


def test_results_beside_the_model_are_no_damage(place: Path) -> None:
    write_json(place / "parity.json", {"status": "pass"})
    read_artifact(place)


# Finding


def test_directory_and_files_inside_are_found(place: Path) -> None:
    for path in (place, str(place), place / "net.onnx", place / "manifest.json"):
        assert find_artifacts(path) == (place,)


def test_model_that_is_a_directory_is_found(tmp_path: Path) -> None:
    place = make_artifact(tmp_path / "x")
    (place / "net.mlpackage" / "Data").mkdir(parents=True)
    assert find_artifacts(place / "net.mlpackage") == (place,)


def test_model_directory_is_no_artifact_where_case_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On macOS `manifest.json` also finds the `Manifest.json` that every .mlpackage holds."""
    place = make_artifact(tmp_path / "x")
    package = place / "net.mlpackage"
    package.mkdir()
    (package / "Manifest.json").write_text("{}")

    def is_file(path: Path) -> bool:
        return path.parent.is_dir() and path.name.lower() in {name.lower() for name in os.listdir(path.parent)}

    monkeypatch.setattr(Path, "is_file", is_file)
    assert find_artifacts(package) == (place,)


def test_directory_of_artifacts_at_any_depth_in_order(tmp_path: Path) -> None:
    places = [make_artifact(tmp_path / name) for name in ("s/onnx", "s/tflite", "xxs/coreml")]
    make_artifact(tmp_path / "s" / "onnx" / "inner")  # part of an artifact, whatever it is
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert find_artifacts(tmp_path) == tuple(places)


def test_hidden_directories_are_no_artifacts(place: Path) -> None:
    make_artifact(place.parent / ".onnx-fp16.mvit-export.partial")
    make_artifact(place.parent / ".onnx-fp16.mvit-export.partial.old")
    assert find_artifacts(place.parent) == (place,)


def test_relative_paths(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert find_artifacts(".") == (Path("."),)
    assert find_artifacts("net.onnx") == (Path("."),)
    monkeypatch.chdir(place.parent)
    assert find_artifacts(".") == (Path("onnx-fp32"),)


def test_nothing_found_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "typo"
    with pytest.raises(ArtifactError) as error:
        find_artifacts(missing)
    assert str(error.value) == f"{missing} does not exist, expected an artifact directory; mvit-export --to … makes one"
    for path in (tmp_path, tmp_path / "photo.jpg"):
        (tmp_path / "photo.jpg").write_bytes(b"")
        with pytest.raises(ArtifactError) as error:
            find_artifacts(path)
        assert str(error.value) == (
            f"{path} holds no manifest.json, expected an artifact directory or a directory of them"
        )


def test_only_leftovers_are_nothing(tmp_path: Path) -> None:
    make_artifact(tmp_path / ".onnx-fp32.mvit-export.partial")
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        find_artifacts(tmp_path)


def test_name_too_long_for_the_system_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        find_artifacts(tmp_path / ("n" * 300))


# Damage


def flip_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def edit(field: str, value: Any) -> Callable[[Path], None]:
    """A change of one field of the manifest; None deletes it."""

    def change(place: Path) -> None:
        data = json.loads((place / "manifest.json").read_text())
        if value is None:
            del data[field]
        else:
            data[field] = value
        write_json(place / "manifest.json", data)

    return change


def rewrite(text: str) -> Callable[[Path], None]:
    return lambda place: (place / "manifest.json").write_text(text) and None


def list_outside(place: Path) -> None:
    (place.parent / "secret").write_bytes(b"model")
    info = {"path": "../secret", "sha256": hashlib.sha256(b"model").hexdigest(), "bytes": 5}
    edit("files", [*files_json_of(place), info])(place)


def list_absolute(place: Path) -> None:
    (place.parent / "secret").write_bytes(b"model")
    info = {"path": str(place.parent / "secret"), "sha256": hashlib.sha256(b"model").hexdigest(), "bytes": 5}
    edit("files", [*files_json_of(place), info])(place)


def files_json_of(place: Path) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = json.loads((place / "manifest.json").read_text())["files"]
    return files


def name_model_outside(place: Path) -> None:
    """The model would be a file that no hash covers."""
    (place.parent / "other.onnx").write_bytes(b"other")
    edit("model", {**MANIFEST.to_json()["model"], "name": "../other"})(place)


def list_no_model(place: Path) -> None:
    edit("files", [info for info in files_json_of(place) if info["path"] == GOLDEN])(place)


def edit_in(part: str, **fields: Any) -> Callable[[Path], None]:
    """Change fields of an object, or of the first one in a list."""

    def apply(place: Path) -> None:
        data = json.loads((place / "manifest.json").read_text())
        inner = data[part][0] if isinstance(data[part], list) else data[part]
        inner.update(fields)
        (place / "manifest.json").write_text(json.dumps(data))

    return apply


WRONG: list[tuple[str, str, Any, str]] = [
    ("model", "params", {}, "model.params is an object, expected a whole number"),
    ("model", "params", True, "model.params is true or false, expected a whole number"),
    ("model", "macs", 1e99, "model.macs is a number, expected a whole number"),
    ("model", "macs", 10**30, "model.macs is out of range"),
    ("model", "patch_config", 5, "model.patch_config is a whole number, expected text"),
    ("model", "labels", "abc", "model.labels is text, expected a list"),
    ("model", "labels", [1], "model.labels[0] is a whole number, expected text"),
    ("weights", "seed", "x", "weights.seed is text, expected a whole number"),
    ("weights", "trained", "no", "weights.trained is text, expected true or false"),
    ("inputs", "shape", [1, 3, 1.5, 8], "inputs[0].shape[2] is a number, expected a whole number"),
    ("inputs", "shape", [1, 3, 40000, 40000], "image has the shape (1, 3, 40000, 40000), expected at most"),
    ("inputs", "shape", [100000, 3, 32, 32], "image has the shape (100000, 3, 32, 32), expected at most"),
    ("inputs", "enumerated", [[1, 3, 8, 8]] * 20000, "image has 20000 shapes, expected at most 128"),
    ("inputs", "enumerated", [[1, 3, 8]], "image has the shape (1, 3, 8) beside (None, 3, 64, 48)"),
    ("preprocessing", "resize_ratio", 1e9, "the resize ratio is 1000000000.0, expected 0.1 to 10"),
    ("preprocessing", "resize_ratio", 0, "the resize ratio is 0, expected 0.1 to 10"),
    ("preprocessing", "mean", ["x", "y", "z"], "preprocessing.mean[0] is text, expected a number"),
    ("preprocessing", "std", [0, 1, 1], "mean and std are"),
    ("preprocessing", "crop", [8], "preprocessing.crop has 1 entries, expected 2"),
    ("preprocessing", "crop", [0, 10**6], "the crop is (0, 1000000), expected sides of 1 to 16384"),
    ("tools", "torch", 5, "tools.torch is a whole number, expected text"),
    ("target", "opset", "18", "target.opset is text, expected a whole number"),
    ("files", "bytes", None, "files[0].bytes is null, expected a whole number"),
]


DAMAGES = [
    (lambda p: flip_byte(p / "net.onnx"), "net.onnx", "was changed after the export: sha256 is "),
    (lambda p: flip_byte(p / GOLDEN), GOLDEN, "was changed after the export: sha256 is "),
    (lambda p: (p / "net.onnx").write_bytes(b""), "net.onnx", "was changed after the export: sha256 is "),
    (lambda p: (p / "net.onnx").unlink(), "net.onnx", "is missing but listed in manifest.json"),
    (lambda p: (p / GOLDEN).unlink(), GOLDEN, "is missing but listed in manifest.json"),
    (list_outside, "manifest.json", "lists '../secret', which lies outside the artifact"),
    (list_absolute, "manifest.json", "lists '/"),
    (name_model_outside, "manifest.json", "is not a valid manifest (name '../other')"),
    (list_no_model, "manifest.json", "lists no net.onnx"),
    (rewrite(""), "manifest.json", "cannot be read (Expecting value"),
    (rewrite("<html>"), "manifest.json", "cannot be read (Expecting value"),
    (rewrite('{"schema_version": 1,'), "manifest.json", "cannot be read ("),
    (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe{}"), "manifest.json", "cannot be read ("),
    (rewrite("[]"), "manifest.json", "has schema_version None, expected 1"),
    (rewrite("{}"), "manifest.json", "has schema_version None, expected 1"),
    (edit("schema_version", 2), "manifest.json", "has schema_version 2, expected 1; export again, or update"),
    (edit("files", None), "manifest.json", "is not a valid manifest (files is missing)"),
    (edit("model", "xxs"), "manifest.json", "is not a valid manifest (model is text, expected an object)"),
    (edit("model", {"name": "net"}), "manifest.json", "is not a valid manifest (model.source is missing)"),
    (edit("inputs", 5), "manifest.json", "is not a valid manifest (inputs is a whole number, expected a list)"),
    (edit("inputs", []), "manifest.json", "is not a valid manifest ("),
    (edit("files", [{"path": 5, "sha256": "", "bytes": 0}]), "manifest.json", "is not a valid manifest ("),
    (edit("format", "tensorrt"), "manifest.json", "is not a valid manifest (format 'tensorrt')"),
    (edit("precision", "fp7"), "manifest.json", "is not a valid manifest ("),
    (edit("preprocessing", {"channel_order": "GBR"}), "manifest.json", "is not a valid manifest ("),
    *[
        (edit_in(part, **{name: value}), "manifest.json", f"is not a valid manifest ({said}")
        for part, name, value, said in WRONG
    ],
]


@pytest.mark.parametrize(("damage", "file", "message"), DAMAGES)
def test_damage_is_one_line_that_names_the_file(
    place: Path, damage: Callable[[Path], None], file: str, message: str
) -> None:
    damage(place)
    with pytest.raises(ArtifactError) as error:
        read_artifact(place)
    text = str(error.value)
    assert text.startswith(f"{place / file} {message}")
    assert "export again" in text
    assert "\n" not in text


def test_change_message_shows_both_hashes(place: Path) -> None:
    (place / "net.onnx").write_bytes(b"changed")
    with pytest.raises(ArtifactError) as error:
        read_artifact(place)
    expected, found = (hashlib.sha256(data).hexdigest()[:12] for data in (b"model", b"changed"))
    assert str(error.value) == (
        f"{place / 'net.onnx'} was changed after the export: sha256 is {found}…, manifest.json says {expected}…; "
        "export again with --overwrite"
    )


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_commands_refuse_a_changed_file(
    place: Path,
    cli,
    command: str,  # type: ignore[no-untyped-def]
) -> None:
    flip_byte(place / "net.onnx")
    done = cli(command, place)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"mvit-export: error: {place / 'net.onnx'} was changed after the export")
    assert done.err.count("\n") == 1
    assert not (place / "parity.json").exists()


# Golden vectors


def test_golden_round_trip_keeps_order_and_bits(place: Path) -> None:
    found = load_golden(read_artifact(place))
    assert list(found) == ["photo-b", "noise-0"], "in the order of saving, not of the alphabet"
    for case, tensors in CASES.items():
        assert set(found[case]) == {"image", "logits"}
        for name, array in tensors.items():
            assert found[case][name].dtype == array.dtype
            np.testing.assert_array_equal(found[case][name], array)


def test_golden_takes_arrays_that_are_views(tmp_path: Path) -> None:
    """A channel flip or a transpose gives strides that a plain dump of the buffer would ignore."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    views = {"image": array.T, "logits": array[:, ::-1], "step": array[::2]}
    save_golden(tmp_path / GOLDEN, {"case": views})
    found = load_golden(Artifact(tmp_path, MANIFEST))["case"]
    for name, view in views.items():
        np.testing.assert_array_equal(found[name], view)


def no_golden_metadata(file: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, file)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"<html>" * 100),
        lambda file: file.write_bytes(file.read_bytes()[:-4]),
        lambda file: file.unlink(),
        no_golden_metadata,
    ],
)
def test_unreadable_golden_is_one_line(place: Path, spoil: Callable[[Path], None]) -> None:
    spoil(place / GOLDEN)
    with pytest.raises(ArtifactError, match="cannot be read") as error:
        load_golden(Artifact(place, MANIFEST))
    assert str(error.value).startswith(str(place / GOLDEN))
    assert "\n" not in str(error.value)


# Writing


def test_write_json_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "parity.json"
    write_json(file, {"status": "päss"})
    assert file.read_text(encoding="utf-8") == '{\n  "status": "päss"\n}\n'
    for data, error in (({"a": 1, "b": object()}, TypeError), ({"a": 1, "b": float("nan")}, ValueError)):
        with pytest.raises(error):
            write_json(file, data)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ArtifactError) as caught:
        write_json(file, {"status": "fail"})
    assert str(caught.value) == f"{file} cannot be written: No space left on device"
    assert json.loads(file.read_text(encoding="utf-8")) == {"status": "päss"}
    assert os.listdir(tmp_path) == ["parity.json"]


def test_write_json_never_changes_a_file_that_is_being_read(tmp_path: Path) -> None:
    file = tmp_path / "parity.json"
    write_json(file, {"status": "pass"})
    with file.open() as reader:
        write_json(file, {"status": "fail"})
        assert json.load(reader) == {"status": "pass"}
    assert json.loads(file.read_text()) == {"status": "fail"}


def test_write_json_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be written: No such file or directory"):
        write_json(tmp_path / "gone" / "parity.json", {})


# Real exports


@pytest.mark.parametrize(
    ("fmt", "precision"), [pytest.param(*t, marks=pytest.mark.slow if t[0] == "tflite" else ()) for t in TARGETS]
)
def test_manifest_of_a_real_export(tiny_artifact: Callable[..., Path], fmt: str, precision: str) -> None:
    place = tiny_artifact(fmt, precision)
    suffix = {"coreml": "mlpackage", "onnx": "onnx", "tflite": "tflite"}[fmt]
    assert sorted(path.name for path in place.iterdir() if path.name != "parity.json") == [
        GOLDEN, "manifest.json", f"tiny.{suffix}",
    ]  # fmt: skip
    data = json.loads((place / "manifest.json").read_text())
    assert data["schema_version"] == 1
    assert data["model"].items() >= {"name": "tiny", "num_classes": 10, "task": "image-classification"}.items()
    assert data["model"]["params"] > 0
    assert data["model"]["macs"] > 0
    assert "variant" in data["model"]
    assert set(data["weights"]) >= {"source", "family", "sha256", "trained", "seed"}
    assert data["preprocessing"]["channel_order"] == "BGR"
    assert data["inputs"] == [
        {"name": "image", "shape": [1, 3, 64, 64], "dtype": "float32", "layout": "NCHW", "enumerated": []}
    ]
    assert data["outputs"] == [
        {"name": "logits", "shape": [1, 10], "dtype": "float32", "layout": "NC", "enumerated": []}
    ]
    assert (data["format"], data["precision"]) == (fmt, precision)
    assert data["target"].items() >= {"format": fmt, "precision": precision, "input": "tensor"}.items()
    tool = {"coreml": "coremltools", "onnx": "onnx", "tflite": "litert-torch"}[fmt]
    expected = {"mvit-export": __version__, "python": platform.python_version(), tool: version(tool)}
    assert data["tools"].items() >= {**expected, "torch": version("torch")}.items()
    assert datetime.fromisoformat(data["created"]).tzinfo is not None
    hashed = {
        str(path.relative_to(place)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
        for path in place.rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "parity.json")
    }
    assert {info["path"]: (info["sha256"], info["bytes"]) for info in data["files"]} == hashed
    golden = load_golden(read_artifact(place))
    assert len(golden) >= 3
    for tensors in golden.values():
        assert {name: (array.shape, str(array.dtype)) for name, array in tensors.items()} == {
            "image": ((1, 3, 64, 64), "float32"), "logits": ((1, 10), "float32"),
        }  # fmt: skip


def copied(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place, tmp_path / "copy"))


def reseal(place: Path) -> None:
    """Fix the manifest's hashes after a change, as someone who wants to hide it would."""
    data = json.loads((place / "manifest.json").read_text())
    for info in data["files"]:
        content = (place / info["path"]).read_bytes()
        info.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    write_json(place / "manifest.json", data)


def test_golden_without_cases_proves_nothing(tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    place = copied(tiny_artifact("onnx"), tmp_path)
    save_golden(place / GOLDEN, {})
    reseal(place)
    with pytest.raises(ArtifactError) as error:
        verify(place, against="golden")
    assert str(error.value) == f"{place / GOLDEN} holds no cases; export again with --overwrite"


@pytest.mark.parametrize("name", ["image", "logits"])
def test_golden_case_that_lacks_a_tensor_is_one_line(
    tiny_artifact: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    place = copied(tiny_artifact("onnx"), tmp_path)
    cases = load_golden(read_artifact(place))
    del cases["noise-0"][name]
    save_golden(place / GOLDEN, cases)
    reseal(place)
    with pytest.raises(ArtifactError) as error:
        verify(place, against="golden")
    assert str(error.value) == f"{place / GOLDEN}: case 'noise-0' has no tensor {name!r}; export again with --overwrite"


def test_altered_golden_outputs_fail(tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    place = copied(tiny_artifact("onnx"), tmp_path)
    (sound,) = verify(place, against="golden")
    assert sound.status == "pass"
    cases = load_golden(read_artifact(place))
    cases["gradient"]["logits"] = cases["gradient"]["logits"] + np.float32(0.01)
    save_golden(place / GOLDEN, cases)
    reseal(place)
    (altered,) = verify(place, against="golden")
    assert altered.status == "fail"
    assert json.loads((place / "parity.json").read_text())["status"] == "fail"
