"""The report as Markdown tables, for the summary of a CI run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mvit_export.report import words
from mvit_export.report.records import Report

SPECIAL = re.compile(r"[\\`*\[\]<>|~#&$!]|(?<!\w)_|_(?!\w)")


def render_markdown(report: Report) -> str:
    return "\n".join(lines(report)) + "\n"


def lines(report: Report) -> Iterator[str]:
    yield f"## {words.VERDICTS[report.status]}: {report.headline}"
    if report.verdicts:
        yield from ("", "### Parity", "")
        yield from parity_table(report)
    if report.scored:
        yield from ("", "### Accuracy", "", f"{escape(words.pictures(report.scored))}.", "")
        yield from accuracy_table(report)
        yield from accuracy_remarks(report)
    yield from ("", "### Latency", "", f"{report.latency_line}.")
    if report.measured:
        yield ""
        yield from latency_table(report)
        if first := words.references(report.measured):
            yield from ("", f"Ratios are to {escape(first)}: below 1 is faster.")
        yield from ("", f"Measured on {escape(words.machines(report.measured))}.")
        yield from warning_list(report)
    if report.gaps:
        yield from ("", "### NOT-RUN", "")
        for gap in report.gaps:
            run = f": {code(gap.command)}" if gap.command else ""
            yield f"- {code(gap.label)} {escape(gap.what)}: {escape(gap.reason)}{run}"


def parity_table(report: Report) -> Iterator[str]:
    yield from head("artifact", "precision", "verdict", "PSNR", "max error / scale", "KL", "runtime", "reason")
    for v in report.verdicts:
        figures = words.decibels(v.psnr_db), words.tiny(v.max_rel), words.tiny(v.kl)
        verdict = f"**{words.VERDICTS[v.status]}**"
        said = escape(v.runtime or words.NONE), escape(words.remarks(v))
        yield line(code(v.label), v.precision, verdict, *figures, *said)


def accuracy_table(report: Report) -> Iterator[str]:
    yield from head("artifact", "runtime", "top-1", "top-5", "ECE", "agreement", "mean KL", "points of top-1 lost")
    for row in report.scored:
        shares = map(words.share, (row.top1, row.top5, row.ece, row.agreement))
        lost = f"{words.points(row)} {words.points_interval(row)}".strip()
        yield line(code(row.label), escape(row.runtime or words.NONE), *shares, words.tiny(row.mean_kl), escape(lost))


def accuracy_remarks(report: Report) -> Iterator[str]:
    found = [(row, kind, text) for row in report.scored for kind, text in words.accuracy_remarks(row)]
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
        where = escape(row.runtime), escape(row.device), words.plain(row.threads)
        times = map(words.ms, (row.p90_ms, row.p99_ms, row.min_ms))
        load = f"{words.ms(row.load_ms)} / {words.ms(row.load_warm_ms)}"
        rest = words.ms(row.first_ms), words.memory(row.peak_rss_mb), words.ratio(row.ratio)
        yield line(code(row.label), *where, words.median(row), *times, load, *rest)


def warning_list(report: Report) -> Iterator[str]:
    found = [(row, warning) for row in report.measured for warning in row.warnings]
    if found:
        yield ""
    for row, warning in found:
        yield f"- {code(row.label)}, {words.threads(row)}: {escape(warning)}"


def head(*names: str) -> Sequence[str]:
    return line(*names), line(*["---"] * len(names))


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Text that stays what it is, in a table too; it holds no line breaks by then."""
    return SPECIAL.sub(lambda match: "\\" + match.group(), text)


def code(text: str) -> str:
    """A code span: only backticks and, in tables, bars mean something there."""
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"
