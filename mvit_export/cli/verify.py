"""`mvit-export verify`: exported files against the model they came from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvit_export.cli.codes import EXIT_CODES
from mvit_export.cli.help import COMPARE
from mvit_export.cli.options import (
    Artifacts,
    BenchmarkBinary,
    Device,
    DevicePython,
    Json,
    Quiet,
    TrustCode,
    Verbose,
    print_verdict,
    session,
)
from mvit_export.cli.terminal import Terminal
from mvit_export.errors import UsageError
from mvit_export.results.status import FAIL

if TYPE_CHECKING:
    from mvit_export.results.parity import ParityResult


def verify(
    artifacts: Artifacts,
    against: Annotated[
        str,
        typer.Option(
            help="pytorch: the model, rebuilt from its weights; golden: stored vectors, without torch.",
            rich_help_panel=COMPARE,
        ),
    ] = "pytorch",
    weights: Annotated[
        str | None, typer.Option(help="Where the checkpoint is now, if it was moved.", rich_help_panel=COMPARE)
    ] = None,
    locate: Annotated[
        bool,
        typer.Option(
            "--locate", help="Name the first layer whose output differs from PyTorch's.", rich_help_panel=COMPARE
        ),
    ] = False,
    device: Device = "local",
    device_python: DevicePython = None,
    benchmark_binary: BenchmarkBinary = None,
    trust_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check exported files against the PyTorch model."""
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.checks import parity
        from mvit_export.results.parity import ParityReport

        results: list[ParityResult] = []
        if locate and device != "local":
            raise UsageError("--locate looks into files with the runtimes of this machine; leave out --device")
        with terminal.progress("verify") as step, runtimes_on(device, device_python, benchmark_binary) as elsewhere:
            for path in artifacts:

                def on_case(done: int, total: int, path: Path = path) -> None:
                    step(f"verify {path}: input {done} of {total}")

                results += parity.verify(
                    path, against=against, weights=weights, find_layer=locate, on_case=on_case, **elsewhere
                )
        print_results(terminal, results, hint=against == "pytorch" and not locate and device == "local")
        report = ParityReport(tuple(results))
        terminal.print_json(report.to_json())
        raise typer.Exit(EXIT_CODES[report.status])


def print_results(terminal: Terminal, results: Sequence[ParityResult], *, hint: bool) -> None:
    """Every verdict, with the layer at fault or, as a `hint`, the command that finds it."""
    for result in results:
        print_verdict(terminal, result)
        if result.located:
            terminal.print(f"        {result.located}")
        elif result.status == FAIL and hint:
            terminal.print(f"        which layer: mvit-export verify --locate {result.path}")


def runtimes_on(device: str, python: str | None, binary: Path | None) -> AbstractContextManager[dict[str, Any]]:
    """Keywords for `parity.verify`; none for this machine, whose runtimes it knows."""
    if (device, python, binary) == ("local", None, None):
        return nullcontext({})
    from mvit_export.benchmarks.devices.sessions import device_sessions

    return device_sessions(device, python=python, binary=binary)
