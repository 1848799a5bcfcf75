"""Has it become slower? Rows held against those of an earlier run, or against an artifact measured beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvit_export.artifact import find_artifacts
from mvit_export.benchmarks.timing import FEWEST_ROUNDS, Ratio, ratio, unpaired_ratio
from mvit_export.errors import ArtifactError, UsageError

KEY = ("model", "format", "precision", "device", "threads", "input_shape")
MACHINE = ("cpu", "cores", "system", "machine")
SAMPLED_TOGETHER = ("threads", "input_shape")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Baseline:
    """An earlier report, or artifacts that are measured first; `max_slowdown` of 0.1 lets 10 % pass.

    Figures of two runs are compared only where the machine is the same; beside one another is better than either.
    """

    max_slowdown: float
    report: Mapping[str, Any] | None = None
    artifacts: tuple[Path, ...] = ()

    @classmethod
    def read(cls, path: Path | None, max_slowdown: float | None) -> Baseline | None:
        """Raises UsageError where only one of the two is given, ArtifactError where the file is none of bench."""
        if path is None and max_slowdown is None:
            return None
        if path is None:
            raise UsageError("--max-slowdown says how much slower than --baseline FILE or ARTIFACT; name one")
        share = 0.0 if max_slowdown is None else max_slowdown
        if path.is_dir() or path.suffix != ".json":
            return cls(share, artifacts=find_artifacts(path))
        return cls(share, report=read_report(path))

    def judge(self, report: dict[str, Any]) -> None:
        """Give each row its `baseline` verdict, and the report the worst of them.

        A row fails only if the whole interval of its ratio lies beyond the limit.
        """
        for row in report["results"]:
            if row["status"] == "measured":
                row["baseline"] = self.verdict(row, report)
        verdicts = [row["baseline"]["status"] for row in report["results"] if row.get("baseline")]
        for status in ("not-run", "fail"):
            if status in verdicts:
                report["status"] = status

    def verdict(self, row: Row, report: Mapping[str, Any]) -> dict[str, Any]:
        if self.report is None:
            return self.beside(row, report)
        found = [r for r in self.report["results"] if identity(r) == identity(row) and r["samples_ms"]]
        if not found:
            return not_compared("the baseline has no such row; measure it anew once this one is right")
        if len(found) > 1:
            found = [r for r in found if r.get("path") == row["path"]]
        if len(found) != 1:
            return not_compared("the baseline has several such rows; measure it anew with one of each kind")
        old, new = (tuple(r["environment"][name] for name in MACHINE) for r in (self.report, report))
        if old != new:
            return not_compared(f"the baseline was measured on {describe(old)}, this is {describe(new)}")
        return self.limit(row, found[0], unpaired_ratio)

    def beside(self, row: Row, report: Mapping[str, Any]) -> dict[str, Any]:
        """Against the row of the baseline that was sampled in the same rounds and is most alike."""
        own = {str(path) for path in self.artifacts}
        if row["path"] in own:
            return {"status": "pass", "reason": "the baseline itself", "ratio": None}
        base = most_alike(row, [r for r in report["results"] if r["path"] in own and r["samples_ms"]])
        if base is None:
            return not_compared("the baseline holds no file like this one, of the same input and format")
        return self.limit(row, base, ratio)

    def limit(self, row: Row, base: Row, compare: Callable[..., Ratio]) -> dict[str, Any]:
        rounds = rounds_of(row), rounds_of(base)
        if (fewest := min(map(len, rounds))) < FEWEST_ROUNDS:
            return not_compared(f"{fewest} rounds are too few for an interval; measure longer: --budget")
        ratio = compare(*rounds)
        most = 1 + self.max_slowdown
        slower = ratio.interval[0] > most
        words = f"{ratio} times the baseline, {'more than' if slower else 'not shown to be over'} {most:g}"
        return {
            "status": "fail" if slower else "pass",
            "reason": words,
            "ratio": {"median": ratio.median, "interval": list(ratio.interval)},
        }


def read_report(path: Path) -> dict[str, Any]:
    """The document of an earlier bench, checked before anything is measured."""
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for row in report["results"]:
            check_row(row)
        _ = [report["environment"][name] for name in MACHINE]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ArtifactError(f"{path} is no result of bench --json ({reason}); measure it again") from error
    return report


def check_row(row: Row) -> None:
    """Raises ValueError, or what a value of another type raises, where samples are no whole rounds of times."""
    identity(row)
    samples, count = row["samples_ms"], row["samples_per_round"]
    if samples and (count < 1 or len(samples) % count or not all(0 < sample < math.inf for sample in samples)):
        raise ValueError("samples_ms are no whole rounds of times")


def most_alike(row: Row, candidates: Sequence[Row]) -> Row | None:
    """The only candidate, or the one that stands out: of the same model, else of the same format and runtime."""
    together = [r for r in candidates if all(r[name] == row[name] for name in SAMPLED_TOGETHER)]
    same_kind = [r for r in together if all(r[name] == row[name] for name in ("format", "precision", "runtime"))]
    same = [r for r in same_kind if r["model"] == row["model"]]
    return next((found[0] for found in (same, same_kind, together) if len(found) == 1), None)


def not_compared(reason: str) -> dict[str, Any]:
    return {"status": "not-run", "reason": reason, "ratio": None}


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two rows comparable: all but the versions, whose change may be what made it slower."""
    runtime = tuple(word for word in row["runtime"].split() if not word[0].isdigit())
    return (*(str(row[name]) for name in KEY), bool(row.get("ort")), runtime)  # not in earlier versions' rows


def describe(machine: Sequence[Any]) -> str:
    cpu, cores, system, architecture = machine
    return f"{cpu} with {cores} cores ({system} {architecture})"


def rounds_of(row: Mapping[str, Any]) -> list[list[float]]:
    samples, count = row["samples_ms"], row["samples_per_round"]
    return [samples[start : start + count] for start in range(0, len(samples), count)]
