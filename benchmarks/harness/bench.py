"""`mvit-export bench`: artifacts timed side by side, each in a process of its own, and what the figures are worth."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mvit_export.artifact import find_artifacts, now, read_artifact, record_name, write_json
from mvit_export.benchmarks.devices.base import Device, Probe
from mvit_export.benchmarks.devices.table import open_device
from mvit_export.benchmarks.devices.worker import RunError
from mvit_export.benchmarks.harness.baseline import WALL, Baseline
from mvit_export.benchmarks.harness.configurations import Setting, plan_settings
from mvit_export.benchmarks.harness.roofline import Peaks, measure_roofline
from mvit_export.benchmarks.harness.timing import FEWEST_ROUNDS, Plan, Series, measure, median_interval, ratio
from mvit_export.errors import ArtifactError, DeviceError, MissingDependencyError, RuntimeUnavailable, UsageError
from mvit_export.formats.choices import parse_size
from mvit_export.formats.table import FULL
from mvit_export.results.latency import LatencyReport, Measurement, OpTime, Ratio, Roofline
from mvit_export.results.status import MEASURED, NOT_RUN, worst_status

PROFILE_RUNS = 30

Step = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to measure. `pin`: keep each process on as many cores as it has threads."""

    plan: Plan = field(default_factory=Plan)
    roofline: bool = True
    profile: bool = False
    pin: bool = True
    binary: Path | None = None  # TFLite's benchmark_model, for a phone


def run_bench(
    paths: Sequence[Path],
    *,
    runtimes: Sequence[str] = (),
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (),
    sizes: Sequence[str] = (),
    device: str = "local",
    device_python: str | None = None,
    baseline: Path | None = None,
    max_slowdown: float | None = None,
    judge_by: str = WALL,
    options: Options | None = None,
    on_step: Step = lambda _: None,
) -> LatencyReport:
    """What the command does: find the artifacts, measure them, compare them with a baseline, store latency.json.

    Raises DeviceError if latency cannot be measured on the device.
    """
    reference = Baseline.read(baseline, max_slowdown, judge_by)
    places: dict[Path, Path] = {}  # each once, whatever names it was given by
    for place in [*(reference.artifacts if reference else ()), *(p for path in paths for p in find_artifacts(path))]:
        places.setdefault(place.resolve(), place)
    artifacts = [read_artifact(place) for place in places.values()]
    settings = plan_settings(
        artifacts, runtimes=runtimes, threads=threads, batches=batches, sizes=[parse_size(size) for size in sizes]
    )
    options = options or Options()
    target = open_device(device, python=device_python, binary=options.binary)
    if target.latency_refusal:
        raise DeviceError(target.latency_refusal)
    with target as entered:
        report = Bench(entered, options, on_step).run(settings)
    if reference:
        report = reference.judge(report)
    return store(report)


RESTLESS = "its threads never slept between rounds: they took time from the others"
ROUNDS_ONLY = "each sample is the figure of one round, single runs are not known here: no percentiles"
Running = Sequence[tuple[Measurement, Probe]]  # the row of each loaded model


