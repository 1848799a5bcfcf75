"""Figures as people read them, the same in HTML and Markdown. A missing figure is a dash."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mvit_export.artifact import WeightsInfo
from mvit_export.report.reading import Accuracy, Latency, Verdict
from mvit_export.results.fields import Interval, tidy
from mvit_export.results.latency import Ratio
from mvit_export.results.status import FAIL, NOT_RUN, PASS

NONE = "–"
VERDICTS = {PASS: "PASS", FAIL: "FAIL", NOT_RUN: "NOT-RUN"}


def significant(value: float, like: float | None = None) -> str:
    """Three digits, never an exponent: 4.52, 13.2, 1,046; with as many decimals as `like` would have."""
    model = abs(value if like is None else like)
    whole = len(str(int(model))) if model >= 1 else 0
    return f"{value:,.{max(0, 3 - whole)}f}"


def ms(value: float | None) -> str:
    return NONE if value is None else f"{significant(value)} ms"


def interval(pair: Interval | None) -> str:
    return "" if pair is None else f"[{significant(pair[0])}, {significant(pair[1], like=pair[0])}]"


def median(row: Latency) -> str:
    """`13.2 ms [13.1, 13.3]`: the median with its confidence interval."""
    return f"{ms(row.median_ms)} {interval(row.median_interval_ms)}".strip()


def ratio(found: Ratio | None) -> str:
    return f"{times(found)} {interval(found.interval if found else None)}".strip()


def machines(rows: Sequence[Latency]) -> str:
    return " and ".join(dict.fromkeys(row.machine for row in rows))


def times(found: Ratio | None) -> str:
    return NONE if found is None else f"{significant(found.median)}×"


def decibels(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f} dB"


def tiny(value: float | None) -> str:
    return NONE if value is None else f"{value:.1e}"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def share(value: float | None) -> str:
    """Accuracies differ in the second decimal: of 10,000 pictures one is 0.01 %."""
    return NONE if value is None else f"{100 * value:.2f} %"


def points(row: Accuracy) -> str:
    return NONE if row.drop_points is None else f"{row.drop_points:.2f}"


def points_interval(row: Accuracy) -> str:
    return "" if row.drop_interval is None else "[{:.2f}, {:.2f}]".format(*row.drop_interval)


def pictures(rows: Sequence[Accuracy]) -> str:
    """`454 pictures of digits/val, against PyTorch mobilevit_xxs 64x64`."""
    counts = " and ".join(dict.fromkeys(f"{row.images} pictures of {row.source}" for row in rows if row.images))
    return f"{counts}, against {' and '.join(dict.fromkeys(row.reference for row in rows))}"


def accuracy_remarks(row: Accuracy) -> tuple[tuple[str, str], ...]:
    """(fail or warning, text) for everything that the figures do not show."""
    gate = [("fail", row.gate.reason)] if row.gate and row.gate.status == FAIL else []
    failed = [("fail", row.reason)] if row.reason else []
    return (*failed, *gate, *(("warning", text) for text in row.warnings))


def memory(value: float | None) -> str:
    return NONE if value is None else f"{significant(value)} MB"


def size(count: float | None) -> str:
    return NONE if count is None else f"{significant(count / 1e6)} MB"


def millions(count: float | None) -> str:
    return NONE if count is None else f"{significant(count / 1e6)} M"


def rate(value: float | None, unit: str) -> str:
    return NONE if value is None else f"{significant(value)} {unit}"


def plain(value: Any) -> str:
    return NONE if value is None else tidy(value)


def shape(sizes: Sequence[int | None]) -> str:
    return "×".join("any" if n is None else str(n) for n in sizes) or NONE


def threads(row: Latency) -> str:
    return NONE if row.threads is None else f"{row.threads} thread{'s' if row.threads != 1 else ''}"


def remarks(verdict: Verdict) -> str:
    """Why it is not a PASS, or what a PASS leaves open."""
    return "; ".join(text for text in (verdict.reason, verdict.note) if text)


FACETS: Mapping[str, Callable[[Latency], str]] = {
    "runtime": lambda row: row.runtime or "unnamed runtime",
    "device": lambda row: row.device,
    "machine": lambda row: row.machine,
    "threads": threads,
    "batch": lambda row: f"batch {plain(row.batch)}",
    "input": lambda row: shape(row.input_shape),
}


def distinguish(rows: Sequence[Latency]) -> list[str]:
    """One label for each row: the artifact's, plus whatever distinguishes rows of the same artifact."""
    labels = [row.label for row in rows]
    for say in FACETS.values():
        seen: dict[str, set[str]] = {}
        for label, row in zip(labels, rows, strict=True):
            seen.setdefault(label, set()).add(say(row))
        pairs = zip(labels, rows, strict=True)
        labels = [f"{label}, {say(row)}" if len(seen[label]) > 1 else label for label, row in pairs]
    return labels


def conditions(row: Latency, rows: Sequence[Latency]) -> str:
    """What else was fixed, if the rows differ in it or it is unusual."""
    batch = f"batch {row.batch}" if row.batch not in (None, 1) else ""
    size = shape(row.input_shape) if len({one.input_shape for one in rows}) > 1 else ""
    return ", ".join(part for part in (row.device if row.device != "local" else "", batch, size) if part)


def references(rows: Sequence[Latency]) -> str:
    """What the ratios divide by."""
    return " and ".join(dict.fromkeys(row.ratio.to for row in rows if row.ratio and row.ratio.to))


def weights(info: WeightsInfo) -> str:
    """Where the weights came from; an untrained network must never be mistaken for a trained one."""
    if info.trained is False:
        return f"UNTRAINED, seed {info.seed}"
    return tidy(info.source or "a factory's own")
