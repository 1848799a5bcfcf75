"""Image classification: one output of class scores, (B, classes)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mvit_export.artifact import Manifest
from mvit_export.tasks.base import Figure, Shapes, Task
from mvit_export.tasks.class_answers import present_probabilities, present_scores
from mvit_export.tasks.class_scores import divergences, top_k_agreement, top_probability_change
from mvit_export.tasks.class_scoring import CLASS_SCORING

LOGITS, PROBABILITIES = "logits", "probabilities"  # what class scores are
SMALLEST = 1e-30  # of a probability whose logarithm is taken
PROBABILITY_TOLERANCE = 5e-3  # fp16 holds a probability to 5e-4; the softmax before it adds up several such roundings


def check_classifier(outputs: Mapping[str, Any], manifest: Manifest) -> None:
    """A classifier's own outputs: labels in the manifest's order, their probabilities the softmax of the logits.

    A file without labels has no outputs of its own to check.

    Raises ValueError, which is a failed check.
    """
    if not manifest.model.labels:
        return
    scores = np.asarray(outputs[manifest.output_names[0]], np.float64).reshape(-1)
    chosen = next((value for value in outputs.values() if isinstance(value, str)), None)
    given = next((value for value in outputs.values() if isinstance(value, Mapping)), None)
    labels = manifest.model.labels
    if given is None or chosen is None:
        raise ValueError("the manifest has labels, but the file is not a classifier")
    if tuple(given) != labels:
        raise ValueError("the classifier's labels are not the manifest's, or are in another order")
    if manifest.model.scores == PROBABILITIES:
        expected, what = scores, "the model's"
    else:
        odds = np.exp(scores - scores.max())
        expected, what = odds / odds.sum(), "the softmax of the scores"
    error = np.abs(np.fromiter(given.values(), np.float64) - expected).max()
    if error > PROBABILITY_TOLERANCE or chosen != max(given, key=lambda label: given[label]):
        raise ValueError(f"the classifier's probabilities are not {what} (off by {error:.1e})")


def count_classes(shapes: Shapes) -> int | None:
    """The classes of a network with one output (B, classes); None for any other."""
    shape, *others = shapes.values()
    return shape[1] if not others and len(shape) == 2 else None


def compare(reference: np.ndarray, output: np.ndarray) -> dict[str, float]:
    """The figures of class scores (B, classes); none for an output of another shape."""
    if reference.ndim != 2 or reference.shape[1] < 2:
        return {}
    kl = divergences(reference, output)
    return {
        "kl": float(kl.max()),
        "top1_agreement": top_k_agreement(reference, output, 1),
        "top5_agreement": top_k_agreement(reference, output, 5),
        "mean_kl": float(kl.mean()),
        "delta_p": top_probability_change(reference, output),
    }


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


FIGURES = (
    Figure("kl", max, "KL", ".1e", lambda tolerance: tolerance.kl),  # of softmax, in nats; the worst row
    Figure("top1_agreement", mean),  # shares
    Figure("top5_agreement", mean),
    Figure("mean_kl", mean, "mean KL", bound=lambda tolerance: tolerance.mean_kl),
    # The largest change of the probability of the reference's top class.
    Figure("delta_p", max, "the top class's probability changes by", bound=lambda tolerance: tolerance.delta_p),
)
CLASSIFICATION = Task(
    name="image-classification",
    output_names=("logits",),
    fits=lambda shapes: count_classes(shapes) is not None,
    count_classes=count_classes,
    figures=FIGURES,
    compare=compare,
    check_outputs=check_classifier,
    scoring=CLASS_SCORING,
    present=present_scores,
)


def to_logits(probabilities: np.ndarray) -> np.ndarray:
    """Scores whose softmax they are."""
    return np.log(np.maximum(probabilities, SMALLEST))


def compare_probabilities(reference: np.ndarray, output: np.ndarray) -> dict[str, float]:
    fits = reference.ndim == 2 and reference.shape[1] >= 2
    return compare(to_logits(reference), to_logits(output)) if fits else {}


def score_probabilities(scores: np.ndarray, labels: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    return CLASS_SCORING.score(to_logits(scores), labels, None if reference is None else to_logits(reference))


OF_PROBABILITIES = replace(
    CLASSIFICATION,
    compare=compare_probabilities,
    scoring=replace(CLASS_SCORING, score=score_probabilities),
    present=present_probabilities,
)
