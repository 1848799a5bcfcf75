"""The contents of artifact directories as typed records; whatever is absent, damaged or not run becomes a `Gap`."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mvit_export.artifact import Artifact, find_artifacts, read_artifact, record_name
from mvit_export.errors import first_line
from mvit_export.results.accuracy import AccuracyReport, ArtifactAccuracy
from mvit_export.results.fields import Record, tidy
from mvit_export.results.latency import LatencyReport, Measurement
from mvit_export.results.parity import ParityReport, ParityResult
from mvit_export.results.status import FAIL, MEASURED, NOT_RUN, PASS, worst_status
from mvit_export.system.reading import RECORDS, read_json

Row = TypeVar("Row", Measurement, ArtifactAccuracy, ParityResult)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Gap:
    """Something that was not run; `command` would run it, if one is known."""

    label: str  # of the artifact
    path: str
    what: str  # parity, latency or accuracy, with the runtime if there is one
    reason: str
    command: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict(ParityResult):
    """A verdict of parity.json as shown: what one runtime found."""

    label: str

    def figure(self, name: str) -> float | None:
        """A figure by its name in parity.json; None if nothing was compared, or the task has none."""
        if self.metrics is None:
            return None
        found: float | None = self.metrics.of_task.get(name, getattr(self.metrics, name, None))
        return found


@dataclass(frozen=True, kw_only=True)
class Latency(Measurement):
    """A row of latency.json as shown: with the machine that it was measured on."""

    label: str
    environment: Mapping[str, Any] = field(hash=False)

    @property
    def machine(self) -> str:
        """A description of where it ran."""
        parts = [self.environment.get(key) for key in ("cpu", "machine", "system")]
        computer = ", ".join(tidy(part) for part in parts if part) or "an unnamed machine"
        return computer if self.device == "local" else f"{self.device} ({computer})"


@dataclass(frozen=True, kw_only=True)
class Accuracy(ArtifactAccuracy):
    """A row of accuracy.json as shown: with the pictures that it was measured on."""

    label: str
    source: str


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
        """Parity records that are absent or damaged: checks whose outcome is unknown."""
        return tuple(gap for gap in self.gaps if gap.what == "parity" and gap.command)

    @property
    def checks(self) -> tuple[str, ...]:
        """How each parity check ended."""
        return (*(verdict.status for verdict in self.verdicts), *(NOT_RUN for _ in self.unread))

    @property
    def status(self) -> str:
        """Only parity: FAIL outweighs NOT-RUN, which outweighs PASS."""
        return worst_status(self.checks)

    @cached_property  # the page asks for every row
    def measured(self) -> tuple[Latency, ...]:
        return tuple(row for row in self.latencies if row.status == MEASURED)

    @cached_property
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

    @cached_property  # the page asks for every row
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
        return worst_status(entry.status for entry in self.entries)

    @property
    def checks(self) -> Mapping[str, int]:
        """How many parity checks ended in which way; an absent or damaged record counts as not run."""
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


def read_report(paths: Iterable[str | Path]) -> Report:
    """Read every artifact that `paths` refer to, each once.

    Raises ArtifactError if an artifact is missing, damaged or no longer fits its manifest. A JSON file that is absent
    or damaged is not an error but a `Gap`.
    """
    places = {place.resolve(): place for path in paths for place in find_artifacts(path)}
    artifacts = sorted(map(read_artifact, places.values()), key=order)
    return Report(with_unscored(tuple(map(read_entry, artifacts, unique_labels(artifacts)))))


def with_unscored(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Accuracy that was never measured is a gap only if that of other artifacts was."""
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
    """`mobilevit_xxs onnx-fp32`, followed by the path if two have the same name."""
    names = [f"{artifact.manifest.model.name} {artifact.manifest.target.name}" for artifact in artifacts]
    twice = {name for name, count in Counter(names).items() if count > 1}
    pairs = zip(names, artifacts, strict=True)
    return [f"{name} ({tidy(artifact.path)})" if name in twice else name for name, artifact in pairs]


