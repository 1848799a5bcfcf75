"""Our files against what a user would otherwise make of the same weights: the tables of peers in docs/results.md.

Weights are random and the same in all files: ours, mapped back to the names of timm and transformers and compared in
PyTorch. Each export runs in a fresh process, whose wall time and peak memory are recorded. Parity comes first: a file
that is not equal to our reference is not timed. The others are sampled in turn, in one run for each variant, runtime
and number of threads, so that ratios are taken between neighbours. Core ML has only sizes and operators, no latency
off macOS. Ends with one JSON line, unless --json is given.

    python -m mvit_export.benchmarks.peers [FOLDER] [--variants xxs xs s] [--formats onnx tflite coreml]
        [--threads 1 2] [--budget SECONDS] [--forms default,onnx:flat] [--onnx2tf-python FILE] [--json FILE]
    python -m mvit_export.benchmarks.peers FOLDER --no-export        # times what an earlier run left there, once more

If --forms names several, the first one is compared with each peer, and every one with the fastest peer.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mvit_export.artifact import write_json
from mvit_export.benchmarks.harness.bench import Options, run_bench
from mvit_export.benchmarks.harness.timing import Plan, ratio
from mvit_export.benchmarks.peers.files import DEFAULT, File, Making, kept_files, make_files, prepare
from mvit_export.benchmarks.peers.markdown import file_table, latency_table, summary_table
from mvit_export.checks import parity
from mvit_export.families.mobilevit.variants import VARIANT_NAMES
from mvit_export.formats.choices import split_list
from mvit_export.formats.table import FORMATS, TIMED
from mvit_export.results.fields import Record
from mvit_export.results.latency import Measurement, Ratio
from mvit_export.results.status import MEASURED

Rounds = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Timing(Record):
    """One row: a file in its runtime with a number of threads; without figures if parity kept it from being timed.

    `to_best`: its time over that of the fastest peer. `ours_to_it`: ours over its own, for a peer.
    """

    variant: str
    format: str
    threads: int
    name: str
    ours: bool
    status: str  # of parity, or NOT-RUN if the runtime is not there
    reason: str
    runtime: str | None = None
    median_ms: float | None = None
    interval_ms: tuple[float, float] | None = None
    settled: bool | None = None
    best_peer: bool = False
    to_best: Ratio | None = None
    ours_to_it: Ratio | None = None


def time_files(files: Sequence[File], threads: Sequence[int], plan: Plan) -> tuple[list[Timing], Mapping[str, Any]]:
    """The files of one variant and format; the correct ones in one interleaved run for each number of threads.

    With them the environment, as the harness reports it.
    """
    names = {str(file.place): file.name for file in files if file.status == parity.PASS}
    results: Sequence[Measurement] = ()
    environment: Mapping[str, Any] = {}
    if names:
        report = run_bench([Path(place) for place in names], threads=threads, options=Options(plan, roofline=False))
        results, environment = report.results, report.environment
    timings: list[Timing] = []
    for count in threads:
        timings += time_rows(files, count, {names[row.path]: row for row in results if row.threads == count})
    return timings, environment


def time_rows(files: Sequence[File], threads: int, rows: Mapping[str, Measurement]) -> list[Timing]:
    """A row for each file, by its name in the harness's `rows`, which lack the files that were not timed."""
    timings = [time_row(file, threads, rows.get(file.name)) for file in files]
    rounds = {timing.name: rows[timing.name].samples_by_round for timing in timings if timing.median_ms is not None}
    measured = [timing for timing in timings if timing.median_ms is not None]
    best = min((t for t in measured if not t.ours), key=lambda t: t.median_ms or 0, default=None)
    ours = next((t for t in measured if t.ours), None)
    return [compare(timing, rounds, best, ours) for timing in timings]


def time_row(file: File, threads: int, row: Measurement | None) -> Timing:
    blank = Timing(file.variant, file.format, threads, file.name, file.ours, file.status, file.reason)
    if row is None:
        return blank
    if row.status != MEASURED:
        return replace(blank, status=row.status, reason=row.reason)
    return replace(
        blank, runtime=row.runtime, median_ms=row.median_ms, interval_ms=row.median_interval_ms, settled=row.settled
    )


def compare(timing: Timing, rounds: Mapping[str, Rounds], best: Timing | None, ours: Timing | None) -> Timing:
    """The row with its ratios, each between medians of the same rounds."""
    own = rounds.get(timing.name)
    if own is None:
        return timing
    return replace(
        timing,
        best_peer=timing is best,
        to_best=ratio(own, rounds[best.name]) if best and timing is not best else None,
        ours_to_it=ratio(rounds[ours.name], own) if ours and not timing.ours else None,
    )


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that was asked for; progress goes to stderr."""
    making = Making(split_list(arguments.forms), arguments.export_runs, arguments.onnx2tf_python)
    files: list[File] = []
    timings: list[Timing] = []
    environment: dict[str, Any] = {}
    for variant in arguments.variants:
        source = None if arguments.no_export else prepare(variant, folder / variant, arguments.size)
        for fmt in arguments.formats:
            record = folder / variant / f"{fmt}.json"
            made = list(tell(make_files(source, fmt, making) if source else kept_files(record)))
            write_json(record, [asdict(file) for file in made])
            files += made
            if fmt in TIMED:
                timed, environment[fmt] = time_files(made, arguments.threads, Plan(budget_s=arguments.budget))
                timings += timed
    return {
        "environment": environment, "size": arguments.size, "budget_s": arguments.budget, "export_runs": making.runs,
        "files": [asdict(file) for file in files], "timings": [timing.to_json() for timing in timings],
    }  # fmt: skip


def tell(files: Iterator[File]) -> Iterator[File]:
    for file in files:
        print(f"{file.variant} {file.format}, {file.name}: {file.status} {file.reason}", file=sys.stderr, flush=True)
        yield file


def parse_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where files are kept")
    parser.add_argument("--variants", nargs="+", choices=VARIANT_NAMES, default=list(VARIANT_NAMES))
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=sorted(FORMATS, key=lambda name: name not in TIMED)
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each file and number of threads")
    parser.add_argument("--forms", default=DEFAULT, help="ours, with commas; FORMAT:FORM for one format only")
    parser.add_argument("--size", type=int, default=256, help="of the image")
    parser.add_argument("--export-runs", type=int, default=1, help="of each file; the median counts")
    parser.add_argument("--onnx2tf-python", default=sys.executable, help="Python of an environment that has onnx2tf")
    parser.add_argument("--no-export", action="store_true", help="use the files that are in FOLDER")
    parser.add_argument("--json", type=Path, help="where the document goes, instead of the last line")
    arguments = parser.parse_args(given)
    if arguments.no_export and not arguments.folder:
        parser.error("--no-export needs the FOLDER of an earlier run")
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(given)
    with tempfile.TemporaryDirectory() as scratch:
        document = run(arguments, arguments.folder or Path(scratch))
    timings, files = document["timings"], document["files"]
    print(summary_table(timings), latency_table(timings), file_table(files), sep="\n\n")
    if arguments.json:
        write_json(arguments.json, document)
    else:
        print(json.dumps(document))


if __name__ == "__main__":
    main()
