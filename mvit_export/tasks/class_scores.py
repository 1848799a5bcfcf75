"""How accurate class scores are, and how they differ from a reference: the figures of `eval`. Needs only numpy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

ECE_BINS = 15
Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
MOST_CONFUSED = 20  # pairs that are listed

# What is kept of every picture, so that a million fit into memory whatever the number of classes.
SCORES = np.dtype([
    ("label", "i8"), ("predicted", "i8"),  # predicted is -1 if the scores are not finite
    ("top5", "?"), ("confidence", "f8"),
    ("agrees", "?"), ("kl", "f8"), ("delta_p", "f8"),  # against the reference; NaN if there is nothing to compare
])  # fmt: skip


def score(logits: np.ndarray, labels: np.ndarray, reference: np.ndarray | None = None) -> np.ndarray:
    """(N, classes) scores before softmax and (N,) labels -> (N,) of SCORES."""
    result = np.zeros(len(logits), SCORES)
    result["label"], result["predicted"], result["kl"], result["delta_p"] = labels, -1, np.nan, np.nan
    fine = np.isfinite(logits).all(axis=1)
    found, rows = logits[fine].astype(np.float64), result[fine]
    order = np.argsort(-found, axis=1, kind="stable")
    rows["predicted"] = order[:, 0]
    rows["top5"] = (order[:, :5] == labels[fine, None]).any(axis=1)
    rows["confidence"] = np.exp(log_softmax(found).max(axis=1))
    if reference is not None:
        expected = reference[fine].astype(np.float64)
        rows["agrees"] = rows["predicted"] == expected.argmax(axis=1)
        rows["kl"] = divergences(expected, found)
        rows["delta_p"] = probability_changes(expected, found)
    result[fine] = rows
    return result


def probability_changes(reference: np.ndarray, output: np.ndarray) -> np.ndarray:
    """|p - q| of the reference's top class, for each row."""
    top = reference.argmax(axis=1)[:, None]
    p, q = (np.take_along_axis(np.exp(log_softmax(x)), top, axis=1)[:, 0] for x in (reference, output))
    return np.abs(p - q)


def is_right(scores: np.ndarray) -> np.ndarray:
    return scores["predicted"] == scores["label"]


def accuracy(scores: np.ndarray) -> dict[str, Any]:
    """top1, top5 and ece, as shares."""
    right = is_right(scores)
    return {
        "top1": float(right.mean()),
        "top5": float(scores["top5"].mean()),
        "ece": calibration_error(scores["confidence"], right),
    }


def comparison(scores: np.ndarray) -> dict[str, Any]:
    """The distance from the reference, over the pictures with finite scores; None if there are none."""
    compared = scores[np.isfinite(scores["kl"])]
    some = len(compared) > 0
    return {
        "agreement": float(scores["agrees"].mean()),
        "mean_kl": float(compared["kl"].mean()) if some else None,
        "mean_delta_p": float(compared["delta_p"].mean()) if some else None,
        "max_delta_p": float(compared["delta_p"].max()) if some else None,
    }


def calibration_error(confidence: np.ndarray, right: np.ndarray, *, bins: int = ECE_BINS) -> float:
    """Expected calibration error: the mean over pictures of |accuracy - mean confidence| of their bin.

    Bins have equal width and include their upper edge: Guo et al., On Calibration of Modern Neural Networks (2017),
    equation 3.
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(index, right.astype(float) - confidence, minlength=bins)  # count * (accuracy - confidence)
    return float(np.abs(gap).sum() / len(confidence))


def paired_drop(reference: np.ndarray, scores: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Points of top-1 lost against the reference over the same pictures, with a 95 % interval.

    Only pictures that just one of the two gets right count, as in McNemar's test. The interval is that of Agresti and
    Min, Simple improved confidence intervals for comparing matched proportions (2005): half a picture is added to each
    of the four cells, so that no difference among few pictures does not prove that there is none.
    """
    was, now = is_right(reference), is_right(scores)
    lost, gained, n = int((was & ~now).sum()), int((~was & now).sum()), len(was)
    middle = (lost - gained) / (n + 2)
    spread = Z_95 * math.sqrt((lost + gained + 1) - (lost - gained) ** 2 / (n + 2)) / (n + 2)
    return 100 * (lost - gained) / n, (100 * (middle - spread), 100 * (middle + spread))


def per_class(scores: np.ndarray, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Every class in the data, by its index among the outputs."""
    right, rows = is_right(scores), []
    for index in np.unique(scores["label"]).tolist():
        members = scores["label"] == index
        share = float(right[members].mean())
        rows.append({"class": names.get(index, str(index)), "index": index, "count": int(members.sum()), "top1": share})
    return rows


def most_confused(scores: np.ndarray, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """The off-diagonal of the confusion matrix, its largest entries first."""
    wrong = scores[~is_right(scores) & (scores["predicted"] >= 0)]
    pairs = Counter(zip(wrong["label"].tolist(), wrong["predicted"].tolist(), strict=True))
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:MOST_CONFUSED]
    return [
        {"class": names.get(label, str(label)), "taken_for": names.get(other, str(other)), "count": count}
        for (label, other), count in ordered
    ]


def divergences(reference: np.ndarray, output: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(output)) of each row, in nats; values rounded below zero become 0."""
    log_p, log_q = log_softmax(reference), log_softmax(output)
    return np.maximum(0.0, (np.exp(log_p) * (log_p - log_q)).sum(axis=1))


def top_probability_change(reference: np.ndarray, output: np.ndarray) -> float:
    """Largest |p - q| of the reference's top class."""
    top = reference.argmax(axis=1)[:, None]
    p, q = (np.take_along_axis(np.exp(log_softmax(x)), top, axis=1) for x in (reference, output))
    return float(np.abs(p - q).max())


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def top_k_agreement(reference: np.ndarray, output: np.ndarray, k: int) -> float:
    """Share of rows whose k highest classes are the same set. Top-1 is what a user sees; it does not prove parity."""
    k = min(k, reference.shape[1])
    best = [np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1) for scores in (reference, output)]
    return float((best[0] == best[1]).all(axis=1).mean())
