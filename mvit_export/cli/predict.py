"""`mvit-export predict`: what a file answers to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mvit_export.cli.codes import EXIT_CODES
from mvit_export.cli.help import FILES
from mvit_export.cli.options import Json, Quiet, Verbose, session
from mvit_export.errors import RuntimeUnavailable
from mvit_export.results.status import NOT_RUN


def predict(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="An artifact directory or the model file in it.")
    ],
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURE...", help="Pictures, and folders with pictures at any depth.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Write the JSON document to this file too.", rich_help_panel=FILES),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run a file on your pictures, with its own preprocessing and runtime."""
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.artifact import write_json
        from mvit_export.checks.prediction import predict

        try:
            with terminal.progress("predict"):
                found = predict(artifact, pictures)
        except RuntimeUnavailable as error:
            document = {"status": NOT_RUN, "artifact": str(artifact), "reason": str(error)}
            terminal.print(Text("NOT-RUN", style="bold yellow"), f"{artifact}  {error}")
            terminal.print_json(document)
            raise typer.Exit(EXIT_CODES[NOT_RUN]) from error
        document = found.to_json()
        if out is not None:
            write_json(out, document)
        terminal.print(f"{found.artifact.path}  {found.runtime}")
        for note in found.notes:
            terminal.print("  ", Text("note", style="bold yellow"), note)
        for prediction in found.predictions:
            terminal.print(prediction.picture)
            for line in prediction.answer.lines:
                terminal.print(f"  {line}")
        terminal.print_json(document)
