"""`mvit-export bench`: latency of artifacts, here or on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mvit_export.cli.codes import EXIT_CODES
from mvit_export.cli.help import COMPARE, MEASURE
from mvit_export.cli.options import (
    Artifacts,
    BenchmarkBinary,
    Device,
    DevicePython,
    Json,
    Quiet,
    TrustCode,
    Verbose,
    session,
)
from mvit_export.cli.terminal import STYLES, Terminal
from mvit_export.errors import UsageError
from mvit_export.formats.choices import split_list
from mvit_export.results.latency import Measurement
from mvit_export.results.status import NOT_RUN


def bench(
    artifacts: Artifacts,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME[:OPTION], comma-separated: onnxruntime:xnnpack, litert:builtin, coreml:cpuOnly, pytorch.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    threads: Annotated[
        str, typer.Option(help="Threads of each process; 1,2 measures both.", rich_help_panel=MEASURE)
    ] = "1",
    batch: Annotated[
        str | None,
        typer.Option(help="Batch sizes, comma-separated (the file's own, or 1).", rich_help_panel=MEASURE),
    ] = None,
    image_size: Annotated[
        list[str] | None, typer.Option(help="For files that accept several sizes: N or HxW.", rich_help_panel=MEASURE)
    ] = None,
    device: Device = "local",
    device_python: DevicePython = None,
    benchmark_binary: BenchmarkBinary = None,
    budget: Annotated[
        float,
        typer.Option(help="At most this many seconds for each artifact.", min=0.1, max=86400, rich_help_panel=MEASURE),
    ] = 30.0,
    precision: Annotated[
        str, typer.Option(help="Stop when medians are known to within this.", rich_help_panel=MEASURE)
    ] = "2%",
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="JSON of an earlier bench, or an artifact to measure alongside the others.", rich_help_panel=COMPARE
        ),
    ] = None,
    max_slowdown: Annotated[
        str | None,
        typer.Option(help="With --baseline: fail if slower by more than this, e.g. 10%.", rich_help_panel=COMPARE),
    ] = None,
    judge_by: Annotated[
        str,
        typer.Option(help="With --baseline: compare wall or cpu time.", rich_help_panel=COMPARE),
    ] = "wall",
    profile: Annotated[
        bool, typer.Option("--profile", help="Show the time that each type of op takes.", rich_help_panel=MEASURE)
    ] = False,
    roofline: Annotated[
        bool,
        typer.Option(
            "--roofline/--no-roofline", help="Measure the runtime's peak to compare with.", rich_help_panel=MEASURE
        ),
    ] = True,
    trust_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure latency: medians with intervals, artifacts interleaved, ratios to the first."""
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.benchmarks.harness.bench import Options, run_bench
        from mvit_export.benchmarks.harness.timing import Plan

        with terminal.progress("bench") as step:
            report = run_bench(
                artifacts,
                runtimes=split_list(runtime or ()),
                threads=parse_counts(threads, "--threads"),
                batches=parse_counts(batch, "--batch") if batch is not None else (),
                sizes=tuple(image_size or ()),
                device=device,
                device_python=device_python,
                baseline=baseline,
                max_slowdown=None if max_slowdown is None else parse_share(max_slowdown, "--max-slowdown", zero=True),
                judge_by=judge_by,
                options=Options(
                    Plan(budget_s=budget, precision=parse_share(precision, "--precision")),
                    roofline=roofline,
                    profile=profile,
                    binary=benchmark_binary,
                ),
                on_step=step,
            )
        for row in report.results:
            print_row(terminal, row)
        terminal.print_json(report.to_json())
        raise typer.Exit(EXIT_CODES[report.status])


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """`"1,2"` -> (1, 2)."""
    parts = split_list(text)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} is {text!r}, expected positive numbers with commas, such as 1,2")
    return tuple(map(int, parts))


def parse_share(text: str, option: str, *, zero: bool = False) -> float:
    """`"10%"` or `"0.1"` -> 0.1. With `zero`, 0 is a share too."""
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf") or not (share or zero):
        raise UsageError(f"{option} is {text!r}, expected a share such as 10% or 0.1")
    return share


def print_row(terminal: Terminal, row: Measurement) -> None:
    """One artifact in one runtime: its figures, then what qualifies them."""
    where = row.runtime + (f" on {row.device}" if row.device != "local" else "")
    shape = "x".join(map(str, row.input_shape))
    terminal.print(f"{row.path}  {shape}, {row.threads} thread{'s' * (row.threads != 1)}, {where}")
    if row.status == NOT_RUN:
        terminal.print("  ", Text("NOT-RUN", style=STYLES[NOT_RUN]), row.reason)
        return
    line = f"  {median_words(row)}"
    percentiles = {"min": row.min_ms, "p90": row.p90_ms, "p99": row.p99_ms}
    line += "".join(f"  {name} {value:.2f}" for name, value in percentiles.items() if value)
    if row.ratio:
        line += "  {:.3f}x [{:.3f}, {:.3f}] of the first".format(row.ratio.median, *row.ratio.interval)
    terminal.print(f"{line}  ({len(row.samples_ms)} samples)")
    terminal.print("  " + "  ".join(small_figures(row)))
    if row.baseline:
        terminal.print(f"  {row.baseline.status.upper()}  {row.baseline.reason}")
    for warning in row.warnings:
        terminal.print("  ", Text("note", style="bold yellow"), warning)
    for device, count in (row.placement or {}).items():
        terminal.print(f"  planned on {device}: {count} operations")
    for op in row.profile or ():
        terminal.print(f"  {op.type:<28} {op.ms:8.3f} ms  {100 * op.share:5.1f} %  {op.count:>4} ops")


def median_words(row: Measurement) -> str:
    assert row.median_interval_ms
    low, high = row.median_interval_ms
    return f"median {row.median_ms:.2f} ms [{low:.2f}, {high:.2f}]"


def small_figures(row: Measurement) -> list[str]:
    parts = [f"load {row.load_ms:.0f} ms cold", f"first run {row.first_ms:.1f} ms"]
    if row.load_warm_ms is not None:
        parts[0] += f", {row.load_warm_ms:.0f} warm"
    if row.peak_rss_mb is not None:
        parts.append(f"memory {row.peak_rss_mb:.0f} MB")
    if row.macs is not None:
        parts.append(f"{row.macs / 1e6:.0f}M MACs")
    if row.bytes is not None:
        parts.append(f"file {row.bytes / 1e6:.1f} MB")
    if roof := row.roofline:
        reached = f"{roof.achieved_gmacs:.1f} of {roof.peak_gmacs:.1f} GMAC/s"
        parts.append(f"{reached} ({100 * roof.peak_share:.0f} % of the runtime's peak)")
    return parts
