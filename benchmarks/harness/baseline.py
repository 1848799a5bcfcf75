"""Did it become slower? Rows compared with those of an earlier run, or with an artifact measured beside them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mvit_export.artifact import find_artifacts
from mvit_export.benchmarks.harness.timing import FEWEST_ROUNDS, ratio, unpaired_ratio
from mvit_export.errors import ArtifactError, UsageError
from mvit_export.results.latency import LatencyReport, Measurement, Ratio, Slowdown
from mvit_export.results.status import FAIL, MEASURED, NOT_RUN, PASS, worst_status
from mvit_export.system.reading import RECORDS, read_json

KEY = ("model", "format", "precision", "device", "threads", "input_shape")
MACHINE = ("cpu", "cores", "system", "machine")
SAMPLED_TOGETHER = ("threads", "input_shape")
SAME_KIND = ("format", "precision", "runtime")


WALL, CPU = "wall", "cpu"
# `mvit-export bench` of xxs in ONNX fp32, one thread, on two cores of an EPYC: alone it waited for 0 % of the time and
# lost its core 2 times a second; beside two processes that never sleep, for 21 % and 51 times (2026-11-29).
MOST_WAITING = 0.05
MOST_SWITCHES, FEWEST_SWITCHES = 25.0, 10  # a second for each thread; in all
DISAGREEMENT = 0.05


@dataclass(frozen=True)
class Baseline:
    """An earlier report, or artifacts that are measured first; `max_slowdown` of 0.1 lets 10 % pass.

    Figures of two runs are compared only if the machine is the same; measuring side by side is better.
    """

    max_slowdown: float
    by: str = WALL
    report: LatencyReport | None = None
    artifacts: tuple[Path, ...] = ()

    @classmethod
    def read(cls, path: Path | None, max_slowdown: float | None, by: str = WALL) -> Baseline | None:
        """Raises UsageError for `max_slowdown` without `path`, ArtifactError if the file is not from bench."""
        if by not in (WALL, CPU):
            raise UsageError(f"--judge-by is {by!r}, expected {WALL} or {CPU}")
        if path is None and by != WALL:
            raise UsageError("--judge-by says how to compare with --baseline FILE or ARTIFACT; name one")
        if path is None and max_slowdown is None:
            return None
        if path is None:
            raise UsageError("--max-slowdown says how much slower than --baseline FILE or ARTIFACT; name one")
        share = 0.0 if max_slowdown is None else max_slowdown
        if path.is_dir() or path.suffix != ".json":
            return cls(share, by, artifacts=find_artifacts(path))
        return cls(share, by, report=read_report(path))

    def judge(self, report: LatencyReport) -> LatencyReport:
        """The report with a `baseline` verdict in each measured row, and the worst of them as its status.

        A row fails only if the whole interval of its ratio lies beyond the limit.
        """
        rows = [
            replace(row, baseline=self.verdict(row, report)) if row.status == MEASURED else row
            for row in report.results
        ]
        verdicts = [row.baseline.status for row in rows if row.baseline]
        return replace(report, status=worst_status([report.status, *verdicts]), results=tuple(rows))

    def verdict(self, row: Measurement, report: LatencyReport) -> Slowdown:
        if self.report is None:
            return self.beside(row, report)
        found = [r for r in self.report.results if identity(r) == identity(row) and r.samples_ms]
        if not found:
            return not_compared("the baseline has no such row; measure it again once this one is right")
        if len(found) > 1:
            found = [r for r in found if r.path == row.path]
        if len(found) != 1:
            return not_compared("the baseline has several such rows; measure it again with one of each kind")
        old, new = (tuple(r.environment[name] for name in MACHINE) for r in (self.report, report))
        if old != new:
            return not_compared(f"the baseline was measured on {describe(old)}, this is {describe(new)}")
        return self.limit(row, found[0], unpaired_ratio)

    def beside(self, row: Measurement, report: LatencyReport) -> Slowdown:
        """Against the row of the baseline that was sampled in the same rounds and is most alike."""
        own = {str(path) for path in self.artifacts}
        if row.path in own:
            return Slowdown(PASS, "the baseline itself")
        base = most_alike(row, [r for r in report.results if r.path in own and r.samples_ms])
        if base is None:
            return not_compared("the baseline holds no file like this one, of the same input and format")
        return self.limit(row, base, ratio)

    def limit(self, row: Measurement, base: Measurement, compare: Callable[..., Ratio]) -> Slowdown:
        rounds = row.samples_by_round, base.samples_by_round
        if (fewest := min(map(len, rounds))) < FEWEST_ROUNDS:
            return not_compared(f"{fewest} rounds are too few for an interval; measure longer: --budget")
        wall, used = compare(*rounds), (row.cpu_by_round, base.cpu_by_round)
        cpu = compare(*used) if all(used) else None
        if self.by == CPU:
            if cpu is None or not (on_cpu(row) and on_cpu(base)):
                return not_compared("the CPU time of both is not known to be the model's; judge by wall time")
            return self.verdict_on(cpu, "CPU ")
        if reason := starved(row, "this run") or starved(base, "the baseline"):
            return not_compared(reason)
        if cpu is not None and row.threads == 1 and on_cpu(row) and abs(wall.median / cpu.median - 1) > DISAGREEMENT:
            return not_compared(
                f"by wall time it takes {wall} times the baseline, by CPU time {cpu}: something else used the machine "
                "in one of the runs; measure again"
            )
        return self.verdict_on(wall)

    def verdict_on(self, ratio: Ratio, what: str = "") -> Slowdown:
        most = 1 + self.max_slowdown
        slower = ratio.interval[0] > most
        words = f"{ratio} times the baseline{f' in {what}time' if what else ''}, "
        words += f"{'more than' if slower else 'not shown to be over'} {most:g}"
        return Slowdown(FAIL if slower else PASS, words, ratio)


def starved(row: Measurement, which: str) -> str:
    """Why the row's wall times are not its own: other processes used its cores. Empty if there is no sign of it."""
    waited = waiting_share(row)
    if waited is not None and waited > MOST_WAITING:
        return f"in {which} the process waited for a core in {waited:.0%} of the time; measure on an idle machine"
    switches, seconds = (row.involuntary_per_s or 0) / (row.threads or 1), sum(row.samples_ms) / 1e3
    if switches > MOST_SWITCHES and switches * seconds > FEWEST_SWITCHES:
        return f"in {which} a core was taken from the process {switches:.0f} times a second; measure on an idle machine"
    return ""


