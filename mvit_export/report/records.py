"""What lies in artifact directories, as typed records; whatever is absent, damaged or was not run becomes a `Gap`."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from mvit_export.artifact import Artifact, find_artifacts, read_artifact, record_name
from mvit_export.errors import first_line, printable
from mvit_export.parity import FAIL, NOT_RUN, PASS

MEASURED = "measured"
Record = TypeVar("Record")
Interval = tuple[float, float]


@dataclass(frozen=True)
class Gap:
    """Something that was not run: `command` would run it, where one is known."""

    label: str  # of the artifact
    path: str
    what: str  # parity, latency or accuracy, with the runtime where there is one
    reason: str
    command: str | None = None


@dataclass(frozen=True)
class Verdict:
    """One entry of parity.json: what one runtime showed. Figures are None where nothing was compared."""

    label: str
    path: str
    format: str
    precision: str
    status: str
    reason: str
    note: str  # what a PASS leaves open
    runtime: str | None
    against: str
    inputs: int
    psnr_db: float | None
    max_abs: float | None
    max_rel: float | None
    kl: float | None
    top1: float | None


@dataclass(frozen=True)
class Ratio:
    """A median over that of the first artifact of the run, with its interval."""

    to: str
    median: float
    interval: Interval | None


@dataclass(frozen=True)
class Roofline:
    """Against what the same runtime reached on a large matrix product; rates in GMAC/s and GB/s."""

    peak_gmacs: float | None
    bandwidth_gbs: float | None
    achieved_gmacs: float | None
    peak_share: float | None
    ceiling_ms: float | None


@dataclass(frozen=True)
class Latency:
    """One row of latency.json. Times are in ms, memory in MB; a figure is None where it was not measured."""

    label: str
    path: str
    format: str
    precision: str
    status: str
    reason: str
    runtime: str
    device: str
    threads: int | None
    batch: int | None
    input_shape: tuple[int, ...]
    load_ms: float | None
    load_warm_ms: float | None
    first_ms: float | None
    median_ms: float | None
    median_interval_ms: Interval | None
    p90_ms: float | None
    p99_ms: float | None
    min_ms: float | None
    samples_ms: tuple[float, ...]
    peak_rss_mb: float | None
    macs: float | None
    bytes: float | None
    ratio: Ratio | None
    roofline: Roofline | None
    warnings: tuple[str, ...]
    environment: Mapping[str, Any] = field(hash=False)

    @property
    def machine(self) -> str:
        """Where it ran, in words."""
        parts = [self.environment.get(key) for key in ("cpu", "machine", "system")]
        computer = ", ".join(tidy(part) for part in parts if part) or "an unnamed machine"
        return computer if self.device == "local" else f"{self.device} ({computer})"


@dataclass(frozen=True)
class Accuracy:
    """One row of accuracy.json. Shares are from 0 to 1, points of top-1 in hundredths; None where not measured."""

    label: str
    path: str
    status: str
    reason: str
    runtime: str
    reference: str  # what agreement and KL are against
    source: str  # of the pictures
    images: int
    top1: float | None
    top5: float | None
    ece: float | None
    agreement: float | None
    mean_kl: float | None
    drop_points: float | None
    drop_interval: Interval | None
    gate_status: str  # empty where no --max-drop was given
    gate_reason: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One artifact with all that its JSON files say. `label` is unique within a report."""

    label: str
    path: str
    artifact: Artifact
    verdicts: tuple[Verdict, ...]
    latencies: tuple[Latency, ...]
    accuracies: tuple[Accuracy, ...]
    gaps: tuple[Gap, ...]

    @property
    def unread(self) -> tuple[Gap, ...]:
        """Parity records that are absent or damaged: checks whose outcome is not known."""
        return tuple(gap for gap in self.gaps if gap.what == "parity" and gap.command)

    @property
    def checks(self) -> tuple[str, ...]:
        """How each parity check ended."""
        return (*(verdict.status for verdict in self.verdicts), *(NOT_RUN for _ in self.unread))

    @property
    def status(self) -> str:
        """Parity alone: FAIL outweighs NOT-RUN, which outweighs PASS."""
        return overall(self.checks)

    @property
    def measured(self) -> tuple[Latency, ...]:
        return tuple(row for row in self.latencies if row.status == MEASURED)

    @property
    def fastest(self) -> Latency | None:
        timed = [row for row in self.measured if row.median_ms is not None]
        return min(timed, key=lambda row: row.median_ms or math.inf, default=None)


