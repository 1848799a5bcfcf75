"""`mvit-export eval`: the figures against values worked out by hand, real digits through the command line, bad data."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, TINY, rehash
from PIL import Image
from tiny import tiny

from mvit_export import evaluate, export, load_model
from mvit_export.artifact import MANIFEST, read_artifact, write_json
from mvit_export.checks.accuracy import judge
from mvit_export.data.pictures import ArrayPictures, Labelled, open_labelled
from mvit_export.data.preprocessing import to_picture, to_tensor
from mvit_export.errors import DeviceError, MissingDependencyError, RuntimeUnavailable, UsageError
from mvit_export.readers import onnx as onnx_files
from mvit_export.readers import tflite as tflite_reader
from mvit_export.readers.session import Session
from mvit_export.results.accuracy import ArtifactAccuracy
from mvit_export.system.processes import spread_over
from mvit_export.tasks import class_scores
from mvit_export.tasks.class_scoring import find_outputs

Copy = Callable[..., Path]
Cli = Callable[..., Any]


# The figures


def test_calibration_error_by_hand() -> None:
    """Bins of a fifteenth: 0.95 and 0.99 share the last one (2 of 2 right), 0.55 (wrong) and 0.58 (right) the ninth."""
    confidence = np.array([0.95, 0.99, 0.55, 0.58])
    right = np.array([True, True, False, True])
    expected = (2 * (1 - 0.97) + 2 * abs(0.5 - 0.565)) / 4
    assert class_scores.calibration_error(confidence, right) == pytest.approx(expected)
    assert class_scores.calibration_error(np.array([0.6, 1.0]), np.array([True, True])) == pytest.approx(0.2)


def test_an_edge_belongs_to_the_bin_below() -> None:
    """0.2 is the upper edge of the third of fifteen bins, as in the paper; 0.21 is in the fourth: they do not mix."""
    error = class_scores.calibration_error(np.array([0.2, 0.21]), np.array([True, False]))
    assert error == pytest.approx((0.8 + 0.21) / 2)


def test_scores_by_hand() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    output = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
    scores = class_scores.score(output, np.array([0, 1]), reference)
    assert scores["predicted"].tolist() == [1, 1]
    assert scores["agrees"].tolist() == [False, True]
    assert scores["kl"] == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2), 0], abs=1e-12)
    assert scores["delta_p"] == pytest.approx([0.25, 0])
    assert scores["confidence"] == pytest.approx([0.5, 0.8])
    assert class_scores.accuracy(scores)["top1"] == 0.5
    assert class_scores.comparison(scores) == pytest.approx(
        {"agreement": 0.5, "mean_kl": 0.125 * math.log(2), "mean_delta_p": 0.125, "max_delta_p": 0.25}
    )


def test_top5_is_the_five_highest() -> None:
    logits = np.arange(7.0)[None].repeat(3, axis=0)
    scores = class_scores.score(logits, np.array([6, 2, 1]))
    assert scores["top5"].tolist() == [True, True, False]


def test_scores_that_are_not_finite_are_wrong_and_not_compared() -> None:
    logits = np.array([[np.nan, 1.0], [0.0, np.inf], [0.0, 2.0]])
    scores = class_scores.score(logits, np.array([1, 1, 1]), np.array([[0.0, 2.0]] * 3))
    assert class_scores.accuracy(scores)["top1"] == pytest.approx(1 / 3)
    assert class_scores.comparison(scores) == {
        "agreement": 1 / 3,
        "mean_kl": 0.0,
        "mean_delta_p": 0.0,
        "max_delta_p": 0.0,
    }
    nothing = class_scores.comparison(scores[:2])
    assert nothing == {"agreement": 0.0, "mean_kl": None, "mean_delta_p": None, "max_delta_p": None}


def outcomes(lost: int, gained: int, both: int) -> tuple[np.ndarray, np.ndarray]:
    reference = np.zeros(lost + gained + both, class_scores.SCORES)
    scores = reference.copy()
    scores["predicted"][:lost] = 1
    reference["predicted"][lost : lost + gained] = 1
    return reference, scores


def test_drop_and_its_interval_by_hand() -> None:
    """Agresti and Min: 8 lost and 3 gained of 100 become 8.5 and 3.5 of 102."""
    drop, (low, high) = class_scores.paired_drop(*outcomes(8, 3, 89))
    spread = 1.959964 * math.sqrt(12 / 102 - (5 / 102) ** 2) / math.sqrt(102)
    assert drop == pytest.approx(5.0)
    assert (low, high) == pytest.approx((100 * (5 / 102 - spread), 100 * (5 / 102 + spread)))


def test_no_difference_among_few_pictures_proves_little() -> None:
    drop, (low, high) = class_scores.paired_drop(*outcomes(0, 0, 20))
    assert drop == 0 and low < -5 and high > 5
    drop, (low, high) = class_scores.paired_drop(*outcomes(0, 0, 20_000))
    assert -0.02 < low < 0 < high < 0.02


def test_the_gate_goes_by_the_measured_drop() -> None:
    row = ArtifactAccuracy(
        path="a", model="tiny", format="onnx", precision="fp32", reference="PyTorch", images=300,
        drop_points=1.2, drop_interval=(0.1, 2.3),
    )  # fmt: skip
    failed = judge(row, 1.0).gate
    assert failed and failed.status == "fail"
    assert failed.reason == (
        "1.20 points of top-1 lost [0.10, 2.30], at most 1 allowed; the interval contains the limit: "
        "more than 300 pictures are needed to tell"
    )
    passed = judge(row, 1.2).gate
    assert passed and passed.status == "pass"


def test_classes_and_confusions_are_counted() -> None:
    scores = np.zeros(5, class_scores.SCORES)
    scores["label"], scores["predicted"] = [0, 0, 0, 2, 2], [0, 2, 2, 2, -1]
    assert class_scores.per_class(scores, {0: "cat"}) == [
        {"class": "cat", "index": 0, "count": 3, "top1": pytest.approx(1 / 3)},
        {"class": "2", "index": 2, "count": 2, "top1": 0.5},
    ]
    assert class_scores.most_confused(scores, {0: "cat"}) == [{"class": "cat", "taken_for": "2", "count": 2}]


# Digits through the command line


def digits() -> tuple[np.ndarray, np.ndarray]:
    """100 of scikit-learn's handwritten digits, uint8 (100, 64, 64, 3), and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.kron(data.images[:100] * 15.9375, np.ones((8, 8))).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3), data.target[:100].astype(np.int64)


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    images, labels = digits()
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as PNGs in one folder a class."""
    place = tmp_path_factory.mktemp("folder")
    for index, (image, label) in enumerate(zip(*digits(), strict=True)):
        (place / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(place / str(label) / f"{index:03}.png")
    return place


@pytest.fixture(scope="module")
def artifacts(tiny_artifact: Copy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("eval")
    for kind in (("onnx", "fp32"), ("tflite", "fp32"), ("coreml", "fp16")):
        shutil.copytree(tiny_artifact(*kind), place / "-".join(kind))
    return place


@pytest.fixture(scope="module")
def done(cli: Cli, artifacts: Path, npz: Path) -> Any:
    return cli("eval", artifacts, "--data", npz, "--json", "--jobs", "2")


def test_all_formats_are_scored_like_pytorch(done: Any, npz: Path, tiny_model: Any) -> None:
    assert done.code == 0, done.err
    images, labels = digits()
    with torch.no_grad():
        logits = tiny_model.module(torch.from_numpy(to_tensor(images, tiny_model.preprocessing))).numpy()
    right = float((logits.argmax(1) == labels).mean())
    (reference,) = done.json["references"]
    assert reference["name"] == "PyTorch tiny 64x64"
    assert reference["top1"] == right
    assert [row["format"] for row in done.json["results"]] == ["coreml", "onnx", "tflite"]
    for row in done.json["results"]:
        assert row["status"] == "measured" and row["images"] == 100
        assert row["top1"] == pytest.approx(right, abs=0.02)
        assert row["agreement"] >= 0.98 and row["mean_kl"] < 1e-4
        assert row["mean_delta_p"] <= row["max_delta_p"] < 1e-2
        assert sum(item["count"] for item in row["per_class"]) == 100
        assert sum(item["count"] * item["top1"] for item in row["per_class"]) == pytest.approx(100 * row["top1"])
        assert row["images_per_s"] > 0
        assert row["gate"] is None
        assert any("untrained" in warning for warning in row["warnings"]) is False, "a factory may load anything"


def test_accuracy_is_kept_in_the_artifact(done: Any, artifacts: Path) -> None:
    stored = json.loads((artifacts / "tflite-fp32/accuracy.json").read_text())
    assert stored["status"] == "pass"
    assert stored["results"] == [row for row in done.json["results"] if row["format"] == "tflite"]
    assert stored["environment"] == done.json["environment"]
    assert stored["environment"]["data"]["images"] == 100


def test_one_process_and_several_give_the_same(done: Any, artifacts: Path, npz: Path) -> None:
    again = evaluate(artifacts, data=npz)
    for one, other in zip(again["results"], done.json["results"], strict=True):
        for name in ("top1", "top5", "ece", "agreement", "per_class", "most_confused"):
            assert one[name] == other[name]
    assert again["environment"]["data"]["sha256"] == done.json["environment"]["data"]["sha256"]


def test_files_are_resized_and_cropped_as_the_checkpoint_wants(
    artifacts: Path, folder: Path, tmp_path: Path, tiny_model: Any
) -> None:
    found = evaluate(artifacts / "onnx-fp32", data=folder)
    data = open_labelled(folder)
    pictures = [to_picture(Image.open(file), tiny_model.preprocessing) for file in data.pictures.files]
    write_npz(tmp_path / "cropped.npz", images=np.stack(pictures), labels=data.labels)
    cropped = evaluate(artifacts / "onnx-fp32", data=tmp_path / "cropped.npz")
    for name in ("top1", "ece", "mean_kl", "per_class"):
        assert found["results"][0][name] == cropped["results"][0][name]
    assert found["environment"]["data"]["classes"] == 10


def test_the_hash_tells_other_pictures_and_other_labels(artifacts: Path, tmp_path: Path) -> None:
    images, labels = digits()
    other = images.copy()
    other[3, 5, 5, 0] ^= 1
    found = set()
    for name, pictures, classes in (("a", images, labels), ("b", other, labels), ("c", images, labels[::-1])):
        np.savez(tmp_path / f"{name}.npz", images=pictures[:20], labels=classes[:20])
        report = evaluate(artifacts / "onnx-fp32", data=tmp_path / f"{name}.npz")
        found.add(report["environment"]["data"]["sha256"])
    assert len(found) == 3


def test_limit_takes_pictures_of_every_class(artifacts: Path, folder: Path) -> None:
    found = evaluate(artifacts / "onnx-fp32", data=folder, limit=20)
    assert found["environment"]["data"]["images"] == 20
    assert found["environment"]["data"]["of"] == 100
    assert len(found["results"][0]["per_class"]) == 10


def test_a_reference_of_the_user_s_own(artifacts: Path, npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No PyTorch model is rebuilt then: a device without torch can do it."""
    monkeypatch.setattr("mvit_export.families.load.rebuild_model", None)
    found = evaluate(artifacts / "onnx-fp32", data=npz, reference=artifacts / "tflite-fp32", limit=20)
    assert found["references"][0]["name"].endswith("tflite-fp32")
    assert found["results"][0]["agreement"] == 1.0


