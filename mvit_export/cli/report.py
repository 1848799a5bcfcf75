"""`mvit-export report`: one page on artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mvit_export.cli.help import FILES
from mvit_export.cli.options import Artifacts, Json, Quiet, Verbose, session
from mvit_export.cli.terminal import status_text
from mvit_export.errors import UsageError


def report(
    artifacts: Artifacts,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write (html: report.html; markdown and junit: stdout).",
            metavar="FILE",
            rich_help_panel=FILES,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="html, markdown or junit (by the suffix of FILE, else html).",
            show_default=False,
            rich_help_panel=FILES,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write one page on artifacts: verdicts, latencies, and what was not run.

    It reports and does not judge: the exit code is 0 once the report is written, whatever it says. HTML is one
    self-contained file; markdown is for a CI summary; junit is parity as JUnit XML.
    """
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.report import choose_format, read_report, render, write_report

        kind = choose_format(format, output)
        target = Path("report.html") if output is None and kind == "html" else output
        if target is None and as_json:
            raise UsageError(f"--json and --format {kind} would share stdout; name a file with -o")
        with terminal.progress("report") as step:
            found = read_report(artifacts)
            step(f"drawing {len(found.entries)} artifacts")
            text = render(found, format=kind)
        if target is None:
            terminal.write(text)
        else:
            write_report(text, target, report=found)
            terminal.print(status_text(found.status), f"{found.headline}; {found.latency_line}")
            terminal.print(f"Report: {target}")
        terminal.print_json({"status": "pass", "path": str(target), "format": kind, **found.to_json()})
