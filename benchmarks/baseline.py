"""Has it become slower? Rows held against those of an earlier run, or against an artifact measured beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvit_export.benchmarks.timing import Ratio, unpaired_ratio
from mvit_export.errors import ArtifactError, UsageError

KEY = ("model", "format", "precision", "device", "threads", "input_shape")
MACHINE = ("cpu", "cores", "system", "machine")


@dataclass(frozen=True)
class Baseline:
    """An earlier report, or an artifact that is measured first; `max_slowdown` of 0.1 lets 10 % pass.

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
            return cls(share, artifacts=(path,))
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            for row in report["results"]:
                _ = [row[name] for name in (*KEY, "runtime", "samples_ms", "samples_per_round")]
            _ = [report["environment"][name] for name in MACHINE]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is no result of bench --json ({error!r}); measure it again") from error
        return cls(share, report=report)

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

    def verdict(self, row: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
        if self.report is None:
            return self.beside(row)
        found = [r for r in self.report["results"] if identity(r) == identity(row) and r["samples_ms"]]
        if not found:
            return not_compared("the baseline has no such row; measure it anew once this one is right")
        old, new = (tuple(r["environment"][name] for name in MACHINE) for r in (self.report, report))
        if old != new:
            return not_compared(f"the baseline was measured on {describe(old)}, this is {describe(new)}")
        return self.limit(unpaired_ratio(rounds_of(row), rounds_of(found[0])))

    def beside(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if row["ratio"] is None:
            return {"status": "pass", "reason": "the baseline itself", "ratio": None}
        return self.limit(Ratio(row["ratio"]["median"], tuple(row["ratio"]["interval"])))

    def limit(self, ratio: Ratio) -> dict[str, Any]:
        most = 1 + self.max_slowdown
        slower = ratio.interval[0] > most
        words = f"{ratio} times the baseline, {'more than' if slower else 'not shown to be over'} {most:g}"
        return {
            "status": "fail" if slower else "pass",
            "reason": words,
            "ratio": {"median": ratio.median, "interval": list(ratio.interval)},
        }


def not_compared(reason: str) -> dict[str, Any]:
    return {"status": "not-run", "reason": reason, "ratio": None}


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two rows comparable: all but the versions, whose change may be what made it slower."""
    runtime = tuple(word for word in row["runtime"].split() if not word[0].isdigit())
    return (*(str(row[name]) for name in KEY), runtime)


def describe(machine: Sequence[Any]) -> str:
    cpu, cores, system, architecture = machine
    return f"{cpu} with {cores} cores ({system} {architecture})"


def rounds_of(row: Mapping[str, Any]) -> list[list[float]]:
    samples, count = row["samples_ms"], row["samples_per_round"]
    return [samples[start : start + count] for start in range(0, len(samples), count)]