@pytest.mark.parametrize("input", ["tensor", "image"])
def test_pictures_go_in_as_the_file_takes_them(tiny_artifact: Copy, npz: Path, tmp_path: Path, input: str) -> None:
    place = Path(shutil.copytree(tiny_artifact("onnx", "fp32", input), tmp_path / input))
    (row,) = evaluate(place, data=npz, limit=20)["results"]
    assert row["agreement"] == 1.0 and row["max_delta_p"] < 1e-4


@pytest.mark.slow
def test_a_batch_is_filled_and_the_filling_not_counted(tmp_path: Path, npz: Path) -> None:
    model = load_model(model=TINY, input_shape=(3, 3, 64, 64))
    (result,) = export(model, to="onnx", out=tmp_path, verify=False)
    (row,) = evaluate(result.artifact.path, data=npz, limit=20)["results"]
    assert row["images"] == 20 and row["agreement"] == 1.0


def test_people_read_the_figures(cli: Cli, artifacts: Path, npz: Path) -> None:
    found = cli("eval", artifacts / "onnx-fp32", "--data", npz, "--limit", "20", "--max-drop", "0")
    assert found.code == 0, found.err
    for text in ("20 of 100 pictures", "PyTorch tiny 64x64  the reference", "top-1", "ECE", "mean KL", "not a latency"):
        assert text in found.out
    assert "PASS 0.00 points of top-1 lost [-8." in found.out


