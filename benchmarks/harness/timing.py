"""How long to measure, and what the samples say: warm-up, interleaved rounds, intervals. No runtime, no real clock.

A subject is anything that returns `count` times in ms on request. All subjects are sampled in turn, round by round, so
that a machine that slows down slows all of them, and a ratio is taken within each round. Samples of one round share
the machine's state, so the bootstrap resamples rounds, not samples (a cluster bootstrap; Efron & Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 8).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mvit_export.results.fields import Interval
from mvit_export.results.latency import Ratio

Subject = Callable[[int], Sequence[float]]


@dataclass(frozen=True)
class Plan:
    """When enough is measured: every median, and every ratio to the first subject, known to within `precision`."""

    budget_s: float = 30.0  # of each subject, on average, warm-up included
    precision: float = 0.02  # half the width of the 95 % interval over the median
    round_ms: float = 60.0  # of each subject in a round: short, so that neighbours see the same machine
    min_rounds: int = 30
    settle: float = 0.02  # warm-up goes on while chunks get faster by more than this
    patience: int = 3  # chunks


@dataclass(frozen=True)
class Series:
    """The samples of one subject: `rounds` of equal numbers of times in ms.

    `settled`: the precision was reached, in enough rounds for an interval to mean what it says.
    """

    rounds: tuple[tuple[float, ...], ...]
    settled: bool
    warmup: int  # inferences before the first sample

    @property
    def samples(self) -> list[float]:
        return [sample for samples in self.rounds for sample in samples]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.samples, percent))


def measure(
    subjects: Sequence[Subject],
    plan: Plan,
    *,
    clock: Callable[[], float] = time.monotonic,
    on_round: Callable[[int], None] | None = None,
) -> list[Series]:
    """Warm each subject up, then sample all in turn until `plan` is met or its budget is spent.

    The order reverses from one round to the next, so that a steady drift favours nobody.
    """
    end = clock() + plan.budget_s * len(subjects)
    starts = [warm_up(subject, plan, clock=clock) for subject in subjects]
    rounds: list[list[tuple[float, ...]]] = [[] for _ in subjects]
    order = list(range(len(subjects)))
    while True:
        for index in order:
            rounds[index].append(tuple(subjects[index](starts[index].count)))
        order.reverse()
        done = len(rounds[0])
        if on_round:
            on_round(done)
        due = done >= plan.min_rounds and done % CHECK_EVERY == 0
        if (due and all_settled(rounds, plan.precision)) or (clock() >= end and done >= 2):
            break
    return [
        Series(tuple(r), len(r) >= FEWEST_ROUNDS and is_settled(r, plan.precision), start.inferences)
        for r, start in zip(rounds, starts, strict=True)
    ]


@dataclass(frozen=True)
class WarmUp:
    inferences: int
    count: int  # samples in a round


def warm_up(subject: Subject, plan: Plan, *, clock: Callable[[], float] = time.monotonic) -> WarmUp:
    """Run until it gets no faster: caches, allocators, thread pools and clock rates have settled by then.

    That is when `patience` chunks in a row have not beaten the best one; a quarter of the budget ends it as well.
    """
    end = clock() + plan.budget_s / 4
    total, count, best, idle = 0, 1, float("inf"), 0
    while idle < plan.patience and (total == 0 or clock() < end):
        current = statistics.median(subject(count))
        total += count
        idle = 0 if current < best * (1 - plan.settle) else idle + 1
        best = min(best, current)
        count = round_size(best, plan)
    return WarmUp(total, count)


def round_size(ms: float, plan: Plan) -> int:
    return max(1, min(200, round(plan.round_ms / max(ms, 1e-6))))


def all_settled(rounds: Sequence[Sequence[Sequence[float]]], precision: float) -> bool:
    medians = all(is_settled(r, precision) for r in rounds)
    return medians and all(narrow(ratio(r, rounds[0]), precision) for r in rounds[1:])


def is_settled(rounds: Sequence[Sequence[float]], precision: float) -> bool:
    low, high = median_interval(rounds)
    return (high - low) / 2 <= precision * statistics.median(sample for samples in rounds for sample in samples)


def narrow(found: Ratio, precision: float) -> bool:
    return (found.interval[1] - found.interval[0]) / 2 <= precision * found.median


def median_interval(rounds: Sequence[Sequence[float]]) -> Interval:
    """95 % interval of the median of all samples."""
    samples = np.asarray(rounds)  # (rounds, count)
    picks = resamples(len(samples))  # (resamples, rounds)
    return interval_of(np.median(samples[picks].reshape(len(picks), -1), axis=1))


def ratio(rounds: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Ratio:
    """Of subjects sampled in the same rounds."""
    ratios = np.array([statistics.median(a) / statistics.median(b) for a, b in zip(rounds, base, strict=True)])
    picks = resamples(len(ratios))
    return Ratio(float(np.median(ratios)), interval_of(np.median(ratios[picks], axis=1)))


def unpaired_ratio(rounds: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Ratio:
    """Of subjects measured at different times, such as before and after a change: each is resampled by itself."""
    new, old = (np.asarray(r) for r in (rounds, base))
    medians = [
        np.median(samples[resamples(len(samples), seed)].reshape(RESAMPLES, -1), axis=1)
        for seed, samples in enumerate((new, old))
    ]
    return Ratio(float(np.median(new) / np.median(old)), interval_of(medians[0] / medians[1]))


RESAMPLES = 1000
FEWEST_ROUNDS = 6  # with fewer, not even the span from min to max holds the median in 95 % of cases: 1 - 2 ** (1 - n)
CHECK_EVERY = 5  # rounds; during a bootstrap no subject runs


def resamples(count: int, seed: int = 0) -> np.ndarray:
    """Indices of shape (RESAMPLES, count): equal calls give equal intervals."""
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def interval_of(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
