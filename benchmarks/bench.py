"""`mvit-export bench`: artifacts timed side by side, each in a process of its own, and what the figures are worth."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mvit_export.artifact import find_artifacts, now, read_artifact, record_name, write_json
from mvit_export.benchmarks.adb import Adb
from mvit_export.benchmarks.baseline import Baseline
from mvit_export.benchmarks.devices import Device, open_device
from mvit_export.benchmarks.phone import PhoneProbe
from mvit_export.benchmarks.probe import Probe, start_runner
from mvit_export.benchmarks.roofline import Roofline, measure_roofline
from mvit_export.benchmarks.settings import Setting, plan_settings
from mvit_export.benchmarks.timing import FEWEST_ROUNDS, Plan, Series, measure, median_interval, ratio
from mvit_export.benchmarks.worker import START_TIMEOUT, RunError
from mvit_export.errors import ArtifactError, DeviceError, MissingDependencyError, RuntimeUnavailable, UsageError
from mvit_export.formats import FULL, parse_size

MEASURED, NOT_RUN = "measured", "not-run"
FIGURES = (
    "load_ms", "load_warm_ms", "first_ms", "median_ms", "median_interval_ms", "p90_ms", "p99_ms", "min_ms",
    "samples_per_round", "rounds", "settled", "peak_rss_mb", "ratio", "roofline", "profile", "placement",
)  # fmt: skip
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
    options: Options | None = None,
    on_step: Step = lambda _: None,
) -> dict[str, Any]:
    """What the command does: find the artifacts, measure them, hold them against a baseline, store latency.json.

    Raises DeviceError where the device gives no latency.
    """
    reference = Baseline.read(baseline, max_slowdown)
    places: dict[Path, Path] = {}  # each once, by whatever names it was given
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
        reference.judge(report)
    store(report)
    return report


RESTLESS = "its threads never slept between rounds: they took time from the others"
ROUNDS_ONLY = "each sample is the figure of one round, single runs are not known here: no percentiles"
PHONE_RUNTIMES = ("litert:gpu", "litert:nnapi")
Running = list[tuple[dict[str, Any], Probe | PhoneProbe]]  # the row of each loaded model


@dataclass
class Bench:
    """Measures settings on an entered device, and remembers the peaks it found.

    Raises DeviceError where the device is lost, ArtifactError where a runtime rejects a file,
    RuntimeUnavailable where a runtime that was asked for by name cannot be had; one taken by default is NOT-RUN then.
    """

    device: Device
    options: Options = field(default_factory=Options)
    on_step: Step = lambda _: None
    environment: dict[str, Any] = field(default_factory=dict)
    peaks: dict[tuple[str, int], Roofline] = field(default_factory=dict)

    def run(self, settings: Sequence[Setting]) -> dict[str, Any]:
        """The document of `bench --json`."""
        self.check_threads(settings)
        rows: list[dict[str, Any]] = []
        for _, members in itertools.groupby(settings, key=lambda setting: setting.group):
            rows += self.run_group(list(members))
        missing = any(row["status"] == NOT_RUN for row in rows)
        started = {"created": now(), "device": self.device.name, "plan": asdict(self.options.plan)}
        return {
            "status": "not-run" if missing else "pass",
            "environment": started | self.environment,
            "results": rows,
        }

    def check_threads(self, settings: Sequence[Setting]) -> None:
        """Refuse what the last group could not have before the first one is measured."""
        counts = {setting.threads for setting in settings}
        if isinstance(self.device, Adb) or not self.options.pin or len(counts) == 1:
            return  # a runner refuses it as soon as it opens a model
        with start_runner(self.device) as worker:
            cores = worker.ask("hello", timeout=START_TIMEOUT)["cores"]
        if max(counts) > cores:
            raise UsageError(
                f"{max(counts)} threads were asked for, {self.device.name} has {cores} cores for a process"
            )

    def run_group(self, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """Sample the settings in turn; a row for each, those that cannot run here with the reason."""
        rows = [blank_row(setting, self.device) for setting in settings]
        with ExitStack() as stack:
            running = self.load(stack, settings, rows)
            if running:
                self.sample(running)
        if self.options.roofline and not isinstance(self.device, Adb):
            for row, probe in running:
                self.on_step(f"peak of {row['runtime']}")
                row |= or_warning(row, "roofline", self.judge, row, probe.setting)
        return rows

    def load(self, stack: ExitStack, settings: Sequence[Setting], rows: Sequence[dict[str, Any]]) -> Running:
        running: Running = []
        for setting, row in zip(settings, rows, strict=True):
            self.on_step(f"loading {setting.artifact.path}")
            try:
                probe = stack.enter_context(self.open_probe(setting))
            except RuntimeUnavailable as error:
                if setting.asked:
                    raise
                row["reason"] = str(error)
            else:
                running.append((row, probe))
                self.environment.update(probe.environment)
        return running

    def open_probe(self, setting: Setting) -> Probe | PhoneProbe:
        if isinstance(self.device, Adb):
            return PhoneProbe(setting, self.device, binary=self.options.binary)
        if setting.runtime in PHONE_RUNTIMES:
            raise RuntimeUnavailable(
                f"{setting.runtime} is for phones behind adb; a delegate here: litert:delegate=PATH"
            )
        return Probe(setting, self.device, pin=self.options.pin)

    def sample(self, running: Running) -> None:
        """Fill the rows: all processes in turn first, then what each is asked alone."""
        names = ", ".join(probe.setting.artifact.path.name for _, probe in running)
        series = measure(
            [probe.sample for _, probe in running],
            replace(self.options.plan, round_ms=running[0][1].round_ms or self.options.plan.round_ms),
            on_round=lambda count: self.on_step(f"round {count} of {names}"),
        )
        for (row, probe), found in zip(running, series, strict=True):
            row |= figures(probe, found) | {"status": MEASURED}
            row["ratio"] = ratio_row(found, series[0], running[0][0]) if found is not series[0] else None
            self.on_step(f"{row['path']}: memory and a second load")
            row |= probe.finish() | {"placement": probe.placement()}
            if self.options.profile:
                row |= or_warning(row, "profile", probe.profile, PROFILE_RUNS)
        flag_slower_siblings(running, series)

    def judge(self, row: Mapping[str, Any], setting: Setting) -> dict[str, float] | None:
        """The row against the peak of its runtime, which is measured once for each number of threads.

        That is a product in fp32, which says nothing of a file whose products are in int8.
        """
        if setting.runtime == "pytorch" or row["macs"] is None or row["precision"] not in FULL:
            return None
        key = setting.runtime, setting.threads
        if key not in self.peaks:
            self.peaks[key] = measure_roofline(setting.runtime, row["format"], setting.threads, self.device)
        return self.peaks[key].judge(macs=row["macs"], weight_bytes=row["bytes"], median_ms=row["median_ms"])


def blank_row(setting: Setting, device: Device) -> dict[str, Any]:
    """What is known before anything ran. MACs are those of the whole batch at the exported size, else unknown."""
    artifact, manifest = setting.artifact, setting.artifact.manifest
    exported = manifest.inputs[0].shape
    known = setting.input_shape[1:] == exported[1:]
    return {
        "path": str(artifact.path), "model": manifest.model.name, "variant": manifest.model.variant,
        "format": manifest.format, "precision": manifest.precision, "ort": manifest.target.ort,
        "status": NOT_RUN, "reason": "",
        "runtime": setting.runtime, "device": device.name, "threads": setting.threads, "batch": setting.input_shape[0],
        "input_shape": list(setting.input_shape),
        "macs": manifest.model.macs * setting.input_shape[0] // (exported[0] or 1) if known else None,
        "params": manifest.model.params, "bytes": artifact.model_bytes,
        **dict.fromkeys(FIGURES), "samples_ms": [], "warnings": [],
    }  # fmt: skip


def figures(probe: Probe | PhoneProbe, series: Series) -> dict[str, Any]:
    percentiles = {"p90_ms": None, "p99_ms": None, "min_ms": None}
    if probe.single_runs:
        percentiles = {"p90_ms": series.percentile(90), "p99_ms": series.percentile(99), "min_ms": min(series.samples)}
    return percentiles | {
        "runtime": probe.runtime, "load_ms": probe.load_ms, "first_ms": probe.first_ms,
        "median_ms": series.median, "median_interval_ms": list(median_interval(series.rounds)),
        "samples_ms": series.samples, "samples_per_round": len(series.rounds[0]), "rounds": len(series.rounds),
        "settled": series.settled,
        "warnings": list(doubts(probe, series)),
    }  # fmt: skip


def doubts(probe: Probe | PhoneProbe, series: Series) -> Iterator[str]:
    """What a figure's reader has to know."""
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