# What is wrong with an artifact


def shift_classes(place: Path) -> None:
    """Give every class of the tiny network its neighbour's weights, in the fp32 file itself."""
    weight = tiny().classifier.weight.detach().numpy()
    (file,) = place.glob("tiny.*")
    content = file.read_bytes()
    assert content.count(weight.tobytes()) == 1
    file.write_bytes(content.replace(weight.tobytes(), np.roll(weight, 1, axis=0).tobytes()))
    rehash(place)


def test_a_damaged_file_fails_the_gate_and_is_flagged(cli: Cli, copy: Copy, npz: Path, tiny_model: Any) -> None:
    place = copy("onnx", "fp32")
    shift_classes(place)
    images, _ = digits()
    with torch.no_grad():
        answers = tiny_model.module(torch.from_numpy(to_tensor(images, tiny_model.preprocessing))).argmax(1).numpy()
    data = write_npz(npz.with_name("answers.npz"), images=images, labels=answers)
    found = cli("eval", place, "--data", data, "--max-drop", "1", "--json")
    (row,) = found.json["results"]
    assert (row["gate"]["status"], found.json["status"], found.code) == ("fail", "fail", 1)
    assert found.json["references"][0]["top1"] == 1.0
    assert row["drop_points"] == pytest.approx(100 * (1 - row["agreement"])) and row["drop_points"] > 50
    assert any("confidence has moved away from the reference: mean KL" in text for text in row["warnings"])
    assert json.loads((place / "accuracy.json").read_text())["status"] == "fail"
    assert "**FAIL** " in cli("report", place, "--format", "markdown").out


