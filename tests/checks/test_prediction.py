"""`predict`: what a file answers to pictures, as a user sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, Finished
from PIL import Image

from mvit_export.artifact import Artifact, Manifest
from mvit_export.checks.prediction import first_of_batch, open_files, predict
from mvit_export.converters.manifest import draft_manifest
from mvit_export.data.preprocessing import to_picture, to_tensor
from mvit_export.data.synthetic import open_photo
from mvit_export.errors import ArtifactError, UsageError
from mvit_export.formats.targets import plan_targets
from mvit_export.tasks.base import present_numbers
from mvit_export.tasks.classification import OF_PROBABILITIES
from mvit_export.tasks.table import task_of


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photos") / "chelsea.png"
    open_photo("chelsea").save(file)
    return file


def expected_probabilities(model: Any) -> np.ndarray:
    picture = to_picture(open_photo("chelsea"), model.preprocessing)
    with torch.no_grad():
        return model.module(torch.from_numpy(to_tensor(picture[None], model.preprocessing))).softmax(1)[0].numpy()


@pytest.mark.parametrize(
    ("kind", "runtime", "notes"),
    [
        (("onnx", "fp32"), "onnxruntime", 0),
        (("onnx", "fp32", "image"), "onnxruntime", 0),
        (("tflite", "fp32"), "ai-edge-litert", 0),
        (("coreml", "fp32"), "mil-reference", 1),
    ],
)
def test_probabilities_are_those_of_the_network(
    kind: tuple[str, ...], runtime: str, notes: int, tiny_artifact: Callable[..., Path], tiny_model: Any, photo: Path
) -> None:
    if kind[0] == "coreml" and not torch.backends.mps.is_built():
        assert notes == 1  # only Apple's systems have Core ML itself
    found = predict(tiny_artifact(*kind), [photo])
    assert found.runtime.startswith(runtime)
    assert [note for note in found.notes if "Apple's kernels" in note] == list(found.notes)[:notes]
    (prediction,) = found.predictions
    expected = expected_probabilities(tiny_model)
    classes = prediction.answer.fields["classes"]
    assert [row["index"] for row in classes] == np.argsort(-expected)[:5].tolist()
    assert [row["probability"] for row in classes] == pytest.approx(np.sort(expected)[:-6:-1], abs=1e-5)


def test_the_command(
    cli: Callable[..., Finished], tiny_artifact: Callable[..., Path], photo: Path, tmp_path: Path
) -> None:
    place = tiny_artifact("onnx", "fp32")
    done = cli("predict", place, photo, photo.parent, "--json", "-o", tmp_path / "answers.json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "answers.json").read_text()) == done.json
    assert {"status": "measured", "artifact": str(place), "task": "image-classification"}.items() <= done.json.items()
    assert [row["picture"] for row in done.json["predictions"]] == [str(photo)] * 2
    plain = cli("predict", place, photo)
    first = done.json["predictions"][0]["classes"][0]
    assert plain.out.splitlines()[0].startswith(f"{place}  onnxruntime ")
    assert f"\n  {100 * first['probability']:6.2f} %  class {first['index']}\n" in plain.out
    assert plain.out.count(" %  ") == 5
    quiet = cli("predict", place, photo, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_errors_of_the_command_are_one_line(
    cli: Callable[..., Finished], tiny_artifact: Callable[..., Path], photo: Path, tmp_path: Path
) -> None:
    place = tiny_artifact("onnx", "fp32")
    (tmp_path / "torn.png").write_bytes(photo.read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((place, tmp_path / "none.png"), f"{tmp_path}/none.png: "),
        ((place, tmp_path / "torn.png"), f"{tmp_path}/torn.png: "),
        ((place, tmp_path / "empty"), f"{tmp_path}/empty holds no pictures"),
        ((tmp_path / "empty", photo), "holds no manifest.json"),
        ((place, photo, "-o", tmp_path / "no/such.json"), "cannot be written"),
        ((place,), "Missing argument 'PICTURE...'"),
    ):
        done = cli("predict", *arguments)
        assert (done.code, message in done.err, done.err.count("\n")) == (2, True, 1), done.err


def manifest_of(model: Any, **changes: Any) -> Manifest:
    (target,) = plan_targets("onnx")
    manifest = draft_manifest(model, target, {})
    return replace(manifest, model=replace(manifest.model, **changes))


def test_labels_and_ties(small_model: Any) -> None:
    manifest = manifest_of(small_model, labels=LABELS)
    answer = task_of(manifest).present({"logits": np.array([0.0, 3, 1, 3, 2, 0, 0, 0, 0, 0])}, manifest)
    assert [row["label"] for row in answer.fields["classes"]] == [LABELS[i] for i in (1, 3, 4, 2, 0)]
    assert sum(row["probability"] for row in answer.fields["classes"]) < 1
    assert answer.lines[0].endswith("%  digit 1")


def test_probabilities_stay_as_they_are(small_model: Any) -> None:
    manifest = manifest_of(small_model, scores="probabilities")
    assert task_of(manifest) is OF_PROBABILITIES
    answer = task_of(manifest).present({"scores": np.array([0.75, 0.25])}, manifest)
    assert [row["probability"] for row in answer.fields["classes"]] == [0.75, 0.25]
    assert answer.lines == (" 75.00 %  class 0", " 25.00 %  class 1")


def test_other_outputs_are_shown_as_numbers(small_model: Any) -> None:
    answer = present_numbers({"boxes": np.array([[1.0, 2], [3, 4]])}, manifest_of(small_model))
    assert answer.fields == {"outputs": [{"name": "boxes", "shape": [2, 2], "least": 1.0, "mean": 2.5, "most": 4.0}]}
    assert answer.lines == ("boxes [2, 2]  1 to 4, mean 2.5",)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_no_number_is_an_error(value: float, small_model: Any) -> None:
    manifest = manifest_of(small_model)
    for present in (task_of(manifest).present, OF_PROBABILITIES.present, present_numbers):
        with np.errstate(invalid="ignore"), pytest.raises(ArtifactError, match="answers with NaN or Inf"):
            present({"logits": np.array([0.0, value])}, manifest)


def test_an_output_of_another_shape_is_an_error(small_model: Any, tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, manifest_of(small_model))
    for outputs in ({}, {"logits": np.zeros((1, 9))}, {"logits": np.zeros(10)}):
        with pytest.raises(ArtifactError, match=r"logits has shape .*, the manifest says"):
            first_of_batch(artifact, outputs)
    assert first_of_batch(artifact, {"logits": np.zeros((1, 10), np.float32)})["logits"].dtype == np.float64


def test_folders_are_searched(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/b/2.png", "a/1.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert [file.name for file in open_files([tmp_path, tmp_path / "a/1.jpg"]).files] == ["1.jpg", "2.png", "1.jpg"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="none holds no pictures"):
        open_files([tmp_path / "none"])