@dataclass
class Bench:
    """Measures settings on an entered device, and remembers the peaks it found.

    Raises DeviceError if the device is lost, ArtifactError if a runtime rejects a file, RuntimeUnavailable if a runtime
    that was asked for by name is not available; a default one is NOT-RUN then.
    """

    device: Device
    options: Options = field(default_factory=Options)
    on_step: Step = lambda _: None
    environment: dict[str, Any] = field(default_factory=dict)
    peaks: dict[tuple[str, int], Peaks] = field(default_factory=dict)

    def run(self, settings: Sequence[Setting]) -> LatencyReport:
        """The document of `bench --json`."""
        self.check_threads(settings)
        rows: list[Measurement] = []
        for _, members in itertools.groupby(settings, key=lambda setting: setting.group):
            rows += self.run_group(list(members))
        started = {"created": now(), "device": self.device.name, "plan": asdict(self.options.plan)}
        return LatencyReport(worst_status(row.status for row in rows), started | self.environment, tuple(rows))

    def check_threads(self, settings: Sequence[Setting]) -> None:
        """Refuse more threads than the last group could have, before the first one is measured."""
        counts = {setting.threads for setting in settings}
        if not self.options.pin or len(counts) == 1:
            return  # it is refused as soon as a model is opened
        cores = self.device.cores()
        if cores is not None and max(counts) > cores:
            raise UsageError(
                f"{max(counts)} threads were asked for, {self.device.name} has {cores} cores for a process"
            )

    def run_group(self, settings: Sequence[Setting]) -> list[Measurement]:
        """Sample the settings in turn; a row for each, with the reason for those that cannot run here."""
        with ExitStack() as stack:
            loaded = [self.load(stack, setting) for setting in settings]
            running = [(row, probe) for row, probe in loaded if probe]
            sampled = iter(self.sample(running) if running else ())
        rows = [next(sampled) if probe else row for row, probe in loaded]
        if not (self.options.roofline and self.device.has_roofline):
            return rows
        return [self.with_roofline(row, setting) for row, setting in zip(rows, settings, strict=True)]

    def load(self, stack: ExitStack, setting: Setting) -> tuple[Measurement, Probe | None]:
        """What is known before anything is sampled, and the loaded model, if the runtime is available."""
        row = blank_row(setting, self.device)
        self.on_step(f"loading {setting.artifact.path}")
        try:
            probe = stack.enter_context(self.device.probe(setting, pin=self.options.pin))
        except RuntimeUnavailable as error:
            if setting.asked:
                raise
            return replace(row, reason=str(error)), None
        self.environment.update(probe.environment)
        return row, probe

    def sample(self, running: Running) -> list[Measurement]:
        """The rows with their figures: first all processes are sampled in turn, then each is asked alone."""
        names = ", ".join(probe.setting.artifact.path.name for _, probe in running)
        series = measure(
            [probe.sample for _, probe in running],
            replace(self.options.plan, round_ms=running[0][1].round_ms or self.options.plan.round_ms),
            on_round=lambda count: self.on_step(f"round {count} of {names}"),
        )
        ratios = [None, *(ratio_to_first(found, series[0], running[0]) for found in series[1:])]
        rows = [
            self.finish(replace(row, ratio=compared, **figures(probe, found)), probe)
            for (row, probe), found, compared in zip(running, series, ratios, strict=True)
        ]
        return flag_slower_siblings(rows, [probe.setting.runtime for _, probe in running], series)

    def finish(self, row: Measurement, probe: Probe) -> Measurement:
        """Add what is measured after all sampling."""
        self.on_step(f"{row.path}: memory and a second load")
        row = replace(row, **probe.finish(), placement=probe.placement())
        if not self.options.profile:
            return row
        return or_warning(row, "profile", lambda: tuple(OpTime(**op) for op in probe.profile(PROFILE_RUNS)))

    def with_roofline(self, row: Measurement, setting: Setting) -> Measurement:
        if row.status != MEASURED:
            return row
        self.on_step(f"peak of {row.runtime}")
        return or_warning(row, "roofline", lambda: self.judge(row, setting))

    def judge(self, row: Measurement, setting: Setting) -> Roofline | None:
        """The row against the peak of its runtime, which is measured once for each number of threads.

        The peak is that of an fp32 product, which says nothing about a file whose products are in int8.
        """
        if setting.runtime == "pytorch" or row.macs is None or row.precision not in FULL:
            return None
        key = setting.runtime, setting.threads
        if key not in self.peaks:
            self.peaks[key] = measure_roofline(setting.runtime, row.format, setting.threads, self.device)
        assert row.bytes is not None and row.median_ms is not None
        return self.peaks[key].judge(macs=row.macs, weight_bytes=row.bytes, median_ms=row.median_ms)


def blank_row(setting: Setting, device: Device) -> Measurement:
    """What is known before anything ran. MACs are those of the whole batch at the exported size, else unknown."""
    artifact, manifest = setting.artifact, setting.artifact.manifest
    exported = manifest.inputs[0].shape
    known = setting.input_shape[1:] == exported[1:]
    return Measurement(
        path=str(artifact.path),
        model=manifest.model.name,
        variant=manifest.model.variant,
        format=manifest.format,
        precision=manifest.precision,
        ort=manifest.target.ort,
        status=NOT_RUN,
        runtime=setting.runtime,
        device=device.name,
        threads=setting.threads,
        batch=setting.input_shape[0],
        input_shape=tuple(setting.input_shape),
        macs=manifest.model.macs * setting.input_shape[0] // (exported[0] or 1) if known else None,
        params=manifest.model.params,
        bytes=artifact.model_bytes,
    )


