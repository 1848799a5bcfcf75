"""parity.json: what `verify` found, a verdict for each artifact and runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mvit_export.formats.base import Tolerance
from mvit_export.results.fields import Fields, Record, plain
from mvit_export.results.status import FAIL, NOT_RUN, PASS, worst_status

# Figures of class scores, present in every verdict: null for other tasks.
BEFORE_SPREAD = ("kl", "top1_agreement", "top5_agreement")
AFTER_SPREAD = ("mean_kl", "delta_p")


@dataclass(frozen=True)
class Metrics(Record):
    """How far an output is from its reference; the worst over several inputs and outputs.

    max_rel is max_abs over the largest absolute reference value. `of_task` has the task's own figures by name, those
    that the output has: see tasks/.
    """

    max_abs: float
    max_rel: float
    psnr_db: float  # identical outputs reach the resolution of float64, 319 dB
    cosine: float
    max_of_spread: float | None = None  # max_abs over the largest change of the reference between inputs
    of_task: Mapping[str, float] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, Any]:
        return metrics_json(self)

    @classmethod
    def from_json(cls, row: Fields) -> Metrics | None:
        """None if nothing was compared: then every figure is null."""
        if row.get("psnr_db") is None:
            return None
        shared = {name: row.number(name) for name in ("max_abs", "max_rel")}
        others = [name for name in row.data if name not in SHARED]
        figures = {name: row.optional_number(name, least=-math.inf) for name in others}
        return cls(
            **shared,
            psnr_db=row.number("psnr_db", least=-math.inf),
            cosine=row.number("cosine", least=-math.inf),
            max_of_spread=row.optional_number("max_of_spread"),
            of_task={name: value for name, value in figures.items() if value is not None},
        )


SHARED = ("max_abs", "max_rel", "psnr_db", "cosine", "max_of_spread")


def metrics_json(metrics: Metrics | None) -> dict[str, Any]:
    """The JSON object of figures, all of them null if nothing was compared."""
    shared = {name: getattr(metrics, name, None) for name in SHARED}
    spread, own = shared.pop("max_of_spread"), metrics.of_task if metrics else {}
    before, after = ({name: own.get(name) for name in names} for names in (BEFORE_SPREAD, AFTER_SPREAD))
    return {**shared, **before, "max_of_spread": spread, **after, **own}


@dataclass(frozen=True)
class Overflow(Record):
    """The first op of an fp16 program whose result fp16 cannot hold."""

    module: str | None  # of the PyTorch model, if the file says so
    op: str
    op_type: str
    largest: float  # absolute value, before rounding

    def __str__(self) -> str:
        place = self.module or "an unnamed module"
        return f"fp16 overflow first at {place} (op {self.op}, {self.op_type}): {self.largest:.3g}, fp16 ends at 65504"

    @classmethod
    def from_json(cls, row: Fields) -> Overflow:
        return cls(row.optional_text("module"), row.text("op"), row.text("op_type"), row.number("largest"))


@dataclass(frozen=True)
class Located(Record):
    """The first layer that differs, or, if none does (`diverges` False), the one with the largest error.

    Errors are the largest absolute difference over the largest absolute reference value; None stands for NaN or Inf.
    `error_before` is that of the last layer that matches. `module` is "" for what the network computes outside its
    modules. A layer that has no op in the file is seen at an op of a later one, `seen_in`. If the file fuses a layer
    with the next, `fused_with`, either may be at fault.
    """

    module: str
    op: str
    op_type: str
    error_before: float | None
    error_after: float | None
    diverges: bool
    seen_in: str | None = None
    fused_with: str | None = None
    case: str = ""

    def __str__(self) -> str:
        """One line for people."""
        name = self.module or "the network's own forward"
        if self.fused_with is not None:
            name += f", fused with {self.fused_with}"
        op = f"op {self.op}, {self.op_type}"
        if self.seen_in is not None:
            op = f"no op of its own; seen at {self.op}, {self.op_type}, of {self.seen_in or 'the network'}"
        after = "NaN or Inf" if self.error_after is None else f"{self.error_after:.1e}"
        if not self.diverges:
            return f"no layer diverges: largest error {after} at {name} ({op})"
        return f"first diverging layer: {name} ({op}): error {self.error_before:.1e} before, {after} after"

    @classmethod
    def from_json(cls, row: Fields) -> Located:
        return cls(
            row.text("module"),
            row.text("op"),
            row.text("op_type"),
            row.optional_number("error_before"),
            row.optional_number("error_after"),
            bool(row.flag("diverges")),
            row.optional_text("seen_in"),
            row.optional_text("fused_with"),
            row.text("case"),
        )


@dataclass(frozen=True)
class ParityResult(Record):
    """The verdict of one runtime on one artifact. `reason` is empty for PASS; `note` says what a PASS leaves open.

    `worst_case` names the input with a fault, or else the one with the largest error, if all could run. `overflow` is
    the first in an fp16 program that failed, if the runtime can tell. `located` is set if it was requested.

    `reference_dtype` is what PyTorch computed in, None if unknown (golden vectors). `float32_max_rel` is PyTorch's own
    float32 error of the scale, the most over the inputs. `noisy_inputs` are those judged by twice that error, since it
    is more than `tolerance` allows; `metrics` leaves them out if there are others.
    """

    path: str
    format: str
    precision: str
    status: str
    reason: str
    runtime: str | None
    against: str
    inputs: int
    metrics: Metrics | None
    tolerance: Tolerance | None
    note: str = ""
    worst_case: str | None = None
    overflow: Overflow | None = None
    located: Located | None = None
    device: str = "local"  # where the runtime was
    reference_dtype: str | None = None
    float32_max_rel: float | None = None
    noisy_inputs: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "metrics": metrics_json(self.metrics)}

    @classmethod
    def from_json(cls, row: Fields) -> ParityResult:
        """Raises ValueError if this is not what `verify` writes."""
        found = cls(
            path=row.text("path"),
            format=row.text("format"),
            precision=row.text("precision"),
            status=row.one_of("status", (PASS, FAIL, NOT_RUN)),
            reason=row.text("reason"),
            runtime=row.optional_text("runtime"),
            against=row.text("against"),
            inputs=row.count("inputs") or 0,
            metrics=row.record("metrics", Metrics.from_json),
            tolerance=row.record("tolerance", read_tolerance),
            note=row.text("note"),
            worst_case=row.optional_text("worst_case"),
            overflow=row.record("overflow", Overflow.from_json),
            located=row.record("located", Located.from_json),
            device=row.text("device") or "local",
            reference_dtype=row.optional_text("reference_dtype"),
            float32_max_rel=row.optional_number("float32_max_rel"),
            noisy_inputs=row.texts("noisy_inputs"),
        )
        if found.status == PASS and found.metrics is None:
            raise ValueError("a PASS without figures")
        if found.status != PASS and not found.reason:
            raise ValueError(f"{found.status.upper()} without a reason")
        return found


def read_tolerance(row: Fields) -> Tolerance:
    return Tolerance(
        psnr_db=row.number("psnr_db", least=-math.inf),
        max_rel=row.number("max_rel"),
        cosine=row.number("cosine", least=-math.inf),
        kl=row.number("kl"),
        reason=row.text("reason"),
        max_of_spread=row.number("max_of_spread"),
        mean_kl=row.optional_number("mean_kl"),
        delta_p=row.optional_number("delta_p"),
    )


@dataclass(frozen=True)
class ParityReport(Record):
    """The document of `mvit-export verify --json`."""

    artifacts: tuple[ParityResult, ...]

    @property
    def status(self) -> str:
        """FAIL outweighs NOT-RUN, which outweighs PASS. No verdict at all is NOT-RUN."""
        return worst_status(verdict.status for verdict in self.artifacts)

    def to_json(self) -> dict[str, Any]:
        return {"status": self.status, "artifacts": plain(self.artifacts)}

    @classmethod
    def from_json(cls, data: Any) -> ParityReport:
        rows = Fields(data, "the document").records("artifacts", ParityResult.from_json, each="a verdict")
        return cls(rows or ())