def test_a_runtime_that_is_missing_is_not_run(
    copy: Copy, npz: Path, monkeypatch: pytest.MonkeyPatch, artifacts: Path
) -> None:
    def absent(artifact: Any) -> Any:
        raise RuntimeUnavailable("no TFLite runtime is installed")

    monkeypatch.setattr(tflite_reader, "open_tflite", absent)
    found = evaluate([artifacts / "onnx-fp32", copy("tflite", "fp32")], data=npz, limit=20, max_drop=5)
    onnx, tflite = found["results"]
    assert (onnx["status"], tflite["status"], found["status"]) == ("measured", "not-run", "not-run")
    assert tflite["reason"] == "no TFLite runtime is installed" and tflite["top1"] is None


def test_without_the_reference_nothing_is_claimed(copy: Copy, npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise MissingDependencyError("torch is not installed")

    monkeypatch.setattr("mvit_export.families.load.rebuild_model", absent)
    found = evaluate(copy("onnx", "fp32"), data=npz, limit=20)
    assert found["status"] == "not-run"
    assert found["results"][0]["reason"] == (
        "there is no reference to compare with: torch is not installed; choose another with --reference ARTIFACT"
    )


def test_a_runtime_that_fails_is_a_failed_check(copy: Copy, npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(array: np.ndarray) -> Any:
        raise RuntimeError("Non-zero status code\nfar below")

    monkeypatch.setattr(onnx_files, "open_onnx", lambda artifact: Session("broken", broken, None))
    found = evaluate(copy("onnx", "fp32"), data=npz, limit=20)
    assert (found["status"], found["results"][0]["reason"]) == ("fail", "the runtime failed: Non-zero status code")


def change(place: Path, **changes: Any) -> Path:
    """Other words in the manifest; the files stay."""
    manifest = read_artifact(place).manifest
    write_json(place / MANIFEST, replace(manifest, **changes).to_json())
    rehash(place)
    return place


def test_an_untrained_network_is_called_so(copy: Copy, npz: Path) -> None:
    place = copy("onnx", "fp32")
    weights = replace(read_artifact(place).manifest.weights, trained=False, seed=0)
    found = evaluate(change(place, weights=weights), data=npz, limit=20)
    assert "the weights are untrained (seed 0): top-1 says nothing, agreement does" in found["results"][0]["warnings"]


def test_a_model_without_scores_is_refused(copy: Copy, npz: Path) -> None:
    place = copy("onnx", "fp32")
    spec = replace(read_artifact(place).manifest.outputs[0], shape=(1, 10, 8, 8), name="map")
    with pytest.raises(UsageError, match=r"^tiny returns map of shape 1x10x8x8, expected class scores \(B, classes\)$"):
        evaluate(change(place, outputs=(spec,)), data=npz)


def test_a_task_that_has_no_accuracy_is_refused(copy: Copy, npz: Path) -> None:
    place = copy("onnx", "fp32")
    unknown = replace(read_artifact(place).manifest.model, task="unknown")
    message = "^tiny has the task 'unknown', expected one that eval can score: image-classification$"
    with pytest.raises(UsageError, match=message):
        evaluate(change(place, model=unknown), data=npz)


def test_a_reference_of_another_task_is_refused(copy: Copy, npz: Path, artifacts: Path) -> None:
    reference = copy("tflite", "fp32")
    change(reference, model=replace(read_artifact(reference).manifest.model, task="unknown"))
    with pytest.raises(
        UsageError, match=r"onnx-fp32 has the task 'image-classification', --reference .* has 'unknown'$"
    ):
        evaluate(artifacts / "onnx-fp32", data=npz, reference=reference)


# Data that does not fit


def labelled(copy: Copy, labels: tuple[str, ...] = LABELS) -> Any:
    manifest = read_artifact(copy("onnx", "fp32")).manifest
    return replace(manifest, model=replace(manifest.model, labels=labels))


def named(names: tuple[str, ...], indices: list[int]) -> Labelled:
    images = np.zeros((len(indices), 4, 4, 3), np.uint8)
    return Labelled(ArrayPictures("data.npz", images), np.array(indices), names)


def test_names_are_matched_whatever_their_order(copy: Copy) -> None:
    manifest = labelled(copy)
    assert find_outputs(named(("digit 7", "digit 0"), [0, 1]), manifest) == (7, 0)


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (("cat",), LABELS, "data.npz: class 'cat' does not appear among the model's labels ('digit 0', 'digit 1', "),
        (("x",), ("x", "x", *LABELS[2:]), "data.npz: class 'x' appears twice among the model's labels"),
    ],
)
def test_names_that_do_not_fit(copy: Copy, names: tuple[str, ...], labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_outputs(named(names, [0]), labelled(copy, labels))
    assert str(caught.value).startswith(message)


def test_an_index_beyond_the_names_of_the_data(copy: Copy) -> None:
    with pytest.raises(UsageError, match="label 3 has no name among its 2 classes"):
        find_outputs(named(("digit 1", "digit 2"), [3]), labelled(copy))


def test_unreadable_pictures_are_named_counted_and_left_out(
    cli: Cli, artifacts: Path, folder: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "some"))
    (place / "3/broken.png").write_bytes(b"no picture")
    cut = next((place / "4").glob("*.png"))
    cut.write_bytes(cut.read_bytes()[:60])
    found = cli("eval", artifacts / "onnx-fp32", "--data", place, "--json")
    data = found.json["environment"]["data"]
    assert found.code == 0
    assert (data["images"], data["skipped"], data["of"]) == (99, 2, 101)
    assert data["first_skipped"].startswith(f"{place / '3/broken.png'}: ")
    assert "2 unreadable pictures were left out, the first: " in found.err


