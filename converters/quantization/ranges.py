"""The ranges of activations, learned from calibration: minmax, percentile, entropy.

minmax needs one pass over the calibration's inputs. The others need a second, which counts every tensor's values in a
histogram between its extremes; so memory does not grow with the number of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mvit_export.errors import ConversionError

BINS = 2048
LEVELS = 256  # of int8
CLIPPED = 1e-4  # percentile: the share of values that may lie outside, half of it at each end
STEPS = 64  # entropy: how many places are tried for each end
EMPTY = 1e-9  # entropy: the probability of a value where none was seen

Range = tuple[float, float]
Key = TypeVar("Key", bound=Hashable)  # a tensor's name or index


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many values lie in each of BINS equal parts of [low, high]."""

    low: float
    high: float
    counts: np.ndarray

    def edge(self, index: int) -> float:
        return self.low + (self.high - self.low) * index / BINS


def learn_ranges(passes: Callable[[], Iterator[Mapping[Key, np.ndarray]]], method: str) -> dict[Key, Range]:
    """The range of each tensor by one of `calibration.METHODS`; zero always lies in it.

    Every call of `passes` runs all inputs again and yields the tensors of each.

    Raises ConversionError for NaN or Inf, which has no range.
    """
    extremes = find_extremes(passes())
    if method == "minmax":
        return {name: with_zero(bounds) for name, bounds in extremes.items()}
    choose = {"percentile": percentile, "entropy": entropy}[method]
    return {name: with_zero(choose(histogram)) for name, histogram in count_values(passes(), extremes).items()}


def with_zero(bounds: Range) -> Range:
    """Zero is what padding adds and what ReLU cuts at: it must be exact."""
    return min(bounds[0], 0.0), max(bounds[1], 0.0)


def find_extremes(runs: Iterator[Mapping[Key, np.ndarray]]) -> dict[Key, Range]:
    found: dict[Key, Range] = {}
    for tensors in runs:
        for name, array in tensors.items():
            low, high = float(array.min()), float(array.max())
            if not np.isfinite([low, high]).all():
                raise ConversionError("calibration found NaN or Inf in the network: int8 has no range for it")
            before = found.get(name, (low, high))
            found[name] = min(low, before[0]), max(high, before[1])
    return found


def count_values(runs: Iterator[Mapping[Key, np.ndarray]], extremes: Mapping[Key, Range]) -> dict[Key, Histogram]:
    found = {name: Histogram(*bounds, np.zeros(BINS, np.int64)) for name, bounds in extremes.items()}
    for tensors in runs:
        for name, array in tensors.items():
            histogram = found[name]
            counts, _ = np.histogram(array, BINS, (histogram.low, histogram.high))
            histogram.counts[:] += counts
    return found


def percentile(histogram: Histogram) -> Range:
    """The range without the outermost values, CLIPPED of them in all."""
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    first = int(np.searchsorted(share, CLIPPED / 2, side="right"))
    last = int(np.searchsorted(share, 1 - CLIPPED / 2))
    return histogram.edge(first), histogram.edge(last + 1)


def entropy(histogram: Histogram) -> Range:
    """The range whose 256 levels keep most of the distribution: first the upper end is chosen, then the lower one."""
    steps = np.unique(np.linspace(LEVELS // 2, BINS, STEPS).astype(int))
    upper = min(steps, key=lambda end: divergence(histogram.counts, 0, end))
    lower = min(BINS - steps, key=lambda start: divergence(histogram.counts, start, upper) if start < upper else np.inf)
    return histogram.edge(int(lower)), histogram.edge(int(upper))


def divergence(counts: np.ndarray, start: int, end: int) -> float:
    """KL, in nats, between the values cut to the bins from `start` to `end` and the same in LEVELS levels.

    The method of TensorRT's calibration: what lies outside is counted in the outermost bins, but in no level; each
    level spreads its values over those of its bins that have any.
    """
    inside = counts[start:end].astype(np.float64)
    cut = inside.copy()
    cut[0] += counts[:start].sum()
    cut[-1] += counts[end:].sum()
    level = np.arange(len(inside)) * LEVELS // len(inside)
    seen = cut > 0
    mean = np.bincount(level, inside) / np.maximum(np.bincount(level, seen), 1)
    p, q = cut[seen] / cut.sum(), np.maximum(mean[level][seen] / max(inside.sum(), 1), EMPTY)
    return float((p * np.log(p / q)).sum())
