"""Where to cut a range of activations: the largest absolute value that int8 is to hold.

minmax keeps every value; percentile drops the outermost hundredth of a percent; entropy takes the cut whose int8
histogram is nearest to the whole one by KL divergence (Migacz, 8-bit inference with TensorRT, 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

BINS = 2048  # of each histogram of absolute values
LEVELS = 128  # that int8 has for them
KEPT = 0.9999  # of all values, by the percentile

Runs = Callable[[], Iterator[tuple[str, np.ndarray]]]  # every call gives the same (name, tensor) anew


def find_limits(runs: Runs, method: str) -> dict[str, float]:
    """The cut of every named tensor. `method` is one of calibration.METHODS."""
    largest: dict[str, float] = {}
    for name, values in runs():
        largest[name] = max(largest.get(name, 0.0), float(np.abs(values).max()))
    if method == "minmax":
        return largest
    cut = {"percentile": cut_percentile, "entropy": cut_entropy}[method]
    histograms = {name: np.zeros(BINS) for name in largest}
    for name, values in runs():
        histograms[name] += np.histogram(np.abs(values), BINS, (0.0, largest[name] or 1.0))[0]
    return {name: largest[name] * cut(counts) / BINS for name, counts in histograms.items()}


def cut_percentile(counts: np.ndarray) -> int:
    """How many bins hold the share KEPT."""
    return int(np.searchsorted(np.cumsum(counts), KEPT * counts.sum())) + 1


def cut_entropy(counts: np.ndarray) -> int:
    """How many bins to keep."""
    candidates = range(LEVELS, len(counts) + 1, LEVELS // 8)
    return min(candidates, key=lambda kept: divergence(counts, kept))


def divergence(counts: np.ndarray, kept: int) -> float:
    """KL of the histogram, what lies beyond the cut added to its last bin, from what LEVELS steps make of it."""
    inside = counts[:kept]
    p = inside.copy()
    p[-1] += counts[kept:].sum()
    step = np.arange(kept) * LEVELS // kept
    filled = inside > 0
    share = np.bincount(step, inside, LEVELS) / np.maximum(np.bincount(step, filled, LEVELS), 1)
    q = np.where(filled, share[step], 0.0)
    p, q = p / max(p.sum(), 1.0), q / max(q.sum(), 1.0)
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-9))).sum())
