"""The report as Markdown tables, for the summary of a CI run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mvit_export.report import formatting
from mvit_export.report.reading import Report

SPECIAL = re.compile(r"[\\`*\[\]<>|~#&$!]|(?<!\w)_|_(?!\w)")


def render_markdown(report: Report) -> str:
    return "\n".join(lines(report)) + "\n"


def lines(report: Report) -> Iterator[str]:
    yield f"## {formatting.VERDICTS[report.status]}: {report.headline}"
    if report.verdicts:
        yield from ("", "### Parity", "")
        yield from parity_table(report)
    if report.scored:
        yield from ("", "### Accuracy", "", f"{escape(formatting.pictures(report.scored))}.", "")
        yield from accuracy_table(report)
        yield from accuracy_remarks(report)
    yield from ("", "### Latency", "", f"{report.latency_line}.")
    if report.measured:
        yield ""
        yield from latency_table(report)
        if first := formatting.references(report.measured):
            yield from ("", f"Ratios are to {escape(first)}: below 1 is faster.")
        yield from ("", f"Measured on {escape(formatting.machines(report.measured))}.")
        yield from warning_list(report)
    if report.gaps:
        yield from ("", "### NOT-RUN", "")
        for gap in report.gaps:
            run = f": {code(gap.command)}" if gap.command else ""
            yield f"- {code(gap.label)} {escape(gap.what)}: {escape(gap.reason)}{run}"


def parity_table(report: Report) -> Iterator[str]:
    yield from head("artifact", "precision", "verdict", "PSNR", "max error / scale", "KL", "runtime", "reason")
    for v in report.verdicts:
        figures = (
            formatting.decibels(v.figure("psnr_db")),
            formatting.tiny(v.figure("max_rel")),
            formatting.tiny(v.figure("kl")),
        )
        verdict = f"**{formatting.VERDICTS[v.status]}**"
        said = escape(v.runtime or formatting.NONE), escape(formatting.remarks(v))
        yield line(code(v.label), v.precision, verdict, *figures, *said)


def accuracy_table(report: Report) -> Iterator[str]:
    yield from head("artifact", "runtime", "top-1", "top-5", "ECE", "agreement", "mean KL", "points of top-1 lost")
    for row in report.scored:
        shares = map(formatting.share, (row.top1, row.top5, row.ece, row.agreement))
        lost = f"{formatting.points(row)} {formatting.points_interval(row)}".strip()
        yield line(
            code(row.label), escape(row.runtime or formatting.NONE), *shares, formatting.tiny(row.mean_kl), escape(lost)
        )


def accuracy_remarks(report: Report) -> Iterator[str]:
    found = [(row, kind, text) for row in report.scored for kind, text in formatting.accuracy_remarks(row)]
    if found:
        yield ""
    for row, kind, text in found:
        yield f"- {code(row.label)}: {'**FAIL** ' if kind == 'fail' else ''}{escape(text)}"


def latency_table(report: Report) -> Iterator[str]:
    yield from head(
        "artifact", "runtime", "device", "threads", "median", "p90", "p99", "min", "load cold / warm", "first",
        "memory", "ratio",
    )  # fmt: skip
    for row in report.measured:
        where = escape(row.runtime), escape(row.device), formatting.plain(row.threads)
        times = map(formatting.ms, (row.p90_ms, row.p99_ms, row.min_ms))
        load = f"{formatting.ms(row.load_ms)} / {formatting.ms(row.load_warm_ms)}"
        rest = formatting.ms(row.first_ms), formatting.memory(row.peak_rss_mb), formatting.ratio(row.ratio)
        yield line(code(row.label), *where, formatting.median(row), *times, load, *rest)


def warning_list(report: Report) -> Iterator[str]:
    found = [(row, warning) for row in report.measured for warning in row.warnings]
    if found:
        yield ""
    for row, warning in found:
        yield f"- {code(row.label)}, {formatting.threads(row)}: {escape(warning)}"


def head(*names: str) -> Sequence[str]:
    return line(*names), line(*["---"] * len(names))


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Text that renders as it is, in a table too; it has no line breaks by then."""
    return SPECIAL.sub(lambda match: "\\" + match.group(), text)


def code(text: str) -> str:
    """A code span: only backticks and, in tables, bars have a meaning there."""
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"
