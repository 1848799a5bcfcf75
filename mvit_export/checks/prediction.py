"""What a file answers to a user's own pictures, in its runtime and with its preprocessing, as an app would run it.

Nothing is compared here: `verify` and `eval` do that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.artifact import Artifact, find_artifacts, read_artifact
from mvit_export.checks.evaluator import arrange, fits
from mvit_export.checks.subjects import Subject
from mvit_export.data.folders import list_pictures
from mvit_export.data.pictures import FolderPictures, Pictures
from mvit_export.data.preprocessing import UNSTATED, describe_unstated
from mvit_export.errors import ArtifactError, MvitExportError, UsageError, first_line
from mvit_export.readers.session import Session, openers
from mvit_export.tasks.base import Answer
from mvit_export.tasks.table import task_of


@dataclass(frozen=True)
class Prediction:
    """One picture and what the file answers to it."""

    picture: str
    answer: Answer

    def to_json(self) -> dict[str, Any]:
        return {"picture": self.picture, **self.answer.fields}


@dataclass(frozen=True)
class Predictions:
    """All answers of one artifact; `notes` are what qualifies them, a line each."""

    artifact: Artifact
    runtime: str
    notes: tuple[str, ...]
    predictions: tuple[Prediction, ...]

    def to_json(self) -> dict[str, Any]:
        manifest = self.artifact.manifest
        return {
            "status": "measured", "artifact": str(self.artifact.path), "model": manifest.model.name,
            "task": manifest.model.task, "runtime": self.runtime, "notes": list(self.notes),
            "predictions": [prediction.to_json() for prediction in self.predictions],
        }  # fmt: skip


def predict(path: str | Path, pictures: Sequence[str | Path]) -> Predictions:
    """Run one artifact on picture files and folders of them.

    Raises UsageError for what is no picture, a model that takes none or a task without answers to show; ArtifactError
    for a damaged artifact or a runtime that fails; RuntimeUnavailable where its runtime cannot work here.
    """
    place, *others = find_artifacts(path)
    if others:
        raise UsageError(f"{path} holds {1 + len(others)} artifacts, expected one of them, such as {place}")
    artifact = read_artifact(place)
    manifest = artifact.manifest
    if manifest.preprocessing is None:
        raise UsageError(f"{manifest.model.name} takes no pictures, expected a model with an RGB image as input")
    opened = open_files(pictures)
    session = openers(artifact)[0](artifact)
    found = tuple(
        Prediction(str(opened.files[index]), answer(artifact, session, opened, index)) for index in range(len(opened))
    )
    return Predictions(artifact, session.runtime, tuple(notes_on(artifact, session)), found)


def open_files(given: Sequence[str | Path]) -> FolderPictures:
    """The files, and those in the folders at any depth. Raises UsageError."""
    files: list[Path] = []
    for path in map(Path, given):
        inside = list_pictures(path) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"{path} holds no pictures, expected .png, .jpg or the like at any depth")
        files += inside
    return FolderPictures("", tuple(files))


def answer(artifact: Artifact, session: Session, pictures: Pictures, index: int) -> Answer:
    """Raises UnreadablePicture, and ArtifactError if the runtime fails or returns what the manifest does not say."""
    manifest = artifact.manifest
    subject = Subject(manifest, artifact, (), None)
    picture = pictures.read(index, subject.preprocessing)
    spec = manifest.inputs[0]
    array = arrange(np.stack([picture] * (spec.shape[0] or 1)), subject)  # a fixed batch is filled with the same
    try:
        outputs = session.run(array)
    except MvitExportError:
        raise
    except Exception as error:  # each runtime has its own exception types
        raise ArtifactError(f"{artifact.path}: the runtime failed: {first_line(error)}; verify tells more") from error
    return task_of(manifest).present(first_of_batch(artifact, outputs), manifest)


def first_of_batch(artifact: Artifact, outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The manifest's outputs for one picture, each without its batch axis, as float64."""
    found = {}
    for spec in artifact.manifest.outputs:
        array = np.asarray(outputs.get(spec.name, ()), np.float64)
        if not array.shape or not len(array) or not fits(array.shape[1:], spec.shape[1:]):
            raise ArtifactError(
                f"{artifact.path}: {spec.name} has shape {array.shape}, the manifest says {spec.shape}; export again"
            )
        found[spec.name] = array[0]
    return found


def notes_on(artifact: Artifact, session: Session) -> list[str]:
    manifest = artifact.manifest
    found = [session.note] if session.note else []
    if manifest.weights.trained is False:
        found.append(f"the weights are untrained (seed {manifest.weights.seed}): the answers say nothing")
    if manifest.preprocessing and manifest.preprocessing.source == UNSTATED:
        found.append(describe_unstated(manifest.preprocessing))
    return found
