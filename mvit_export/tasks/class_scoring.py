"""How `eval` scores classification: which output is which class of the data, top-1, and the distance from fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mvit_export.artifact import Artifact, Manifest
from mvit_export.data.pictures import FolderPictures, Labelled
from mvit_export.errors import UsageError
from mvit_export.tasks import class_scores
from mvit_export.tasks.base import Scoring


def find_outputs(data: Labelled, manifest: Manifest) -> tuple[int, ...]:
    """The output of each class of the data: by name if both have names, else by position."""
    name, spec = manifest.model.name, manifest.outputs[0]
    if len(spec.shape) != 2 or spec.shape[1] in (None, 1):
        shape = "x".join("any" if n is None else str(n) for n in spec.shape)
        raise UsageError(f"{name} returns {spec.name} of shape {shape}, expected class scores (B, classes)")
    count, most = int(spec.shape[1] or 0), int(data.labels.max())
    source, classes = data.pictures.source, data.classes
    if classes is not None and most >= len(classes):
        raise UsageError(f"{source}: label {most} has no name among its {len(classes)} classes; write them again")
    if classes is not None and manifest.model.labels is not None:
        return find_names(classes, manifest.model.labels, source)
    if isinstance(data.pictures, FolderPictures) and len(classes or ()) != count:
        raise UsageError(
            f"{source} has {len(classes or ())} class folders, {name} has {count} classes and no labels to match "
            "them by name: export with --labels, or give all folders in the order of the classes"
        )
    if most >= count:
        raise UsageError(f"{source}: label {most} is not a class of {name}, which has {count}, numbered from 0")
    return tuple(range(most + 1))


def find_names(classes: Sequence[str], labels: Sequence[str], source: str) -> tuple[int, ...]:
    for name in classes:
        if labels.count(name) != 1:
            found = "appears twice" if name in labels else "does not appear"
            few = ", ".join(map(repr, labels[:3]))
            raise UsageError(
                f"{source}: class {name!r} {found} among the model's labels ({few}, …); rename one of them"
            )
    return tuple(labels.index(name) for name in classes)


def check_comparable(artifact: Artifact, reference: Artifact) -> None:
    """Class i must be the same class in both."""
    mine, other = artifact.manifest, reference.manifest
    same_count = mine.outputs[0].shape[1:] == other.outputs[0].shape[1:]
    if not same_count or (mine.model.labels and other.model.labels and mine.model.labels != other.model.labels):
        raise UsageError(
            f"{artifact.path} has other classes than --reference {reference.path}; choose one with the same"
        )


def compare(reference: np.ndarray, scores: np.ndarray, names: Mapping[int, str]) -> dict[str, Any]:
    """Both (N,) of `class_scores.SCORES`, of the same pictures."""
    drop, interval = class_scores.paired_drop(reference, scores)
    return {
        **class_scores.accuracy(scores),
        **class_scores.comparison(scores),
        "drop_points": drop,
        "drop_interval": interval,
        "per_class": tuple(class_scores.per_class(scores, names)),
        "most_confused": tuple(class_scores.most_confused(scores, names)),
    }


def find_warnings(scores: np.ndarray, figures: Mapping[str, Any], manifest: Manifest) -> Iterator[str]:
    """What the figures do not show by themselves."""
    if broken := int((scores["predicted"] < 0).sum()):
        yield f"{broken} pictures gave NaN or Inf, which counts as wrong"
    tolerance = manifest.target.precision_row.tolerance
    bounds = {
        "mean KL": (figures["mean_kl"], tolerance.kl if tolerance.mean_kl is None else tolerance.mean_kl),
        "mean change of the top class's probability": (figures["mean_delta_p"], tolerance.delta_p),
    }
    for words, (value, limit) in bounds.items():
        if value is not None and limit is not None and value > limit:
            yield (
                f"confidence has moved away from the reference: {words} {value:.2g}, at most {limit:g} expected of "
                f"{manifest.precision}, however many answers agree"
            )


CLASS_SCORING = Scoring(
    find_outputs=find_outputs,
    check_comparable=check_comparable,
    score=class_scores.score,
    accuracy=class_scores.accuracy,
    compare=compare,
    find_warnings=find_warnings,
)
