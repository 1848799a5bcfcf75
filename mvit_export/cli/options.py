"""What every command shares: the common options, and errors as one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mvit_export.cli.codes import EXIT_ERROR, EXIT_INTERRUPTED
from mvit_export.cli.help import DEVICES, OUTPUT, TRUST
from mvit_export.cli.terminal import Terminal, status_text
from mvit_export.errors import ModelError, MvitExportError, UsageError, first_line, text_of
from mvit_export.system.limits import find_limit
from mvit_export.system.silent_end import no_silent_end

Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document on stdout; text for people goes to stderr.", rich_help_panel=OUTPUT
    ),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.", rich_help_panel=OUTPUT)]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", help="Show what the converters print, and tracebacks.", rich_help_panel=OUTPUT),
]
Artifacts = Annotated[
    list[Path],
    typer.Argument(
        metavar="ARTIFACT...", help="Artifact directories, folders that contain some, or model files inside one."
    ),
]

Device = Annotated[
    str,
    typer.Option(
        help="Where the files run: local, ssh:HOST, adb:SERIAL, or arm64 (emulated; see doctor).",
        rich_help_panel=DEVICES,
    ),
]
BenchmarkBinary = Annotated[
    Path | None,
    typer.Option(help="For adb: TFLite's benchmark_model, built for the phone.", rich_help_panel=DEVICES),
]
DevicePython = Annotated[
    str | None,
    typer.Option(help="For ssh: Python on the device, such as that of a venv (python3).", rich_help_panel=DEVICES),
]


def trust_if_asked(asked: bool) -> bool:
    if asked:
        from mvit_export.system.trust import trust_everything

        trust_everything()
    return asked


TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        callback=trust_if_asked,
        help="Run the Python file and read the weights that a manifest names, though you have not exported them.",
        rich_help_panel=TRUST,
    ),
]


@contextmanager
def session(as_json: bool, quiet: bool, verbose: bool) -> Iterator[Terminal]:
    """A Terminal in which an error becomes one line and an exit code."""
    with Terminal(as_json=as_json, quiet=quiet, verbose=verbose) as terminal:
        try:
            with no_silent_end():
                yield terminal
        except typer.Exit:
            raise
        except KeyboardInterrupt as error:
            terminal.error(UsageError("interrupted; nothing half-written was left"))
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except MvitExportError as error:
            terminal.error(error)
            raise typer.Exit(EXIT_ERROR) from error
        except Exception as error:
            terminal.error(describe(error).with_traceback(error.__traceback__))
            raise typer.Exit(EXIT_ERROR) from error
        except BaseException as error:  # SystemExit, GeneratorExit or a class of its own: a network's code, not ours
            message = f"a network's own code, or a library, raised {type(error).__name__}: {first_line(error)}"
            terminal.error(ModelError(message).with_traceback(error.__traceback__))
            raise typer.Exit(EXIT_ERROR) from error


def describe(error: Exception) -> Exception:
    """What this machine refuses (memory, space, rights), or a bug of ours: one line, never a failed check's code."""
    if isinstance(error, OSError) and error.errno != errno.ENOMEM:
        what = f"{error.filename}: " if error.filename is not None else ""
        return MvitExportError(f"{what}{error.strerror or error}; check that folders exist, space, rights and limits")
    if limit := find_limit(error):
        return limit
    message = f"internal error, {type(error).__name__}: {text_of(error)}; -v shows where, please report it"
    return RuntimeError(message)


def print_verdict(terminal: Terminal, result: Any, *extra: str) -> None:
    """PASS  path  figures  runtime, or the reason."""
    parts = [result.path, *extra]
    if result.metrics is not None:
        metrics = result.metrics
        parts.append(f"{metrics.psnr_db:.1f} dB, max error {metrics.max_rel:.1e} of scale")
        parts.append(f"{result.inputs} inputs vs {result.against} in {result.runtime}")
    if result.note:
        parts.append(f"({result.note})")
    if result.reason:
        parts.append(result.reason)
    terminal.print(status_text(result.status), "  ".join(parts))
