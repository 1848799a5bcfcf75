"""What it gains to clean up an exported ONNX file: onnxslim, ONNX Runtime's offline optimization, `.ort`.

Every file of an artifact is opened by ONNX Runtime as a user opens it, with all of its optimizations, which work on
what the clean-up left. Outputs must equal those of the artifact's own file before anything is timed; opening and
inference are then sampled in turn. An export does none of these unasked: inference gains nothing, and the last two,
which open faster, tie a file to the version that made it, and the first of those to the processor. `.ort` is what
`export --ort` writes, without the layout of convolutions that only x86 has, where it is slower. Ends with one JSON
line.

    python -m mvit_export.benchmarks.tables.onnx_cleanup ARTIFACT [--threads 1] [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mvit_export.artifact import read_artifact
from mvit_export.benchmarks.harness.timing import Plan, Series, Subject, measure, ratio
from mvit_export.benchmarks.peers.markdown import table
from mvit_export.checks import figures
from mvit_export.checks.inputs import make_cases
from mvit_export.readers.ort import save_optimized
from mvit_export.tasks.unknown import UNKNOWN

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at import
import onnxruntime as ort

TOLERANCE = 1e-5  # of the largest output
OWN = "as exported"
COLUMNS = ("file", "size", "operators", "inference ms", "of its own [95 %]", "opening ms", "of its own [95 %]")


def slim(source: Path, path: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(str(source)), path)


CLEANED: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "onnxslim": ("slim.onnx", slim),
    "ONNX Runtime, offline": ("offline.onnx", partial(save_optimized, portable=False)),
    "ONNX Runtime, .ort": ("offline.ort", save_optimized),
}


def open_file(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def times(call: Callable[[], object]) -> Subject:
    def sample(count: int) -> Sequence[float]:
        found = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
        return found

    return sample


def check_equal(name: str, found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for output, reference in zip(found, expected, strict=True):
        error = figures.measure(reference, output, UNKNOWN).max_rel if np.isfinite(output).all() else math.inf
        if error > TOLERANCE:
            raise SystemExit(f"{name} changes an output by {error:.1e} of its scale, expected at most {TOLERANCE:g}")


def compare(files: dict[str, Path], feeds: dict[str, np.ndarray], threads: int, plan: Plan) -> list[dict[str, Any]]:
    """One record for each file, the artifact's own first."""
    sessions = {name: open_file(path, threads) for name, path in files.items()}
    expected = sessions[OWN].run(None, feeds)
    for name, session in sessions.items():
        check_equal(name, session.run(None, feeds), expected)
    runs = measure([times(partial(session.run, None, feeds)) for session in sessions.values()], plan)
    opens = measure([times(partial(open_file, path, threads)) for path in files.values()], plan)
    return [
        record(name, path, series, runs[0], opening, opens[0])
        for (name, path), series, opening in zip(files.items(), runs, opens, strict=True)
    ]


def record(name: str, path: Path, run: Series, own_run: Series, opening: Series, own_opening: Series) -> dict[str, Any]:
    count = len(onnx.load(str(path)).graph.node) if path.suffix == ".onnx" else None
    return {
        "file": name, "bytes": path.stat().st_size, "operators": count,
        "inference_ms": run.median, "inference_ratio": str(ratio(run.rounds, own_run.rounds)),
        "opening_ms": opening.median, "opening_ratio": str(ratio(opening.rounds, own_opening.rounds)),
        "settled": run.settled and opening.settled,
    }  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    inference, opening = (f"{row[key]:.2f}" for key in ("inference_ms", "opening_ms"))
    size, count = f"{row['bytes'] / 1e6:.2f} MB", "-" if row["operators"] is None else str(row["operators"])
    return [row["file"], size, count, inference, row["inference_ratio"], opening, row["opening_ratio"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=15, help="seconds for each file, twice")
    arguments = parser.parse_args()
    artifact = read_artifact(arguments.artifact)
    if artifact.model_path.suffix != ".onnx" or artifact.manifest.precision != "fp32":
        raise SystemExit(f"{artifact.model_path} is {artifact.manifest.precision}, expected a .onnx file in fp32")
    ort.set_default_logger_severity(3)  # it warns that what it writes is for this hardware only, as said above
    with tempfile.TemporaryDirectory() as folder:
        files = {OWN: artifact.model_path}
        for name, (file, clean) in CLEANED.items():
            files[name] = Path(folder) / file
            clean(artifact.model_path, files[name])
        feeds = {artifact.manifest.inputs[0].name: make_cases(artifact.manifest)[0].artifact_input}
        rows = compare(files, feeds, arguments.threads, Plan(budget_s=arguments.budget))
    print(table(COLUMNS, [cells(row) for row in rows]))
    print(json.dumps({"threads": arguments.threads, "onnxruntime": ort.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
