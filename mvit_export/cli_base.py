"""What every command shares: the exit codes, the options that all take, and errors as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mvit_export.errors import MvitExportError, UsageError
from mvit_export.terminal import Terminal

EXIT_CODES = {"pass": 0, "fail": 1, "not-run": 3}
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; people read stderr.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show what the converters print, and tracebacks.")]
Artifacts = Annotated[
    list[Path],
    typer.Argument(metavar="ARTIFACT...", help="Artifact directories, directories of them, or model files inside one."),
]

Device = Annotated[
    str, typer.Option(help="Where files run: local, ssh:HOST, adb:SERIAL, or arm64 (emulated; see doctor).")
]
BenchmarkBinary = Annotated[Path | None, typer.Option(help="For adb: TFLite's benchmark_model, built for the phone.")]
DevicePython = Annotated[str | None, typer.Option(help="The Python of an ssh device (python3), e.g. a venv's.")]


@contextmanager
def session(as_json: bool, quiet: bool, verbose: bool) -> Iterator[Terminal]:
    """A Terminal in which an error becomes one line and an exit code."""
    with Terminal(as_json=as_json, quiet=quiet, verbose=verbose) as terminal:
        try:
            yield terminal
        except typer.Exit:
            raise
        except KeyboardInterrupt as error:
            terminal.error(UsageError("interrupted; nothing half-written was left"))
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except MvitExportError as error:
            terminal.error(error)
            raise typer.Exit(EXIT_ERROR) from error
        except Exception as error:  # a bug of ours: still one line and never the exit code of a failed check
            message = f"internal error, {type(error).__name__}: {error}; -v shows where, please report it"
            terminal.error(RuntimeError(message).with_traceback(error.__traceback__))
            raise typer.Exit(EXIT_ERROR) from error
