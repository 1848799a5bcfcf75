"""The arithmetic of the latency harness, with a clock and subjects made up here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from mvit_export.benchmarks.harness.timing import (
    FEWEST_ROUNDS,
    Plan,
    Ratio,
    measure,
    median_interval,
    narrow,
    ratio,
    unpaired_ratio,
    warm_up,
)


class Machine:
    """A clock that subjects move. `load(now)` multiplies every time: a neighbour that comes and goes."""

    def __init__(self, load=lambda now: 1.0, seed: int = 0) -> None:
        self.now, self.load, self.rng = 0.0, load, np.random.default_rng(seed)

    def clock(self) -> float:
        return self.now

    def subject(self, ms: float, *, noise: float = 0.01, cold: Sequence[float] = ()):
        waiting = list(cold)
        self.calls: list[int] = []

        def sample(count: int) -> list[float]:
            times = []
            for _ in range(count):
                factor = waiting.pop(0) if waiting else 1.0
                times.append(ms * factor * self.load(self.now) * float(np.exp(noise * self.rng.standard_normal())))
                self.now += times[-1] / 1e3
            return times

        return sample


def test_quiet_machine_settles_at_the_true_median_long_before_the_budget():
    machine = Machine()
    (series,) = measure([machine.subject(10.0)], Plan(budget_s=60), clock=machine.clock)
    assert series.settled
    assert series.median == pytest.approx(10.0, rel=0.01)
    assert machine.now < 5
    assert len(series.samples) == sum(map(len, series.rounds))


@pytest.mark.slow
def test_ratio_holds_on_a_machine_whose_speed_swings_threefold():
    def load(now: float) -> float:
        return 2 + np.sin(now / 3)

    machine = Machine(load=load)
    a, b = measure([machine.subject(10.0), machine.subject(8.0)], Plan(budget_s=20), clock=machine.clock)
    assert not a.settled  # its median depends on when one looks
    found = ratio(b.rounds, a.rounds)
    assert found.median == pytest.approx(0.8, rel=0.01)
    assert found.interval[0] < 0.8 < found.interval[1]
    assert narrow(found, 0.02)


def test_budget_ends_what_never_settles():
    machine = Machine()
    (series,) = measure([machine.subject(10.0, noise=1.5)], Plan(budget_s=3, precision=1e-4), clock=machine.clock)
    assert not series.settled
    assert 3 <= machine.now < 4


def test_a_slow_model_is_sampled_twice_even_beyond_its_budget():
    machine = Machine()
    (series,) = measure([machine.subject(30_000.0)], Plan(budget_s=1), clock=machine.clock)
    assert len(series.rounds) == 2
    assert series.warmup == 1


def test_few_rounds_are_never_settled_however_alike():
    machine = Machine()
    (series,) = measure([machine.subject(30_000.0, noise=0)], Plan(budget_s=1), clock=machine.clock)
    assert not series.settled
    (series,) = measure([machine.subject(10.0, noise=0)], Plan(budget_s=1), clock=machine.clock)
    assert len(series.rounds) >= FEWEST_ROUNDS and series.settled


def test_warm_up_runs_until_it_gets_no_faster():
    machine = Machine()
    cold = [5.0] + [2.0] * 12 + [1.3] * 12
    start = warm_up(machine.subject(5.0, noise=0, cold=cold), Plan(), clock=machine.clock)
    assert start.inferences > len(cold)
    assert start.count == 12  # 60 ms a round


def test_cold_runs_are_no_samples():
    machine = Machine()
    subject = machine.subject(5.0, cold=[20.0] * 3 + [2.0] * 10)
    (series,) = measure([subject], Plan(), clock=machine.clock)
    assert max(series.samples) < 6


def test_order_turns_round_so_that_neither_always_goes_first():
    order: list[str] = []

    def named(name: str):
        return lambda count: order.append(name) or [1.0] * count

    measure([named("a"), named("b")], replace(Plan(), min_rounds=5, round_ms=1), clock=lambda: 0.0)
    sampled = order[-10:]
    assert sampled == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]


@pytest.mark.slow
def test_interval_covers_the_true_median_as_often_as_it_claims():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        mood = np.exp(0.05 * rng.standard_normal((30, 1)))  # each round has its own
        low, high = median_interval(10 * mood * np.exp(0.01 * rng.standard_normal((30, 5))))
        hits += low <= 10 <= high
    assert 180 <= hits <= 199


def test_interval_of_clustered_samples_is_wider_than_one_of_independent_ones():
    rng = np.random.default_rng(2)
    independent = np.exp(0.1 * rng.standard_normal((20, 10)))
    clustered = np.repeat(np.exp(0.1 * rng.standard_normal((20, 1))), 10, axis=1)
    widths = [high - low for low, high in map(median_interval, (independent, clustered))]
    assert widths[1] > 1.5 * widths[0]


def test_unpaired_ratio_knows_both_uncertainties():
    rng = np.random.default_rng(3)
    old, new = (scale * np.exp(0.02 * rng.standard_normal((40, 5))) for scale in (10.0, 11.0))
    found = unpaired_ratio(new, old)
    assert found.median == pytest.approx(1.1, rel=0.01)
    assert found.interval[0] < 1.1 < found.interval[1]
    assert found.interval[1] - found.interval[0] > ratio(new, old).interval[0] * 0.001


def test_ratio_is_printed_with_its_interval():
    assert str(Ratio(0.8462, (0.8111, 0.8905))) == "0.846 [0.811, 0.890]"