def ratio_row(series: Series, base: Series, base_row: Mapping[str, Any]) -> dict[str, Any]:
    found = ratio(series.rounds, base.rounds)
    name = f"{base_row['path']} in {base_row['runtime']}"
    return {"to": name, "median": found.median, "interval": list(found.interval)}


def flag_slower_siblings(running: Running, series: Sequence[Series]) -> None:
    """Say in words which file of fewer bits is slower than its own fp32 file in the same runtime."""
    full = {
        (row["model"], probe.setting.runtime): found
        for (row, probe), found in zip(running, series, strict=True)
        if row["precision"] == "fp32" and not row["ort"]
    }
    for (row, probe), found in zip(running, series, strict=True):
        sibling = full.get((row["model"], probe.setting.runtime))
        if sibling is None or row["precision"] == "fp32" or probe.setting.runtime == "pytorch":
            continue
        against = ratio(found.rounds, sibling.rounds)
        if against.interval[0] > 1:
            row["warnings"].append(f"{row['precision']} is SLOWER than its fp32 sibling here: {against} times its time")


def or_warning(row: dict[str, Any], name: str, find: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """`{name: find(*arguments)}`; where it cannot be had here the row says so in words."""
    try:
        return {name: find(*arguments)}
    except (RuntimeUnavailable, MissingDependencyError, ArtifactError, RunError) as error:
        return {"warnings": [*row["warnings"], f"no {name}: {error}"]}


def store(report: dict[str, Any]) -> None:
    """Write each artifact's rows to its latency.json; a read-only artifact is measured all the same and says so."""
    device = report["environment"]["device"]
    for path in dict.fromkeys(row["path"] for row in report["results"]):
        rows = [row for row in report["results"] if row["path"] == path]
        missing = any(row["status"] == NOT_RUN for row in rows)
        try:
            file = Path(path) / record_name("latency", device)
            write_json(file, {**report, "status": "not-run" if missing else "pass", "results": rows})
        except ArtifactError as error:
            for row in rows:
                row["warnings"].append(str(error))
