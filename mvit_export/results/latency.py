"""latency.json: what `bench` measured, a row for each artifact, runtime, number of threads and shape of input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mvit_export.results.fields import Fields, Interval, Record
from mvit_export.results.status import FAIL, MEASURED, NOT_RUN, PASS


@dataclass(frozen=True)
class Ratio(Record):
    """How many times as long as another subject: the median of the rounds' ratios of medians, with a 95 % interval."""

    median: float
    interval: Interval
    to: str | None = None  # the other subject, unless it is obvious

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"

    def to_json(self) -> dict[str, Any]:
        figures = {"median": self.median, "interval": list(self.interval)}
        return figures if self.to is None else {"to": self.to, **figures}

    @classmethod
    def from_json(cls, row: Fields) -> Ratio:
        return cls(row.number("median"), row.interval("interval"), row.optional_text("to"))


@dataclass(frozen=True)
class Roofline(Record):
    """Where a model stands against what its runtime reached on a large matrix product."""

    peak_gmacs: float  # 1e9 multiply-accumulates a second
    bandwidth_gbs: float  # 1e9 bytes read or written a second
    achieved_gmacs: float
    peak_share: float
    ceiling_ms: float  # the least time it could take

    @classmethod
    def from_json(cls, row: Fields) -> Roofline:
        return cls(**{name: row.number(name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class OpTime(Record):
    """The time that all operations of one type took in one inference."""

    type: str
    ms: float
    share: float
    count: int

    @classmethod
    def from_json(cls, row: Fields) -> OpTime:
        return cls(row.text("type"), row.number("ms"), row.number("share"), row.count("count") or 0)


@dataclass(frozen=True)
class Slowdown(Record):
    """The verdict on a row compared with that of a baseline."""

    status: str
    reason: str
    ratio: Ratio | None = None

    @classmethod
    def from_json(cls, row: Fields) -> Slowdown:
        status = row.one_of("status", (PASS, FAIL, NOT_RUN))
        return cls(status, row.text("reason"), row.record("ratio", Ratio.from_json))


@dataclass(frozen=True, kw_only=True)
class Measurement(Record):
    """One row. Times are in ms, memory in MB; a figure is None if it was not measured.

    `macs` are those of the whole batch at the exported size. `samples_ms` has `samples_per_round` times per round.
    """

    path: str
    model: str
    variant: str | None = None
    format: str
    precision: str
    ort: bool = False
    status: str  # MEASURED or NOT_RUN
    reason: str = ""
    runtime: str
    device: str = "local"
    threads: int | None = None
    batch: int | None = None
    input_shape: tuple[int, ...] = ()
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    load_ms: float | None = None
    load_warm_ms: float | None = None
    first_ms: float | None = None
    median_ms: float | None = None
    median_interval_ms: Interval | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    min_ms: float | None = None
    samples_per_round: int | None = None
    rounds: int | None = None
    settled: bool | None = None
    peak_rss_mb: float | None = None
    ratio: Ratio | None = None
    roofline: Roofline | None = None
    profile: tuple[OpTime, ...] | None = None
    placement: Mapping[str, int] | None = None  # Core ML's plan: operations by device
    samples_ms: tuple[float, ...] = ()
    cpu_median_ms: float | None = None  # what all threads of the process used
    cpu_samples_ms: tuple[float, ...] = ()
    involuntary_per_s: float | None = None  # how often a core was taken from it, by second of the samples
    warnings: tuple[str, ...] = ()
    baseline: Slowdown | None = None

    @property
    def samples_by_round(self) -> list[tuple[float, ...]]:
        return self.by_round(self.samples_ms)

    @property
    def cpu_by_round(self) -> list[tuple[float, ...]]:
        return self.by_round(self.cpu_samples_ms)

    def by_round(self, samples: tuple[float, ...]) -> list[tuple[float, ...]]:
        count = self.samples_per_round or 1
        return [samples[start : start + count] for start in range(0, len(samples), count)]

    def to_json(self) -> dict[str, Any]:
        """`baseline` is present only if the row was compared with one, CPU times only if they are known."""
        left_out = ("baseline", "cpu_median_ms", "cpu_samples_ms", "involuntary_per_s")
        return {key: value for key, value in super().to_json().items() if value or key not in left_out or value == 0}

    @classmethod
    def from_json(cls, row: Fields) -> Measurement:
        """Raises ValueError if this is not what `bench` writes. A row from an earlier version may lack figures."""
        placement = row.sub("placement")
        found = cls(
            path=row.text("path"),
            model=row.text("model"),
            variant=row.optional_text("variant"),
            format=row.text("format"),
            precision=row.text("precision"),
            ort=row.flag("ort") or False,
            status=row.one_of("status", (MEASURED, NOT_RUN)),
            reason=row.text("reason"),
            runtime=row.text("runtime"),
            device=row.text("device") or "local",
            threads=row.count("threads"),
            batch=row.count("batch"),
            input_shape=tuple(int(n) for n in row.numbers("input_shape")),
            **{name: row.optional_number(name) for name in FIGURES},
            median_interval_ms=row.optional_interval("median_interval_ms"),
            samples_per_round=row.count("samples_per_round"),
            rounds=row.count("rounds"),
            settled=row.flag("settled"),
            ratio=row.record("ratio", Ratio.from_json),
            roofline=row.record("roofline", Roofline.from_json),
            profile=row.records("profile", OpTime.from_json),
            placement=placement.data if placement else None,
            samples_ms=row.numbers("samples_ms"),
            cpu_samples_ms=row.numbers("cpu_samples_ms"),
            warnings=row.texts("warnings"),
            baseline=row.record("baseline", Slowdown.from_json),
        )
        if found.status == NOT_RUN and not found.reason:
            raise ValueError("NOT-RUN without a reason")
        if found.status == MEASURED and found.median_ms is None:
            raise ValueError("measured, but without a median")
        return found


FIGURES = (
    "macs", "params", "bytes", "load_ms", "load_warm_ms", "first_ms", "median_ms", "p90_ms", "p99_ms", "min_ms",
    "peak_rss_mb", "cpu_median_ms", "involuntary_per_s",
)  # fmt: skip


@dataclass(frozen=True)
class LatencyReport(Record):
    """The document: `environment` is what the machine, here or elsewhere, reports about itself, so its keys vary."""

    status: str
    environment: Mapping[str, Any]
    results: tuple[Measurement, ...]

    @classmethod
    def from_json(cls, data: Any) -> LatencyReport:
        document = Fields(data, "the document")
        environment = document.sub("environment")
        if environment is None:
            raise ValueError("environment is missing")
        results = document.records("results", Measurement.from_json, each="a result")
        return cls(document.text("status"), environment.data, results or ())
