"""What `eval` scores: artifacts, each with its reference, and which of their outputs is which class of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvit_export.artifact import Artifact, Manifest, find_artifacts, image_size, read_artifact
from mvit_export.data.pictures import Labelled
from mvit_export.data.preprocessing import Preprocessing
from mvit_export.errors import UsageError
from mvit_export.readers.session import Session, open_torch, openers
from mvit_export.tasks.base import Scoring
from mvit_export.tasks.table import TASKS, task_of


@dataclass(frozen=True)
class Subject:
    """An artifact in its runtime, or, without one, the PyTorch model that `manifest` came from."""

    manifest: Manifest
    artifact: Artifact | None
    outputs: tuple[int, ...]  # the model's index of each of the data's classes
    reference: int | None  # its place among the subjects; None for a reference
    weights: str | Path | None = None

    @property
    def name(self) -> str:
        size = "x".join(map(str, image_size(self.manifest.inputs[0].shape, self.manifest.inputs[0])))
        return str(self.artifact.path) if self.artifact else f"PyTorch {self.manifest.model.name} {size}"

    @property
    def preprocessing(self) -> Preprocessing:
        spec = self.manifest.inputs[0]
        assert self.manifest.preprocessing is not None
        return self.manifest.preprocessing.with_size(image_size(spec.shape, spec))

    @property
    def classes(self) -> dict[int, str]:
        return dict(enumerate(self.manifest.model.labels or ()))

    def open(self) -> Session:
        if self.artifact is not None:
            return openers(self.artifact)[0](self.artifact)
        from mvit_export.families.load import rebuild_model

        return open_torch(rebuild_model(self.manifest, weights=self.weights))


def plan_subjects(
    artifacts: Sequence[Artifact], data: Labelled, reference: str | Path | None, weights: str | Path | None
) -> list[Subject]:
    """The references, each followed by what is compared with it. Raises UsageError if data or models do not fit."""
    if reference is not None and weights is not None:
        raise UsageError("--weights is for the PyTorch reference, --reference names another; leave out one")
    fixed = read_reference(reference) if reference is not None else None
    subjects: list[Subject] = []
    known: dict[Any, int] = {}
    for artifact in artifacts:
        scoring = scoring_of(artifact.manifest)
        outputs = scoring.find_outputs(data, artifact.manifest)
        source = fixed or artifact
        if fixed is not None:
            check_task(artifact, fixed)
            scoring.check_comparable(artifact, fixed)
        origin = Subject(source.manifest, fixed, scoring.find_outputs(data, source.manifest), None, weights)
        model = source.manifest.model.source, source.manifest.weights.state_sha256
        key = fixed.path if fixed else (*model, origin.preprocessing, origin.outputs)
        if key not in known:
            known[key] = len(subjects)
            subjects.append(origin)
        subjects.append(Subject(artifact.manifest, artifact, outputs, known[key]))
    return subjects


def read_reference(path: str | Path) -> Artifact:
    places = find_artifacts(path)
    if len(places) > 1:
        raise UsageError(f"--reference {path} holds {len(places)} artifacts, expected one of them, such as {places[0]}")
    return read_artifact(places[0])


def scoring_of(manifest: Manifest) -> Scoring:
    """Raises UsageError for a model that `eval` cannot score."""
    task, name = task_of(manifest), manifest.model.name
    if manifest.preprocessing is None:
        raise UsageError(f"{name} takes no pictures, expected a model with an RGB image as input")
    if task.scoring is None:
        scored = " or ".join(row.name for row in TASKS.values() if row.scoring)
        raise UsageError(f"{name} has the task {task.name!r}, expected one that eval can score: {scored}")
    return task.scoring


def check_task(artifact: Artifact, reference: Artifact) -> None:
    mine, other = artifact.manifest.model.task, reference.manifest.model.task
    if mine != other:
        raise UsageError(f"{artifact.path} has the task {mine!r}, --reference {reference.path} has {other!r}")
