"""`mvit-export bench`: artifacts timed side by side, each in a process of its own, and what the figures are worth."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvit_export.artifact import Artifact, now, write_json
from mvit_export.benchmarks.devices import Device
from mvit_export.benchmarks.probe import Probe
from mvit_export.benchmarks.roofline import Roofline, measure_roofline
from mvit_export.benchmarks.settings import Setting
from mvit_export.benchmarks.timing import Plan, Ratio, Series, measure, median_interval, ratio
from mvit_export.errors import DeviceError, MissingDependencyError, RuntimeUnavailable

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


def run_bench(
    paths: Sequence[Path],
    *,
    runtimes: Sequence[str] = (),
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    sizes: Sequence[str] = (),
    device: str = "local",
    device_python: str | None = None,
    benchmark_binary: Path | None = None,
    baseline: Path | None = None,
    max_slowdown: float | None = None,
    options: Options | None = None,
    on_step: Step = lambda _: None,
) -> dict[str, Any]:
    """What the command does: find the artifacts, measure them, hold them against a baseline, store latency.json."""
    reference = Baseline.read(baseline, max_slowdown)
    artifacts = [read_artifact(place) for path in [*reference.artifacts, *paths] for place in find_artifacts(path)]
    settings = plan_settings(
        artifacts, runtimes=runtimes, threads=threads, batches=batches, sizes=[parse_size(size) for size in sizes]
    )
    with open_device(device, python=device_python) as entered:
        report = bench(settings, entered, options=options, on_step=on_step)
    reference.judge(report)
    for note in store(report, device):
        on_step(note)
    return report


def bench(settings: Sequence[Setting], device: Device, *, options: Options | None = None, on_step: Step = lambda _: None) -> dict[str, Any]:
    """Measure every setting on an entered device; the document of `bench --json`.

    Raises DeviceError where the device gives no latency or is lost, ArtifactError where a runtime rejects a file,
    RuntimeUnavailable where a runtime that was asked for by name cannot be had; one taken by default is NOT-RUN then.
    """
    if device.latency_refusal:
        raise DeviceError(device.latency_refusal)
    options = options or Options()
    environment: dict[str, Any] = {"created": now(), "device": device.name, "plan": vars(options.plan)}
    rows: list[dict[str, Any]] = []
    peaks: dict[tuple[str, int], Roofline | str] = {}
    for _, members in itertools.groupby(settings, key=lambda setting: setting.group):
        rows += bench_group(list(members), device, options, peaks, environment, on_step)
    missing = any(row["status"] == NOT_RUN for row in rows)
    return {"status": "not-run" if missing else "pass", "environment": environment, "results": rows}


def bench_group(
    settings: Sequence[Setting],
    device: Device,
    options: Options,
    peaks: dict[tuple[str, int], Roofline | str],
    environment: dict[str, Any],
    on_step: Step,
) -> list[dict[str, Any]]:
    """Sample the settings of one group in turn; a row for each, those that cannot run here with the reason."""
    rows = [blank_row(setting, device) for setting in settings]
    with ExitStack() as stack:
        running: list[tuple[dict[str, Any], Probe]] = []
        for setting, row in zip(settings, rows, strict=True):
            on_step(f"loading {setting.artifact.path}")
            try:
                running.append((row, stack.enter_context(Probe(setting, device, pin=options.pin))))
            except RuntimeUnavailable as error:
                if setting.asked:
                    raise
                row["reason"] = str(error)
        if not running:
            return rows
        environment.update(running[0][1].environment)
        names = ", ".join(probe.setting.artifact.path.name for _, probe in running)
        series = measure(
            [probe.sample for _, probe in running], options.plan, on_round=lambda n: on_step(f"round {n} of {names}")
        )
        for (row, probe), found in zip(running, series, strict=True):
            row |= figures(probe, found) | {"status": MEASURED}
            row["ratio"] = ratio_row(found, series[0], running[0][0]) if found is not series[0] else None
            on_step(f"{row['path']}: a second load{', profile' * options.profile}")
            row |= probe.finish()
            if options.profile:
                row |= or_warning(row, "profile", lambda probe=probe: probe.profile(PROFILE_RUNS))
            row["placement"] = probe.placement()
    if options.roofline:
        for row, probe in running:
            on_step(f"peak of {row['runtime']}")
            row |= or_warning(row, "roofline", lambda row=row, probe=probe: judge(row, probe, device, peaks))
    return rows


def blank_row(setting: Setting, device: Device) -> dict[str, Any]:
    """What is known before anything ran. MACs are those of the whole batch at the exported size, else unknown."""
    artifact, manifest = setting.artifact, setting.artifact.manifest
    known = setting.input_shape[1:] == manifest.inputs[0].shape[1:]
    return {
        "path": str(artifact.path), "model": manifest.model.name, "variant": manifest.model.variant,
        "format": manifest.format, "precision": manifest.precision, "status": NOT_RUN, "reason": "",
        "runtime": setting.runtime, "device": device.name, "threads": setting.threads, "batch": setting.input_shape[0],
        "input_shape": list(setting.input_shape),
        "macs": manifest.model.macs * setting.input_shape[0] if known else None,
        "params": manifest.model.params, "bytes": artifact.model_bytes,
        **dict.fromkeys(FIGURES), "samples_ms": [], "warnings": [],
    }  # fmt: skip


def figures(probe: Probe, series: Series) -> dict[str, Any]:
    warnings = [] if series.settled else [unsettled(series)]
    return {
        "runtime": probe.runtime, "load_ms": probe.load_ms, "first_ms": probe.first_ms,
        "median_ms": series.median, "median_interval_ms": list(median_interval(series.rounds)),
        "p90_ms": series.percentile(90), "p99_ms": series.percentile(99), "min_ms": min(series.samples),
        "samples_ms": series.samples, "samples_per_round": len(series.rounds[0]), "rounds": len(series.rounds),
        "settled": series.settled, "warnings": warnings,
    }  # fmt: skip


def unsettled(series: Series) -> str:
    low, high = median_interval(series.rounds)
    width = 50 * (high - low) / series.median
    return f"the median is known to within {width:.1f} % only: the time budget ended; a quieter machine or --budget helps"


def ratio_row(series: Series, base: Series, base_row: Mapping[str, Any]) -> dict[str, Any]:
    found = ratio(series.rounds, base.rounds)
    return {"to": f"{base_row['path']} in {base_row['runtime']}", "median": found.median, "interval": list(found.interval)}


def or_warning(row: dict[str, Any], name: str, find: Callable[[], Any]) -> dict[str, Any]:
    """`{name: found}`; where it cannot be had here the row says so in words, as no figure was asked to stand for it."""
    try:
        return {name: find()}
    except (RuntimeUnavailable, MissingDependencyError) as error:
        return {"warnings": [*row["warnings"], f"no {name}: {error}"]}


def judge(row: Mapping[str, Any], probe: Probe, device: Device, peaks: dict[tuple[str, int], Any]) -> dict[str, float] | None:
    """The row against the peak of its runtime, which is measured once for each number of threads."""
    if probe.setting.runtime == "pytorch" or row["macs"] is None:
        return None
    key = probe.setting.runtime, probe.setting.threads
    if key not in peaks:
        peaks[key] = measure_roofline(probe.setting.runtime, row["format"], probe.setting.threads, device)
    return peaks[key].judge(macs=row["macs"], weight_bytes=row["bytes"], median_ms=row["median_ms"])


def store(report: Mapping[str, Any], device: Device) -> list[str]:
    """Write each artifact's rows to its latency.json; the paths."""
    written = []
    for path in dict.fromkeys(row["path"] for row in report["results"]):
        rows = [row for row in report["results"] if row["path"] == path]
        missing = any(row["status"] == NOT_RUN for row in rows)
        file = Path(path) / record_name("latency", device.name)
        write_json(file, {**report, "status": "not-run" if missing else "pass", "results": rows})
        written.append(str(file))
    return written