def on_cpu(row: Measurement) -> bool:
    """Whether the process itself computes. One that waits for an accelerator uses little CPU time, as it should."""
    return "CPU" in row.runtime.split()


def waiting_share(row: Measurement) -> float | None:
    """The part of a single thread's time in which it did not run, in the middle one of the rounds."""
    if row.threads != 1 or not row.cpu_samples_ms or not on_cpu(row):
        return None
    rounds = zip(row.samples_by_round, row.cpu_by_round, strict=True)
    return statistics.median(1 - sum(cpu) / sum(wall) for wall, cpu in rounds)


def read_report(path: Path) -> LatencyReport:
    """The document of an earlier bench, checked before anything is measured."""
    try:
        report = LatencyReport.from_json(read_json(path, RECORDS))
        for row in report.results:
            check_row(row)
        _ = [report.environment[name] for name in MACHINE]
    except (OSError, ValueError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ArtifactError(f"{path} is not a result of bench --json ({reason}); measure it again") from error
    return report


def check_row(row: Measurement) -> None:
    """Raises ValueError if the row does not say what it measured, or its samples are not whole rounds of times."""
    for name in (*KEY, "runtime"):
        if not getattr(row, name):
            raise ValueError(f"{name} is missing")
    samples, count = row.samples_ms, row.samples_per_round or 0
    if samples and (count < 1 or len(samples) % count or not all(sample > 0 for sample in samples)):
        raise ValueError("samples_ms are not whole rounds of times")
    if row.cpu_samples_ms and not (len(row.cpu_samples_ms) == len(samples) and min(row.cpu_samples_ms) > 0):
        raise ValueError("cpu_samples_ms are not the CPU times of samples_ms")


def most_alike(row: Measurement, candidates: Sequence[Measurement]) -> Measurement | None:
    """The only candidate, or the one that stands out: of the same model, else of the same format and runtime."""
    together = [r for r in candidates if all(getattr(r, name) == getattr(row, name) for name in SAMPLED_TOGETHER)]
    same_kind = [r for r in together if all(getattr(r, name) == getattr(row, name) for name in SAME_KIND)]
    same = [r for r in same_kind if r.model == row.model]
    return next((found[0] for found in (same, same_kind, together) if len(found) == 1), None)


def not_compared(reason: str) -> Slowdown:
    return Slowdown(NOT_RUN, reason)


def identity(row: Measurement) -> tuple[Any, ...]:
    """What makes two rows comparable: all but the versions, whose change may be the cause of a slowdown."""
    runtime = tuple(word for word in row.runtime.split() if not word[0].isdigit())
    return (*(getattr(row, name) for name in KEY), row.ort, runtime)


def describe(machine: Sequence[Any]) -> str:
    cpu, cores, system, architecture = machine
    return f"{cpu} with {cores} cores ({system} {architecture})"
