"""Markdown of the comparison with peers, from the records of its JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
LATENCY = (
    "variant", "runtime", "threads", "file", "median ms [95 %]", "of the best peer's [95 %]", "ours of its [95 %]"
)  # fmt: skip
SUMMARY = ("variant", "runtime", "threads", "file", "median ms", "of the best peer's [95 %]", "the best peer", "its ms")
FILES = (
    "variant", "format", "file", "parity", "PSNR", "size", "operators", "export", "memory", "with verification",
    "memory",
)  # fmt: skip
NONE = "-"


def summary_table(timings: Sequence[Row]) -> str:
    """Only ours, each beside the fastest peer of the same variant, runtime and number of threads."""
    best = {setting(row): row for row in timings if row["best_peer"]}
    return table(SUMMARY, [summary_cells(row, best.get(setting(row))) for row in timings if row["ours"]])


def latency_table(timings: Sequence[Row]) -> str:
    return table(LATENCY, [latency_cells(row) for row in timings])


def file_table(files: Sequence[Row]) -> str:
    return table(FILES, [file_cells(row) for row in files])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def setting(row: Row) -> tuple[Any, ...]:
    return row["variant"], row["format"], row["threads"]


def summary_cells(row: Row, best: Row | None) -> list[str]:
    where, ours = latency_cells(row)[:4], figure(row["median_ms"], "{:.2f}")
    if row["median_ms"] is None or best is None:
        return [*where, verdict(row) if row["median_ms"] is None else ours, NONE, NONE, NONE]
    return [*where, ours, ratio(row["to_best"]), best["name"], figure(best["median_ms"], "{:.2f}")]


def latency_cells(row: Row) -> list[str]:
    """A file that was not timed shows the reason in place of its time."""
    runtime = " ".join((row["runtime"] or row["format"]).split()[:2])
    start = [row["variant"], runtime, str(row["threads"]), row["name"]]
    if row["median_ms"] is None:
        return [*start, verdict(row), NONE, NONE]
    low, high = row["interval_ms"]
    doubt = "" if row["settled"] else " (not settled)"
    median = f"{row['median_ms']:.2f} [{low:.2f}, {high:.2f}]{doubt}"
    return [*start, median, "1" if row["best_peer"] else ratio(row["to_best"]), ratio(row["ours_to_it"])]


def file_cells(row: Row) -> list[str]:
    return [
        row["variant"], row["format"], row["name"], verdict(row), figure(row["psnr_db"], "{:.1f} dB"),
        figure(row["bytes"], "{:.2f} MB", 1e-6), figure(row["operators"], "{}"),
        figure(row["export_s"], "{:.1f} s"), figure(row["export_mb"], "{:.0f} MB"),
        figure(row["verified_s"], "{:.1f} s"), figure(row["verified_mb"], "{:.0f} MB"),
    ]  # fmt: skip


def verdict(row: Row) -> str:
    """`PASS`, or `FAIL: ...` and `NOT-RUN: ...` with the reason, which must not end a cell."""
    word = row["status"].upper()
    return word if not row["reason"] else f"{word}: {row['reason']}".replace("|", "/")


def ratio(found: Row | None) -> str:
    return NONE if found is None else "{:.3f} [{:.3f}, {:.3f}]".format(found["median"], *found["interval"])


def figure(value: float | None, text: str, unit: float | None = None) -> str:
    return NONE if value is None else text.format(value if unit is None else value * unit)
