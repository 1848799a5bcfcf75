"""The table that `make attack` ends with: kind, cases, held."""

from __future__ import annotations

from collections import Counter
from typing import Any

FEWEST = 100  # cases; the sample of `make test` needs no table


def print_table(terminalreporter: Any) -> None:
    """From the tests' own reports, wherever they ran."""
    cases: Counter[str] = Counter()
    held: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    for report in (*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())):
        told = dict(report.user_properties)
        if report.when == "call" and "kind" in told:
            cases[told["kind"]] += 1
            held[told["kind"]] += report.outcome == "passed"
            ended[told["kind"]] += told.get("ended", False)
    if cases.total() < FEWEST:
        return
    terminalreporter.section("attack")
    rows = [(kind, cases[kind], held[kind], ended[kind]) for kind in sorted(cases)]
    for kind, *counts in [("kind", "cases", "held", "of them ended by a signal"), *rows]:
        terminalreporter.write_line(f"{kind:<22} {counts[0]:>6} {counts[1]:>6}   {counts[2]}")
    terminalreporter.write_line(f"{'all':<22} {cases.total():>6} {held.total():>6}   {ended.total()}")
