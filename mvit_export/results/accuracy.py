"""accuracy.json: what `eval` found on labelled pictures, one row per artifact and per reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mvit_export.results.fields import Fields, Interval, Record
from mvit_export.results.status import FAIL, MEASURED, NOT_RUN, PASS, worst_status


@dataclass(frozen=True)
class Gate(Record):
    """The verdict on a row, given the points of top-1 that may be lost."""

    max_drop: float | None
    status: str
    reason: str

    @classmethod
    def from_json(cls, row: Fields) -> Gate:
        return cls(row.optional_number("max_drop"), row.one_of("status", (PASS, FAIL)), row.text("reason"))


@dataclass(frozen=True)
class ReferenceAccuracy(Record):
    """What the artifacts are compared with. Figures are None if it could not run."""

    name: str
    runtime: str | None = None
    top1: float | None = None
    top5: float | None = None
    ece: float | None = None
    images_per_s: float | None = None
    status: str = MEASURED
    reason: str = ""

    @classmethod
    def from_json(cls, row: Fields) -> ReferenceAccuracy:
        return cls(
            row.text("name"),
            row.optional_text("runtime"),
            row.optional_number("top1"),
            row.optional_number("top5"),
            row.optional_number("ece"),
            row.optional_number("images_per_s"),
            row.one_of("status", (MEASURED, FAIL, NOT_RUN)),
            row.text("reason"),
        )


@dataclass(frozen=True, kw_only=True)
class ArtifactAccuracy(Record):
    """One artifact. Shares are from 0 to 1, points of top-1 in hundredths; a figure is None if not measured."""

    path: str
    model: str
    variant: str | None = None
    format: str
    precision: str
    status: str = MEASURED  # or FAIL, NOT_RUN
    reason: str = ""
    runtime: str | None = None
    reference: str  # what agreement, KL and the loss are measured against
    images: int = 0
    top1: float | None = None
    top5: float | None = None
    ece: float | None = None
    agreement: float | None = None
    mean_kl: float | None = None
    mean_delta_p: float | None = None
    max_delta_p: float | None = None
    drop_points: float | None = None
    drop_interval: Interval | None = None
    images_per_s: float | None = None
    per_class: tuple[Mapping[str, Any], ...] = ()
    most_confused: tuple[Mapping[str, Any], ...] = ()
    gate: Gate | None = None  # None if no limit was given
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, row: Fields) -> ArtifactAccuracy:
        """Raises ValueError if this is not what `eval` writes."""
        found = cls(
            path=row.text("path"),
            model=row.text("model"),
            variant=row.optional_text("variant"),
            format=row.text("format"),
            precision=row.text("precision"),
            status=row.one_of("status", (MEASURED, FAIL, NOT_RUN)),
            reason=row.text("reason"),
            runtime=row.optional_text("runtime"),
            reference=row.text("reference"),
            images=row.count("images") or 0,
            **{name: row.optional_number(name) for name in FIGURES},
            drop_points=row.optional_number("drop_points", least=-100),
            drop_interval=row.optional_interval("drop_interval", least=-100),
            per_class=row.records("per_class", lambda item: item.data) or (),
            most_confused=row.records("most_confused", lambda item: item.data) or (),
            gate=row.record("gate", Gate.from_json),
            warnings=row.texts("warnings"),
        )
        if found.status == MEASURED and found.top1 is None:
            raise ValueError("measured, but without top-1")
        if found.status != MEASURED and not found.reason:
            raise ValueError(f"{found.status.upper()} without a reason")
        return found


FIGURES = ("top1", "top5", "ece", "agreement", "mean_kl", "mean_delta_p", "max_delta_p", "images_per_s")


@dataclass(frozen=True)
class AccuracyReport(Record):
    """The document: `environment` describes the machine, the tools and, under `data`, the pictures."""

    status: str
    environment: Mapping[str, Any]
    references: tuple[ReferenceAccuracy, ...]
    results: tuple[ArtifactAccuracy, ...]

    @classmethod
    def of(
        cls,
        environment: Mapping[str, Any],
        references: Iterable[ReferenceAccuracy],
        results: Iterable[ArtifactAccuracy],
    ) -> AccuracyReport:
        """The document with its overall status: FAIL outweighs NOT-RUN, which outweighs PASS."""
        rows = tuple(results)
        status = worst_status({row.status for row in rows} | {row.gate.status for row in rows if row.gate})
        return cls(status, environment, tuple(references), rows)

    def with_results(self, results: Iterable[ArtifactAccuracy]) -> AccuracyReport:
        return self.of(self.environment, self.references, results)

    @property
    def source(self) -> str:
        """The source of the pictures, as the user named it."""
        pictures = Fields(self.environment, "environment").sub("data")
        return pictures.text("source") if pictures else ""

    @classmethod
    def from_json(cls, data: Any) -> AccuracyReport:
        document = Fields(data, "the document")
        environment = document.sub("environment")
        return cls(
            document.text("status"),
            environment.data if environment else {},
            document.records("references", ReferenceAccuracy.from_json, each="a reference") or (),
            document.records("results", ArtifactAccuracy.from_json, each="a result") or (),
        )
