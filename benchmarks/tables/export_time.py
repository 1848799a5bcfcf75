"""How long an export takes: our one command for all formats, verification included, against the three bare converters.

Bare is what a user's own script does: timm's network of the same variant, one library call, the file written and
nothing checked. Each runs in a fresh process, imports included, and all of them once per round, in turn, so that a busy
machine slows all alike. The ratio is our wall time to the sum of theirs, taken round by round; its bound is 0.75.
Memory is the largest sum of the resident sets of all processes of a command, shared pages counted in each; bound 4 GiB.
Ends with one JSON line.

    python -m mvit_export.benchmarks.tables.export_time [--variant xxs] [--rounds 3] [--jobs N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mvit_export.families.mobilevit.variants import VARIANT_NAMES

BOUND, MEMORY_BOUND = 0.75, 4 * 2**30
INTERVAL = 0.1  # seconds between two readings of memory
# The first lines let timm import beside a torchvision whose operators were built for another torch.
PREAMBLE = """
import sys, torch
library = torch.library.Library("torchvision", "FRAGMENT")
try:
    import torchvision
except (ImportError, RuntimeError):
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
name, path = sys.argv[1:]
model, x = timm.create_model(name).eval(), torch.rand(1, 3, 256, 256)
"""
BARE = {
    "Core ML": """
import coremltools as ct
program = torch.export.export(model, (x,)).run_decompositions({})
ct.convert(program, minimum_deployment_target=ct.target.iOS16).save(path + ".mlpackage")
""",
    "ONNX": """
torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(path + ".onnx")
""",
    "TFLite": """
import litert_torch
litert_torch.convert(model, (x,)).export(path + ".tflite")
""",
}
OURS = "mvit-export --to all"


@dataclass(frozen=True)
class Run:
    """One command: wall time, and the peak of the resident sets of its processes."""

    seconds: float
    peak_bytes: int


def run_command(command: list[str]) -> Run:
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while True:
            peak = max(peak, sum(map(resident, tree_of(process.pid))))
            try:
                code = process.wait(INTERVAL)
                break
            except subprocess.TimeoutExpired:
                continue
        seconds = time.perf_counter() - start
        if code:
            output.seek(0)
            raise SystemExit(f"{command}: exit code {code}\n{output.read().decode(errors='replace')[-2000:]}")
    return Run(seconds, peak)


def tree_of(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in children:
            yield from tree_of(int(child))


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it has ended
        return 0


def commands(variant: str, jobs: int | None, folder: Path) -> dict[str, list[str]]:
    name = f"mobilevit_{variant}"
    ours = [sys.executable, "-m", "mvit_export", "--to", "all", "--variant", variant, "--out", str(folder / "ours")]
    found = {OURS: ours + ([] if jobs is None else ["--jobs", str(jobs)])}
    for fmt, code in BARE.items():
        found[fmt] = [sys.executable, "-c", PREAMBLE + code, name, str(folder / name)]
    return found


def measure(variant: str, jobs: int | None, rounds: int) -> list[dict[str, Run]]:
    """Each round runs everything once; an extra first one fills the disk caches."""
    found = []
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory() as scratch:
            todo = commands(variant, jobs, Path(scratch))
            found.append({name: run_command(command) for name, command in todo.items()})
    return found[1:]


def ratios(rounds: list[dict[str, Run]]) -> list[float]:
    return [turn[OURS].seconds / sum(turn[fmt].seconds for fmt in BARE) for turn in rounds]


def print_table(rounds: list[dict[str, Run]]) -> None:
    print("| in a fresh process | median s | from | to | peak memory |\n|---|---|---|---|---|")
    for name in (*BARE, OURS):
        seconds = [turn[name].seconds for turn in rounds]
        peak = max(turn[name].peak_bytes for turn in rounds)
        cells = [f"{value:.1f}" for value in (statistics.median(seconds), min(seconds), max(seconds))]
        print(f"| {name} | {' | '.join(cells)} | {peak / 2**20:.0f} MiB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANT_NAMES, default="xxs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int)
    arguments = parser.parse_args()
    rounds = measure(arguments.variant, arguments.jobs, arguments.rounds)
    print_table(rounds)
    found, peak = ratios(rounds), max(turn[OURS].peak_bytes for turn in rounds)
    middle = statistics.median(found)
    print(f"ratio to the sum of the three: {middle:.2f} [{min(found):.2f}, {max(found):.2f}], bound {BOUND}")
    runs = {name: [round(turn[name].seconds, 2) for turn in rounds] for name in (OURS, *BARE)}
    verdict = {"ratio": round(middle, 3), "ratios": [round(value, 3) for value in found], "peak_bytes": peak}
    agreed = middle <= BOUND and peak <= MEMORY_BOUND
    print(json.dumps({"variant": arguments.variant, "cores": os.cpu_count(), "seconds": runs, **verdict, "ok": agreed}))


if __name__ == "__main__":
    main()