def make_bad_data(what: str, place: Path) -> Path:
    images, labels = digits()
    if what == "all unreadable":
        for name in map(str, range(10)):
            (place / name).mkdir()
            (place / name / "a.png").write_bytes(b"nothing")
        return place
    if what == "three folders":
        for name in "abc":
            (place / name).mkdir()
            Image.fromarray(images[0]).save(place / name / "a.png")
        return place
    arrays: dict[str, dict[str, Any]] = {
        "no labels": {"images": images},
        "label 10": {"images": images, "labels": np.where(labels == 9, 10, labels)},
        "too few labels": {"images": images, "labels": labels[:-1]},
        "grey": {"images": images[..., 0], "labels": labels},
    }
    return write_npz(place / "bad.npz", **arrays[what])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("all unreadable", "none of its pictures can be read, the first: "),
        ("three folders", "has 3 class folders, tiny has 10 classes and no labels to match them by name"),
        ("no labels", "has no array `labels`"),
        ("label 10", "label 10 is not a class of tiny, which has 10, numbered from 0"),
        ("too few labels", "expected 100 class indices from 0, one for each image"),
        ("grey", "images are uint8 (100, 64, 64), expected uint8 (N, H, W, 3) RGB"),
    ],
)
def test_bad_data_is_one_line_and_leaves_nothing(cli: Cli, copy: Copy, tmp_path: Path, what: str, message: str) -> None:
    (tmp_path / "data").mkdir()
    place = copy("onnx", "fp32")
    found = cli("eval", place, "--data", make_bad_data(what, tmp_path / "data"), "--jobs", "2")
    assert found.code == 2
    assert found.err.startswith("mvit-export: error: ") and found.err.count("\n") == 1
    assert message in found.err
    assert not (place / "accuracy.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "--limit is 0"),
        ({"max_drop": -1}, "--max-drop is -1"),
        ({"max_drop": math.nan}, "--max-drop is nan"),
        ({"jobs": 0}, "--jobs is 0"),
        ({"reference": ".", "weights": "x.pt"}, "leave out one"),
    ],
)
def test_options_that_make_no_sense(artifacts: Path, npz: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(artifacts, data=npz, **options)


def test_several_references_are_none(artifacts: Path, npz: Path) -> None:
    with pytest.raises(UsageError, match="holds 3 artifacts, expected one of them"):
        evaluate(artifacts, data=npz, reference=artifacts)


def test_a_read_only_artifact_is_scored_and_says_so(copy: Copy, npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    place = copy("onnx", "fp32")
    monkeypatch.setattr("mvit_export.artifact.write_whole", refuse)
    (row,) = evaluate(place, data=npz, limit=20)["results"]
    assert row["status"] == "measured"
    assert row["warnings"] == [f"{place / 'accuracy.json'} cannot be written: Permission denied"]


# Processes


def make_squares() -> Callable[[int], int]:
    return lambda number: number * number


def make_crashing() -> Callable[[int], int]:
    return lambda number: os._exit(9)


def make_refusing() -> Callable[[int], int]:
    raise UsageError("the file has moved")


def make_sleepy() -> Callable[[int], Any]:
    return time.sleep


@pytest.mark.slow
def test_every_task_is_done_once() -> None:
    found = dict(spread_over(make_squares, range(20), jobs=3, timeout=60))
    assert found == {index: index * index for index in range(20)}
    assert dict(spread_over(make_squares, [], jobs=2, timeout=60)) == {}


@pytest.mark.slow
def test_errors_of_a_process_are_raised_here() -> None:
    with pytest.raises(UsageError, match="the file has moved"):
        list(spread_over(make_refusing, range(3), jobs=2, timeout=60))


@pytest.mark.slow
def test_a_lost_process_is_no_hang() -> None:
    with pytest.raises(DeviceError, match=r"a process was lost \(exit code 9\)"):
        list(spread_over(make_crashing, range(3), jobs=2, timeout=60))


@pytest.mark.slow
def test_a_process_that_hangs_is_stopped() -> None:
    begun = time.monotonic()
    with pytest.raises(DeviceError, match="gave no answer within 1 s and was stopped"):
        list(spread_over(make_sleepy, [600.0], jobs=2, timeout=1))
    assert time.monotonic() - begun < 60


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


def state(pid: int) -> str:
    """One letter of Linux, Z for what has ended and waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


@pytest.mark.skipif(sys.platform != "linux", reason="the children are found by procps' ps")
def test_an_interrupt_ends_every_process(artifacts: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4000, 64, 64, 3), dtype=np.uint8)
    data = write_npz(tmp_path / "many.npz", images=images, labels=np.zeros(4000, np.int64))
    (artifacts / "coreml-fp16/accuracy.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "mvit_export", "eval", artifacts / "coreml-fp16", "--data", data, "--jobs", "2"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(started := children(process.pid)) < 3 and time.monotonic() < deadline:  # with Python's own tracker
        time.sleep(0.1)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "mvit-export: error: interrupted; nothing half-written was left\n"
    assert not (artifacts / "coreml-fp16/accuracy.json").exists()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in started if state(pid) not in ("gone", "Z")]:
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive]
        time.sleep(0.1)


# The report


def test_the_report_shows_accuracy(cli: Cli, artifacts: Path, npz: Path) -> None:
    done = cli("eval", artifacts, "--data", npz, "--json")  # anew: other tests score these artifacts on other pictures
    rows = {row["format"]: row for row in done.json["results"]}
    text = cli("report", artifacts, "--format", "markdown").out
    assert "100 pictures of " in text and "against PyTorch tiny 64x64" in text
    for row in rows.values():
        assert f"| {100 * row['top1']:.2f} % | {100 * row['top5']:.2f} % | {100 * row['ece']:.2f} % |" in text