@dataclass(frozen=True)
class Report:
    """What `read_report` found, small models first."""

    entries: tuple[Entry, ...]

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(verdict for entry in self.entries for verdict in entry.verdicts)

    @property
    def measured(self) -> tuple[Latency, ...]:
        return tuple(row for entry in self.entries for row in entry.measured)

    @property
    def scored(self) -> tuple[Accuracy, ...]:
        return tuple(row for entry in self.entries for row in entry.accuracies if row.status != NOT_RUN)

    @property
    def gaps(self) -> tuple[Gap, ...]:
        return tuple(gap for entry in self.entries for gap in entry.gaps)

    @property
    def status(self) -> str:
        return overall([entry.status for entry in self.entries])

    @property
    def checks(self) -> Mapping[str, int]:
        """How many parity checks ended how; a record that is absent or damaged is one that did not run."""
        counts = Counter(status for entry in self.entries for status in entry.checks)
        return {status: counts[status] for status in (PASS, FAIL, NOT_RUN)}

    @property
    def headline(self) -> str:
        """The verdict in one sentence."""
        counts, total = self.checks, sum(self.checks.values())
        if counts[FAIL]:
            return f"{counts[FAIL]} of {total} parity checks failed"
        if counts[NOT_RUN]:
            return f"nothing failed, but {counts[NOT_RUN]} of {total} parity checks did not run"
        return f"all {total} parity checks passed" if total > 1 else "the parity check passed"

    @property
    def latency_line(self) -> str:
        missing = sum(gap.what.startswith("latency") for gap in self.gaps)
        count = len(self.measured)
        return f"{count} latenc{'y' if count == 1 else 'ies'} measured" + (f", {missing} not run" if missing else "")

    def to_json(self) -> dict[str, Any]:
        """Counts and gaps: the tables themselves are in parity.json, latency.json and accuracy.json."""
        gaps = [{"path": g.path, "what": g.what, "reason": g.reason, "command": g.command} for g in self.gaps]
        counts = {"parity": dict(self.checks), "measured": len(self.measured), "scored": len(self.scored)}
        return {"verdict": self.status, **counts, "not_run": gaps}


def overall(statuses: Sequence[str]) -> str:
    """As parity.overall_status, of bare words."""
    return FAIL if FAIL in statuses else NOT_RUN if NOT_RUN in statuses or not statuses else PASS


def read_report(paths: Iterable[str | Path]) -> Report:
    """Read every artifact that `paths` mean, each once.

    Raises ArtifactError where an artifact is missing, damaged or no longer fits its manifest. A JSON file that is
    absent or damaged is no error but a `Gap`.
    """
    places = {place.resolve(): place for path in paths for place in find_artifacts(path)}
    artifacts = sorted(map(read_artifact, places.values()), key=order)
    return Report(with_unscored(tuple(map(read_entry, artifacts, unique_labels(artifacts)))))


