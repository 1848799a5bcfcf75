"""`mvit-export bench`: latency of artifacts, here or on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from mvit_export.cli_base import (
    EXIT_CODES,
    Artifacts,
    BenchmarkBinary,
    Device,
    DevicePython,
    Json,
    Quiet,
    Verbose,
    session,
)
from mvit_export.errors import UsageError
from mvit_export.formats import split_list
from mvit_export.terminal import STYLES, Terminal


def bench(
    artifacts: Artifacts,
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="NAME[:OPTION]: onnxruntime:xnnpack, litert:builtin, coreml:cpuOnly, pytorch; with commas."),
    ] = None,
    threads: Annotated[str, typer.Option(help="Threads of each process; 1,2 measures both.")] = "1",
    batch: Annotated[str | None, typer.Option(help="Batch sizes, with commas (the file's own, or 1).")] = None,
    image_size: Annotated[list[str] | None, typer.Option(help="For files of several sizes: N or HxW.")] = None,
    device: Device = "local",
    device_python: DevicePython = None,
    benchmark_binary: BenchmarkBinary = None,
    budget: Annotated[float, typer.Option(help="Most seconds for each artifact.", min=0.1, max=86400)] = 30.0,
    precision: Annotated[str, typer.Option(help="Stop when medians are known to within this.")] = "2%",
    baseline: Annotated[
        Path | None, typer.Option(help="JSON of an earlier bench, or an artifact to measure beside the others.")
    ] = None,
    max_slowdown: Annotated[str | None, typer.Option(help="With --baseline: slower than this fails, e.g. 10%.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show the time by op type.")] = False,
    roofline: Annotated[bool, typer.Option("--roofline/--no-roofline", help="Measure the runtime's peak.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure latency: medians with intervals, artifacts interleaved, ratios to the first."""
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.benchmarks.bench import Options, run_bench
        from mvit_export.benchmarks.timing import Plan

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
                options=Options(
                    Plan(budget_s=budget, precision=parse_share(precision, "--precision")),
                    roofline=roofline,
                    profile=profile,
                    binary=benchmark_binary,
                ),
                on_step=step,
            )
        for row in report["results"]:
            print_row(terminal, row)
        terminal.print_json(report)
        raise typer.Exit(EXIT_CODES[report["status"]])


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """`"1,2"` -> (1, 2)."""
    parts = split_list(text)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} is {text!r}, expected positive numbers with commas, such as 1,2")
    return tuple(map(int, parts))


def parse_share(text: str, option: str, *, zero: bool = False) -> float:
    """`"10%"` or `"0.1"` -> 0.1. `zero`: none at all is a share too."""
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf") or not (share or zero):
        raise UsageError(f"{option} is {text!r}, expected a share such as 10% or 0.1")
    return share


def print_row(terminal: Terminal, row: dict[str, Any]) -> None:
    """One artifact in one runtime: its figures, then what they are worth."""
    where = row["runtime"] + (f" on {row['device']}" if row["device"] != "local" else "")
    shape = "x".join(map(str, row["input_shape"]))
    terminal.print(f"{row['path']}  {shape}, {row['threads']} thread{'s' * (row['threads'] > 1)}, {where}")
    if row["status"] == "not-run":
        terminal.print("  ", Text("NOT-RUN", style=STYLES["not-run"]), row["reason"])
        return
    low, high = row["median_interval_ms"]
    line = f"  median {row['median_ms']:.2f} ms [{low:.2f}, {high:.2f}]"
    line += "".join(f"  {name} {row[f'{name}_ms']:.2f}" for name in ("min", "p90", "p99") if row[f"{name}_ms"])
    if ratio := row["ratio"]:
        line += "  {:.3f}x [{:.3f}, {:.3f}] of the first".format(ratio["median"], *ratio["interval"])
    terminal.print(f"{line}  ({len(row['samples_ms'])} samples)")
    terminal.print("  " + "  ".join(small_figures(row)))
    if base := row.get("baseline"):
        terminal.print(f"  {base['status'].upper()}  {base['reason']}")
    for warning in row["warnings"]:
        terminal.print("  ", Text("note", style="bold yellow"), warning)
    for device, count in (row["placement"] or {}).items():
        terminal.print(f"  planned on {device}: {count} operations")
    for op in row["profile"] or ():
        terminal.print(f"  {op['type']:<28} {op['ms']:8.3f} ms  {100 * op['share']:5.1f} %  {op['count']:>4} ops")


def small_figures(row: dict[str, Any]) -> list[str]:
    parts = [f"load {row['load_ms']:.0f} ms cold", f"first run {row['first_ms']:.1f} ms"]
    if row["load_warm_ms"] is not None:
        parts[0] += f", {row['load_warm_ms']:.0f} warm"
    if row["peak_rss_mb"] is not None:
        parts.append(f"memory {row['peak_rss_mb']:.0f} MB")
    if row["macs"] is not None:
        parts.append(f"{row['macs'] / 1e6:.0f}M MACs")
    parts.append(f"file {row['bytes'] / 1e6:.1f} MB")
    if roof := row["roofline"]:
        reached = f"{roof['achieved_gmacs']:.1f} of {roof['peak_gmacs']:.1f} GMAC/s"
        parts.append(f"{reached} ({100 * roof['peak_share']:.0f} % of the runtime's peak)")
    return parts
