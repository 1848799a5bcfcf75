"""`mvit-export inspect`: what is inside a file."""

from __future__ import annotations

from mvit_export.cli.options import Artifacts, Json, Quiet, Verbose, session


def inspect(artifacts: Artifacts, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show inputs, outputs, sizes and operators; for Core ML, what is eligible for the Neural Engine.

    Accepts any .mlpackage too. -v lists every op.
    """
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.readers.inspect import describe, inspect_path

        reports = [report for path in artifacts for report in inspect_path(path)]
        for report in reports:
            for line in describe(report, verbose=verbose):
                terminal.print(line)
        terminal.print_json({"status": "pass", "artifacts": reports})
