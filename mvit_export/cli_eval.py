"""`mvit-export eval`: accuracy of artifacts on labelled pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from mvit_export.cli_base import EXIT_CODES, Artifacts, Json, Quiet, Verbose, session
from mvit_export.machine import usable_cores
from mvit_export.terminal import STYLES, Terminal, status_text


def evaluate(
    artifacts: Artifacts,
    data: Annotated[Path, typer.Option(help="Labelled pictures: DIR/CLASS/PICTURE, or .npz with images and labels.")],
    reference: Annotated[
        Path | None, typer.Option(help="Compare with this artifact (with PyTorch).", show_default=False)
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Where the checkpoint is now, if it has moved.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many pictures, evenly over all.", min=1)] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Points of top-1 that may be lost against the reference; more fails.", min=0)
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes (as many as cores).", min=1, show_default=False)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure accuracy on labelled pictures, and the difference from the fp32 model."""
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.evaluation import evaluate

        with terminal.progress("eval") as step:
            report = evaluate(
                artifacts, data=data, reference=reference, weights=weights, limit=limit, max_drop=max_drop,
                jobs=jobs or usable_cores(),
                on_progress=lambda done, total: step(f"eval: {done} of {total} pictures"),
            )  # fmt: skip
        print_data(terminal, report["environment"])
        for row in report["references"]:
            print_reference(terminal, row)
        for row in report["results"]:
            print_row(terminal, row)
        terminal.print_json(report)
        raise typer.Exit(EXIT_CODES[report["status"]])


def print_data(terminal: Terminal, environment: dict[str, Any]) -> None:
    data = environment["data"]
    share = "" if data["images"] == data["of"] else f" of {data['of']}"
    terminal.print(f"{data['images']}{share} pictures of {data['classes']} classes, {data['source']}")
    if data["skipped"]:
        left = f"{data['skipped']} unreadable pictures were left out, the first: {data['first_skipped']}"
        terminal.print("  ", Text("note", style="bold yellow"), left)


def print_reference(terminal: Terminal, row: dict[str, Any]) -> None:
    if row["status"] != "measured":
        terminal.print(status_text(row["status"]), f"the reference {row['name']}: {row['reason']}")
        return
    terminal.print(f"{row['name']}  the reference, {row['runtime']}")
    terminal.print(f"  {accuracy_words(row)}  {speed_words(row)}")


def print_row(terminal: Terminal, row: dict[str, Any]) -> None:
    """One artifact: its figures, then what they are worth."""
    if row["status"] != "measured":
        terminal.print(status_text(row["status"]), f"{row['path']}  {row['reason']}")
        return
    low, high = row["drop_interval"]
    terminal.print(f"{row['path']}  {row['runtime']}")
    terminal.print(
        f"  {accuracy_words(row)}  lost {row['drop_points']:.2f} points [{low:.2f}, {high:.2f}]  {speed_words(row)}"
    )
    line = f"  agrees {100 * row['agreement']:.2f} %"
    if row["mean_kl"] is not None:
        line += f"  mean KL {row['mean_kl']:.1e}"
        line += f"  top class's probability changes by {row['mean_delta_p']:.1e}, at most {row['max_delta_p']:.1e}"
    terminal.print(line)
    if gate := row["gate"]:
        terminal.print("  ", Text(gate["status"].upper(), style=STYLES[gate["status"]]), gate["reason"])
    for warning in row["warnings"]:
        terminal.print("  ", Text("note", style="bold yellow"), warning)


def accuracy_words(row: dict[str, Any]) -> str:
    return f"top-1 {100 * row['top1']:.2f} %  top-5 {100 * row['top5']:.2f} %  ECE {100 * row['ece']:.2f} %"


def speed_words(row: dict[str, Any]) -> str:
    return f"({row['images_per_s']:.0f} images/s in this evaluation, no latency)"
