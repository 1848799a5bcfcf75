"""The tasks, one row each, and which of them a model does."""

from __future__ import annotations

from mvit_export.artifact import Manifest, ModelInfo
from mvit_export.errors import ArtifactError
from mvit_export.tasks.base import Shapes, Task
from mvit_export.tasks.classification import CLASSIFICATION, OF_PROBABILITIES, PROBABILITIES
from mvit_export.tasks.segmentation import OF_LABELS, SEGMENTATION
from mvit_export.tasks.unknown import UNKNOWN

TASKS = {task.name: task for task in (CLASSIFICATION, SEGMENTATION, UNKNOWN)}  # the last one fits every model
OF_SCORES: dict[tuple[str, str | None], Task] = {
    (CLASSIFICATION.name, PROBABILITIES): OF_PROBABILITIES,
    (SEGMENTATION.name, "labels"): OF_LABELS,
}  # by task and what its scores are, or by what it returns in their place


def find_task(info: ModelInfo, shapes: Shapes) -> Task:
    """The task that a model declares, else the first that its outputs fit."""
    if info.task != UNKNOWN.name:
        return OF_SCORES.get((info.task, info.settings.get("output")), TASKS[info.task])
    return next(task for task in TASKS.values() if task.fits(shapes))


def task_of(manifest: Manifest) -> Task:
    """The task of an artifact. Raises ArtifactError for one that this version does not know."""
    name = manifest.model.task
    if name not in TASKS:
        raise ArtifactError(f"task {name!r} is not known to this version, expected {' or '.join(TASKS)}; export again")
    return OF_SCORES.get((name, manifest.model.scores or manifest.model.settings.get("output")), TASKS[name])