def figures(probe: Probe, series: Series) -> dict[str, Any]:
    """The fields of a row that sampling fills. Percentiles are those of single runs."""
    percentiles = {}
    if probe.single_runs:
        percentiles = {"p90_ms": series.percentile(90), "p99_ms": series.percentile(99), "min_ms": min(series.samples)}
    return percentiles | cpu_figures(probe, series) | {
        "status": MEASURED, "runtime": probe.runtime, "load_ms": probe.load_ms, "first_ms": probe.first_ms,
        "median_ms": series.median, "median_interval_ms": median_interval(series.rounds),
        "samples_ms": tuple(series.samples), "samples_per_round": len(series.rounds[0]), "rounds": len(series.rounds),
        "settled": series.settled, "warnings": tuple(doubts(probe, series)),
    }  # fmt: skip


def cpu_figures(probe: Probe, series: Series) -> dict[str, Any]:
    """What the process itself used in the rounds that count, and how often it had to wait for another."""
    count, seconds = len(series.rounds), sum(series.samples) / 1e3
    samples = tuple(ms for found in probe.cpu_rounds[-count:] for ms in found)
    if samples and min(samples) <= 0:  # a clock that is too coarse
        samples = ()
    switches = probe.involuntary[-count:]
    return {
        "cpu_median_ms": statistics.median(samples) if samples else None,
        "cpu_samples_ms": samples,
        "involuntary_per_s": sum(switches) / seconds if switches and seconds else None,
    }


def doubts(probe: Probe, series: Series) -> Iterator[str]:
    """What a reader of the figures has to know."""
    if not series.settled:
        yield unsettled(series)
    if not probe.single_runs:
        yield ROUNDS_ONLY
    if probe.restless:
        yield RESTLESS


def unsettled(series: Series) -> str:
    if len(series.rounds) < FEWEST_ROUNDS:
        return (
            f"the time budget ended after {len(series.rounds)} rounds: too few for an interval; give a longer --budget"
        )
    low, high = median_interval(series.rounds)
    width = 50 * (high - low) / series.median
    return f"the time budget ended before the median settled: it is known to within {width:.1f} % only"


def ratio_to_first(series: Series, base: Series, first: tuple[Measurement, Probe]) -> Ratio:
    row, probe = first
    return replace(ratio(series.rounds, base.rounds), to=f"{row.path} in {probe.runtime}")


def flag_slower_siblings(
    rows: Sequence[Measurement], runtimes: Sequence[str], series: Sequence[Series]
) -> list[Measurement]:
    """Say in words which files with fewer bits are slower than their own fp32 file in the same runtime."""
    full = {
        (row.model, runtime): found
        for row, runtime, found in zip(rows, runtimes, series, strict=True)
        if row.precision == "fp32" and not row.ort
    }
    flagged = []
    for row, runtime, found in zip(rows, runtimes, series, strict=True):
        sibling = full.get((row.model, runtime))
        if sibling is not None and row.precision != "fp32" and runtime != "pytorch":
            against = ratio(found.rounds, sibling.rounds)
            if against.interval[0] > 1:
                words = f"{row.precision} is SLOWER than its fp32 sibling here: {against} times its time"
                row = with_warning(row, words)
        flagged.append(row)
    return flagged


def with_warning(row: Measurement, words: str) -> Measurement:
    return replace(row, warnings=(*row.warnings, words))


def or_warning(row: Measurement, name: str, find: Callable[[], Any]) -> Measurement:
    """The row with `find()` as its `name`; if that is not possible here, the row says so in words."""
    try:
        return replace(row, **{name: find()})
    except (RuntimeUnavailable, MissingDependencyError, ArtifactError, RunError) as error:
        return with_warning(row, f"no {name}: {error}")


def store(report: LatencyReport) -> LatencyReport:
    """Write each artifact's rows to its latency.json; a read-only artifact is still measured, and its rows say so."""
    problems: dict[str, str] = {}
    for path in dict.fromkeys(row.path for row in report.results):
        rows = tuple(row for row in report.results if row.path == path)
        status = worst_status(row.status for row in rows)
        try:
            file = Path(path) / record_name("latency", report.environment["device"])
            write_json(file, replace(report, status=status, results=rows).to_json())
        except ArtifactError as error:
            problems[path] = str(error)
    results = [with_warning(row, problems[row.path]) if row.path in problems else row for row in report.results]
    return replace(report, results=tuple(results))