def with_unscored(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Accuracy that was never measured is a gap only beside artifacts whose accuracy was."""
    if not any(entry.accuracies for entry in entries):
        return entries
    return tuple(entry if entry.accuracies else with_accuracy_gap(entry) for entry in entries)


def with_accuracy_gap(entry: Entry) -> Entry:
    if any(gap.what == "accuracy" for gap in entry.gaps):
        return entry
    call = command("eval", entry.artifact.path) + " --data DIR"
    gap = Gap(entry.label, entry.path, "accuracy", "was never measured: there is no accuracy.json", call)
    return replace(entry, gaps=(*entry.gaps, gap))


def order(artifact: Artifact) -> tuple[float, str, str, str]:
    """Small models first, the formats of one side by side."""
    manifest = artifact.manifest
    return manifest.model.macs, manifest.model.name, manifest.format, manifest.precision


def unique_labels(artifacts: Sequence[Artifact]) -> list[str]:
    """`mobilevit_xxs onnx-fp32`, with the path behind it where two are called the same."""
    names = [f"{artifact.manifest.model.name} {artifact.manifest.target.name}" for artifact in artifacts]
    twice = {name for name, count in Counter(names).items() if count > 1}
    pairs = zip(names, artifacts, strict=True)
    return [f"{name} ({tidy(artifact.path)})" if name in twice else name for name, artifact in pairs]


def read_entry(artifact: Artifact, label: str) -> Entry:
    """The records of this machine and of every device that was asked, each in a file of its own."""
    path = tidy(artifact.path)
    verdicts, no_parity = read_records(
        artifact, "parity", lambda data: read_verdicts(data, artifact, label), absent="was never verified"
    )
    latencies, no_latency = read_records(
        artifact, "latency", lambda data: read_latencies(data, artifact, label), absent="was never measured"
    )
    gaps = [Gap(label, path, "parity", problem, command("verify", artifact.path)) for problem in no_parity]
    gaps += [Gap(label, path, said("parity", v.runtime), v.reason) for v in verdicts if v.status == NOT_RUN]
    gaps += [Gap(label, path, "latency", problem, command("bench", artifact.path)) for problem in no_latency]
    gaps += [Gap(label, path, said("latency", row.runtime), row.reason) for row in latencies if row.status != MEASURED]
    accuracies, no_accuracy = read_accuracies(artifact, label)
    gaps += [Gap(label, path, "accuracy", problem) for problem in no_accuracy]
    gaps += [Gap(label, path, said("accuracy", row.runtime), row.reason) for row in accuracies if row.status == NOT_RUN]
    return Entry(label, path, artifact, verdicts, latencies, accuracies, tuple(gaps))


def read_records(
    artifact: Artifact, kind: str, read: Callable[[Any], tuple[Record, ...]], *, absent: str
) -> tuple[tuple[Record, ...], list[str]]:
    """(the records of all devices, why there is nothing, for each file without any). One device's file is enough."""
    files = sorted({*artifact.path.glob(f"{kind}.json"), *artifact.path.glob(f"{kind}.*.json")})
    found = [read_file(file, read, absent=absent) for file in files or [artifact.path / record_name(kind)]]
    return tuple(row for rows, _ in found for row in rows), [problem for _, problem in found if problem]


def said(what: str, runtime: str | None) -> str:
    return f"{what} in {runtime}" if runtime else what


def command(name: str, path: Path) -> str:
    return tidy(f"mvit-export {name} {shlex.quote(str(path))}")


def read_file(
    path: Path, read: Callable[[Any], tuple[Record, ...]], *, absent: str
) -> tuple[tuple[Record, ...], str | None]:
    """(the records of one JSON file, None), or (nothing, why there is nothing)."""
    try:
        records = read(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return (), f"{absent}: there is no {path.name}"
    except OSError as error:
        return (), f"{path.name} cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return (), f"{path.name} is damaged: {first_line(error)}"
    return (records, None) if records else ((), f"{path.name} has no entry for this artifact")


def read_verdicts(data: Any, artifact: Artifact, label: str) -> tuple[Verdict, ...]:
    """Raises ValueError where parity.json is not what `verify` writes, or speaks of another artifact."""
    rows = [Fields(row, "a verdict") for row in Fields(data, "the document").items("artifacts")]
    return tuple(read_verdict(row, artifact, label) for row in rows)


def read_verdict(row: Fields, artifact: Artifact, label: str) -> Verdict:
    row.expect_target(artifact)
    figures = row.sub("metrics") or Fields({}, "metrics")
    status = row.one_of("status", (PASS, FAIL, NOT_RUN))
    verdict = Verdict(
        label=label,
        path=tidy(artifact.path),
        format=artifact.manifest.format,
        precision=artifact.manifest.precision,
        status=status,
        reason=row.text("reason"),
        note=row.text("note"),
        runtime=row.text("runtime") or None,
        against=row.text("against"),
        inputs=row.count("inputs") or 0,
        psnr_db=figures.number("psnr_db", least=-math.inf),
        max_abs=figures.number("max_abs"),
        max_rel=figures.number("max_rel"),
        kl=figures.number("kl"),
        top1=figures.number("top1_agreement"),
    )
    if status == PASS and verdict.psnr_db is None:
        raise ValueError("a PASS without figures")
    if status != PASS and not verdict.reason:
        raise ValueError(f"{status.upper()} without a reason")
    return verdict


def read_latencies(data: Any, artifact: Artifact, label: str) -> tuple[Latency, ...]:
    """Raises ValueError where latency.json is not what `bench` writes, or speaks of another artifact."""
    document = Fields(data, "the document")
    environment = document.sub("environment")
    if environment is None:
        raise ValueError("environment is missing")
    rows = [Fields(row, "a result") for row in document.items("results")]
    return tuple(read_latency(row, artifact, label, environment.data) for row in rows)


def read_latency(row: Fields, artifact: Artifact, label: str, environment: Mapping[str, Any]) -> Latency:
    row.expect_target(artifact)
    status = row.one_of("status", (MEASURED, NOT_RUN))
    latency = Latency(
        label=label,
        path=tidy(artifact.path),
        format=artifact.manifest.format,
        precision=artifact.manifest.precision,
        status=status,
        reason=row.text("reason"),
        runtime=row.text("runtime"),
        device=row.text("device") or "local",
        threads=row.count("threads"),
        batch=row.count("batch"),
        input_shape=tuple(int(n) for n in row.numbers("input_shape")),
        load_ms=row.number("load_ms"),
        load_warm_ms=row.number("load_warm_ms"),
        first_ms=row.number("first_ms"),
        median_ms=row.number("median_ms"),
        median_interval_ms=row.interval("median_interval_ms"),
        p90_ms=row.number("p90_ms"),
        p99_ms=row.number("p99_ms"),
        min_ms=row.number("min_ms"),
        samples_ms=row.numbers("samples_ms"),
        peak_rss_mb=row.number("peak_rss_mb"),
        macs=row.number("macs"),
        bytes=row.number("bytes"),
        ratio=read_ratio(row.sub("ratio")),
        roofline=read_roofline(row.sub("roofline")),
        warnings=tuple(map(tidy, row.items("warnings"))),
        environment=environment,
    )
    if status == NOT_RUN and not latency.reason:
        raise ValueError("NOT-RUN without a reason")
    if status == MEASURED and latency.median_ms is None:
        raise ValueError("measured, but without a median")
    return latency


def read_ratio(row: Fields | None) -> Ratio | None:
    median = row.number("median") if row else None
    return None if row is None or median is None else Ratio(row.text("to"), median, row.interval("interval"))


def read_roofline(row: Fields | None) -> Roofline | None:
    return Roofline(**{name: row.number(name) for name in Roofline.__dataclass_fields__}) if row else None


def read_accuracies(artifact: Artifact, label: str) -> tuple[tuple[Accuracy, ...], list[str]]:
    """(the records, why a file has none); no file at all is neither."""
    file = artifact.path / record_name("accuracy")
    if not file.exists():
        return (), []
    rows, problem = read_file(file, lambda data: read_accuracy(data, artifact, label), absent="")
    return rows, [problem] if problem else []


def read_accuracy(data: Any, artifact: Artifact, label: str) -> tuple[Accuracy, ...]:
    """Raises ValueError where accuracy.json is not what `eval` writes, or speaks of another artifact."""
    document = Fields(data, "the document")
    environment = document.sub("environment") or Fields({}, "environment")
    source = (environment.sub("data") or Fields({}, "data")).text("source")
    rows = [Fields(row, "a result") for row in document.items("results")]
    return tuple(read_accuracy_row(row, artifact, label, source) for row in rows)


def read_accuracy_row(row: Fields, artifact: Artifact, label: str, source: str) -> Accuracy:
    row.expect_target(artifact)
    gate = row.sub("gate") or Fields({}, "gate")
    accuracy = Accuracy(
        label=label,
        path=tidy(artifact.path),
        status=row.one_of("status", (MEASURED, FAIL, NOT_RUN)),
        reason=row.text("reason"),
        runtime=row.text("runtime"),
        reference=row.text("reference"),
        source=source,
        images=row.count("images") or 0,
        top1=row.number("top1"),
        top5=row.number("top5"),
        ece=row.number("ece"),
        agreement=row.number("agreement"),
        mean_kl=row.number("mean_kl"),
        drop_points=row.number("drop_points", least=-100),
        drop_interval=row.interval("drop_interval", least=-100),
        gate_status=gate.one_of("status", (PASS, FAIL)) if gate.data else "",
        gate_reason=gate.text("reason"),
        warnings=tuple(map(tidy, row.items("warnings"))),
    )
    if accuracy.status == MEASURED and accuracy.top1 is None:
        raise ValueError("measured, but without top-1")
    if accuracy.status != MEASURED and not accuracy.reason:
        raise ValueError(f"{accuracy.status.upper()} without a reason")
    return accuracy


class Fields:
    """A JSON object of unknown quality: every getter gives the asked type or raises ValueError naming the field."""

    def __init__(self, data: Any, what: str) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{what} is {kind(data)}, expected an object")
        self.data = data

    def get(self, key: str) -> Any:
        return self.data.get(key)

    def sub(self, key: str) -> Fields | None:
        return None if self.get(key) is None else Fields(self.get(key), key)

    def items(self, key: str) -> list[Any]:
        value = [] if self.get(key) is None else self.get(key)
        if not isinstance(value, list):
            raise ValueError(f"{key} is {kind(value)}, expected a list")
        return value

    def text(self, key: str) -> str:
        """One printable line; empty where there is none."""
        value = "" if self.get(key) is None else self.get(key)
        if not isinstance(value, str):
            raise ValueError(f"{key} is {kind(value)}, expected text")
        return tidy(value)

    def one_of(self, key: str, choices: Sequence[str]) -> str:
        if (value := self.text(key)) not in choices:
            raise ValueError(f"{key} is {value!r}, expected {' or '.join(choices)}")
        return value

    def number(self, key: str, *, least: float = 0) -> float | None:
        return None if self.get(key) is None else number(self.get(key), key, least)

    def count(self, key: str) -> int | None:
        value = self.number(key)
        return None if value is None else int(value)

    def numbers(self, key: str, *, least: float = 0) -> tuple[float, ...]:
        return tuple(number(value, key, least) for value in self.items(key))

    def interval(self, key: str, *, least: float = 0) -> Interval | None:
        values = self.numbers(key, least=least)
        if len(values) not in (0, 2) or sorted(values) != list(values):
            raise ValueError(f"{key} is no interval")
        return (values[0], values[1]) if values else None

    def expect_target(self, artifact: Artifact) -> None:
        """A file copied from elsewhere must not speak for this artifact."""
        manifest = artifact.manifest
        for key, expected in (("format", manifest.format), ("precision", manifest.precision)):
            if (found := self.text(key)) != expected:
                raise ValueError(f"{key} is {found!r}, this artifact's is {expected}")


def number(value: Any, key: str, least: float) -> float:
    """A finite float from `least` on. bool is no number, though Python says so."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{key} is {kind(value)}, expected a number")
    if not abs(value) <= MOST or value < least:
        raise ValueError(f"{key} is out of range, expected a number{' from 0 on' if least == 0 else ''}")
    return float(value)


MOST = 1e15  # nothing that is reported comes near; also what makes NaN, infinities and endless integers stop here


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def tidy(text: Any) -> str:
    """One line without control characters, whatever a file or a path holds."""
    return printable(" ".join(str(text).split()), 2000)
