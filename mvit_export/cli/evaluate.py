"""`mvit-export eval`: accuracy of artifacts on labelled pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from mvit_export.cli.codes import EXIT_CODES
from mvit_export.cli.help import COMPARE, DATA, MEASURE
from mvit_export.cli.options import Artifacts, Json, Quiet, TrustCode, Verbose, session
from mvit_export.cli.terminal import STYLES, Terminal, status_text
from mvit_export.results.accuracy import AccuracyReport, ArtifactAccuracy, ReferenceAccuracy
from mvit_export.results.status import MEASURED
from mvit_export.system.machine import usable_cores


def evaluate(
    artifacts: Artifacts,
    data: Annotated[
        Path,
        typer.Option(
            help="Labelled pictures: a folder with one folder per class, or .npz with images and labels.",
            rich_help_panel=DATA,
        ),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(help="Artifact to compare with (the PyTorch model).", show_default=False, rich_help_panel=COMPARE),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Where the checkpoint is now, if it was moved.", rich_help_panel=COMPARE)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use only this many pictures, spread evenly over the data.", min=1, rich_help_panel=DATA),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Fail if more than this many points of top-1 are lost against the reference.",
            min=0,
            rich_help_panel=COMPARE,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Number of processes (one per core).", min=1, show_default=False, rich_help_panel=MEASURE),
    ] = None,
    trust_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure accuracy on labelled pictures, and the difference from the fp32 model."""
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.checks.accuracy import evaluate

        with terminal.progress("eval") as step:
            document = evaluate(
                artifacts, data=data, reference=reference, weights=weights, limit=limit, max_drop=max_drop,
                jobs=jobs or usable_cores(),
                on_progress=lambda done, total: step(f"eval: {done} of {total} pictures"),
            )  # fmt: skip
        report = AccuracyReport.from_json(document)
        print_data(terminal, report.environment["data"])
        for reference_row in report.references:
            print_reference(terminal, reference_row)
        for row in report.results:
            print_row(terminal, row)
        terminal.print_json(document)
        raise typer.Exit(EXIT_CODES[report.status])


def print_data(terminal: Terminal, data: Mapping[str, Any]) -> None:
    share = "" if data["images"] == data["of"] else f" of {data['of']}"
    terminal.print(f"{data['images']}{share} pictures of {data['classes']} classes, {data['source']}")
    if data["skipped"]:
        left = f"{data['skipped']} unreadable pictures were left out, the first: {data['first_skipped']}"
        terminal.print("  ", Text("note", style="bold yellow"), left)


def print_reference(terminal: Terminal, row: ReferenceAccuracy) -> None:
    if row.status != MEASURED:
        terminal.print(status_text(row.status), f"the reference {row.name}: {row.reason}")
        return
    terminal.print(f"{row.name}  the reference, {row.runtime}")
    terminal.print(f"  {accuracy_words(row)}  {speed_words(row)}")


def print_row(terminal: Terminal, row: ArtifactAccuracy) -> None:
    """One artifact: its figures, then what qualifies them."""
    if row.status != MEASURED:
        terminal.print(status_text(row.status), f"{row.path}  {row.reason}")
        return
    assert row.drop_interval is not None and row.agreement is not None
    low, high = row.drop_interval
    terminal.print(f"{row.path}  {row.runtime}")
    terminal.print(
        f"  {accuracy_words(row)}  lost {row.drop_points:.2f} points [{low:.2f}, {high:.2f}]  {speed_words(row)}"
    )
    line = f"  agrees {100 * row.agreement:.2f} %"
    if row.mean_kl is not None:
        line += f"  mean KL {row.mean_kl:.1e}"
        line += f"  top class's probability changes by {row.mean_delta_p:.1e}, at most {row.max_delta_p:.1e}"
    terminal.print(line)
    if gate := row.gate:
        terminal.print("  ", Text(gate.status.upper(), style=STYLES[gate.status]), gate.reason)
    for warning in row.warnings:
        terminal.print("  ", Text("note", style="bold yellow"), warning)


def accuracy_words(row: ReferenceAccuracy | ArtifactAccuracy) -> str:
    assert row.top1 is not None and row.top5 is not None and row.ece is not None
    return f"top-1 {100 * row.top1:.2f} %  top-5 {100 * row.top5:.2f} %  ECE {100 * row.ece:.2f} %"


def speed_words(row: ReferenceAccuracy | ArtifactAccuracy) -> str:
    return f"({row.images_per_s:.0f} images/s in this evaluation, not a latency)"
