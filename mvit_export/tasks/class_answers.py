"""How a classifier's scores of one picture are shown: the most likely classes with their probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mvit_export.artifact import Manifest
from mvit_export.errors import ArtifactError
from mvit_export.tasks.base import Answer
from mvit_export.tasks.class_scores import log_softmax

MOST_SHOWN = 5


def present_scores(outputs: Mapping[str, np.ndarray], manifest: Manifest) -> Answer:
    """Of scores before a softmax, (classes,)."""
    return present_probabilities({name: np.exp(log_softmax(x[None])[0]) for name, x in outputs.items()}, manifest)


def present_probabilities(outputs: Mapping[str, np.ndarray], manifest: Manifest) -> Answer:
    """The five most likely classes, of equal ones the first. Raises ArtifactError for numbers that are not finite."""
    (probabilities,) = outputs.values()
    if not np.isfinite(probabilities).all():
        raise ArtifactError(f"{manifest.model.name} answers with NaN or Inf; verify tells where it begins")
    labels = manifest.model.labels
    order = np.argsort(-probabilities, kind="stable")[:MOST_SHOWN]
    classes = [
        {"index": int(i), "label": labels[i] if labels else None, "probability": float(probabilities[i])} for i in order
    ]
    lines = tuple(f"{100 * probabilities[i]:6.2f} %  {labels[i] if labels else f'class {i}'}" for i in order)
    return Answer({"classes": classes}, lines)
