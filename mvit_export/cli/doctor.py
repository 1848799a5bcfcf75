"""`mvit-export doctor`: what works on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from mvit_export.cli.help import DEVICES
from mvit_export.cli.options import Json, Quiet, Verbose, session


def doctor(
    setup: Annotated[
        str | None,
        typer.Option(help="First build what a device needs: arm64 for ARM emulation.", rich_help_panel=DEVICES),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show which targets, runtimes and devices work here."""
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.benchmarks.devices.table import findings, setups
        from mvit_export.doctor import examine
        from mvit_export.formats.choices import choose

        if setup is not None:
            name = choose(setup, list(setups()), what="--setup")
            with terminal.progress(name) as step:
                place = setups()[name](lambda what: step(f"{name}: {what}"))
                terminal.print(f"{name} is ready in {place}")
        with terminal.progress("importing converters and runtimes"):
            found = [*examine(), *findings()]
        width = max(len(finding.name) for finding in found)
        for finding in found:
            mark = "yes" if finding.works else "no "
            terminal.print(f"{finding.kind:<8} {finding.name:<{width}}  {mark}  {finding.detail}")
        terminal.print_json({"status": "pass", "findings": [finding.to_json() for finding in found]})
