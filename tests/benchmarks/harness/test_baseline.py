"""The gate: which slowdowns it calls by their name, and which figures it refuses to judge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mvit_export.benchmarks.harness.baseline import CPU, WALL, Baseline
from mvit_export.errors import UsageError
from mvit_export.results.latency import LatencyReport, Measurement
from mvit_export.results.status import FAIL, MEASURED, NOT_RUN, PASS

MACHINE = {"cpu": "x", "cores": 2, "system": "Linux", "machine": "x86_64"}
ROUNDS, EACH = 30, 10


def row(wall: float, cpu: float | None = None, *, switches: float | None = 1.0, threads: int = 1) -> Measurement:
    """A file that takes `wall` ms, of which it runs `cpu` ms; 1 % of noise."""
    noise = np.random.default_rng(int(1000 * wall)).normal(1, 0.01, ROUNDS * EACH)
    cpu_samples = tuple((noise * (wall if cpu is None else cpu)).tolist()) if cpu != 0 else ()
    return Measurement(
        path="a/onnx-fp32", model="a", format="onnx", precision="fp32", status=MEASURED, runtime="ort 1.2.3 CPU",
        threads=threads, input_shape=(1, 3, 8, 8), median_ms=wall, samples_ms=tuple((noise * wall).tolist()),
        samples_per_round=EACH, rounds=ROUNDS, cpu_samples_ms=cpu_samples, involuntary_per_s=switches,
    )  # fmt: skip


def judge(new: Measurement, old: Measurement, *, by: str = WALL, most: float = 0.1) -> tuple[str, str]:
    reports = [LatencyReport("pass", MACHINE, (r,)) for r in (new, old)]
    verdict = Baseline(most, by, report=reports[1]).judge(reports[0]).results[0].baseline
    assert verdict is not None
    return verdict.status, verdict.reason


@pytest.mark.parametrize(
    ("new", "old", "status", "reason"),
    [
        (row(10.0), row(10.02), PASS, "times the baseline, not shown to be over 1.1"),
        (row(11.5), row(10.0), FAIL, "times the baseline, more than 1.1"),
        (row(15.0, 10.2), row(10.0), NOT_RUN, "in this run the process waited for a core in 32% of the time"),
        (row(10.0), row(15.0, 10.2), NOT_RUN, "in the baseline the process waited for a core"),
        (
            row(10.0, switches=120.0),
            row(10.0),
            NOT_RUN,
            "in this run a core was taken from the process 120 times a second",
        ),
        (row(10.6, 10.4), row(10.0), PASS, "not shown"),
        (row(11.0, 10.5), row(10.0, 10.4), NOT_RUN, "something else used the machine in one of the runs"),
        (row(20.0, 38.0, threads=2), row(15.0, 29.0, threads=2), FAIL, "more than 1.1"),
        (row(15.0, 0.0, switches=None), row(10.0, 0.0, switches=None), FAIL, "more than 1.1"),
    ],
    ids=["same", "slower", "starved", "baseline starved", "switched", "close", "disagree", "threads", "no CPU time"],
)
def test_by_wall_time(new: Measurement, old: Measurement, status: str, reason: str) -> None:
    found = judge(new, old)
    assert found[0] == status, found
    assert reason in found[1]


def test_by_cpu_time() -> None:
    assert judge(row(15.0, 10.2), row(10.0), by=CPU)[0] == PASS
    assert judge(row(15.0, 11.6), row(10.0), by=CPU) == (FAIL, judge(row(15.0, 11.6), row(10.0), by=CPU)[1])
    assert "in CPU time, more than 1.1" in judge(row(15.0, 11.6), row(10.0), by=CPU)[1]
    status, reason = judge(row(15.0, 0.0), row(10.0), by=CPU)
    assert (status, reason.split(";")[0]) == (NOT_RUN, "the CPU time of both is not known to be the model's")
    with pytest.raises(UsageError, match="--judge-by is 'clock', expected wall or cpu"):
        Baseline.read(None, None, "clock")
    with pytest.raises(UsageError, match="--judge-by says how to compare with --baseline FILE or ARTIFACT; name one"):
        Baseline.read(None, None, CPU)


def test_an_accelerator_is_waited_for() -> None:
    """The process of a Neural Engine's file sleeps meanwhile: only wall time means something."""
    new, old = (replace(r, runtime="Core ML macOS 15 all") for r in (row(11.5, 0.5), row(10.0, 0.5)))
    assert judge(new, old)[0] == FAIL
    assert judge(old, old)[0] == PASS
    assert judge(new, old, by=CPU)[0] == NOT_RUN


def test_a_few_switches_in_a_short_run_are_none() -> None:
    short = replace(row(0.1, switches=100.0), threads=1)  # 300 runs of 0.1 ms: three switches
    assert judge(short, row(0.1))[0] == PASS


def test_the_record_keeps_cpu_times_if_there_are_any() -> None:
    with_times, without = row(10.0), replace(row(10.0, 0.0), involuntary_per_s=None)
    report = LatencyReport("pass", MACHINE, (with_times, without))
    again = LatencyReport.from_json(report.to_json())
    assert again.results[0].cpu_by_round == with_times.cpu_by_round
    assert "cpu_samples_ms" not in report.to_json()["results"][1]