def read_entry(artifact: Artifact, label: str) -> Entry:
    """The records of this machine and of every device that was used, each in its own file."""
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
    artifact: Artifact, kind: str, read: Callable[[Any], tuple[Found, ...]], *, absent: str
) -> tuple[tuple[Found, ...], list[str]]:
    """(the records of all devices, the reason for each file without any). One device's file is enough."""
    files = sorted({*artifact.path.glob(f"{kind}.json"), *artifact.path.glob(f"{kind}.*.json")})
    found = [read_file(file, read, absent=absent) for file in files or [artifact.path / record_name(kind)]]
    return tuple(row for rows, _ in found for row in rows), [problem for _, problem in found if problem]


def said(what: str, runtime: str | None) -> str:
    return f"{what} in {runtime}" if runtime else what


def command(name: str, path: Path) -> str:
    return tidy(f"mvit-export {name} {shlex.quote(str(path))}")


def read_file(
    path: Path, read: Callable[[Any], tuple[Found, ...]], *, absent: str
) -> tuple[tuple[Found, ...], str | None]:
    """(the records of one JSON file, None), or (nothing, why there is nothing)."""
    try:
        records = read(read_json(path, RECORDS))
    except FileNotFoundError:
        return (), f"{absent}: there is no {path.name}"
    except OSError as error:
        return (), f"{path.name} cannot be read: {error.strerror}"
    except ValueError as error:
        return (), f"{path.name} is damaged: {first_line(error)}"
    return (records, None) if records else ((), f"{path.name} has no entry for this artifact")


def read_verdicts(data: Any, artifact: Artifact, label: str) -> tuple[Verdict, ...]:
    """Raises ValueError if parity.json is not what `verify` writes, or is about another artifact."""
    return tuple(Verdict(**vars(own(row, artifact)), label=label) for row in ParityReport.from_json(data).artifacts)


def read_latencies(data: Any, artifact: Artifact, label: str) -> tuple[Latency, ...]:
    """Raises ValueError if latency.json is not what `bench` writes, or is about another artifact."""
    document = LatencyReport.from_json(data)
    return tuple(
        Latency(**vars(own(row, artifact)), label=label, environment=document.environment) for row in document.results
    )


def own(row: Row, artifact: Artifact) -> Row:
    """The row made fit to be shown. Raises ValueError for one of another artifact."""
    expect_target(row.format, row.precision, artifact)
    return tidied(replace(row, path=str(artifact.path)))


def expect_target(fmt: str, precision: str, artifact: Artifact) -> None:
    """Refuse a file copied from another artifact."""
    manifest = artifact.manifest
    for key, found, expected in (("format", fmt, manifest.format), ("precision", precision, manifest.precision)):
        if found != expected:
            raise ValueError(f"{key} is {tidy(found)!r}, this artifact's is {expected}")


def tidied(value: Any) -> Any:
    """The record with every text on one line, without control characters."""
    if isinstance(value, str):
        return tidy(value)
    if isinstance(value, tuple):
        return tuple(map(tidied, value))
    if isinstance(value, Record):
        return replace(value, **{name: tidied(field) for name, field in vars(value).items()})  # type: ignore[type-var]
    return value


def read_accuracies(artifact: Artifact, label: str) -> tuple[tuple[Accuracy, ...], list[str]]:
    """(the records, the reason for each file without any); no file at all yields neither."""
    file = artifact.path / record_name("accuracy")
    if not file.exists():
        return (), []
    rows, problem = read_file(file, lambda data: read_accuracy(data, artifact, label), absent="")
    return rows, [problem] if problem else []


def read_accuracy(data: Any, artifact: Artifact, label: str) -> tuple[Accuracy, ...]:
    """Raises ValueError if accuracy.json is not what `eval` writes, or is about another artifact."""
    report = AccuracyReport.from_json(data)
    source = tidy(report.source)
    return tuple(Accuracy(**vars(own(row, artifact)), label=label, source=source) for row in report.results)
