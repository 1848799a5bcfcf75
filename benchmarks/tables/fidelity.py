"""Does the harness add anything? Its figure against a bare loop over the same runtime, interleaved.

The bare loop is what a user would write: load the file, call it in a `for`, take the time, in this same process. The
ratio of the two should lie within 3 % of one. Ends with one JSON line.

    python -m mvit_export.benchmarks.tables.fidelity artifacts/mobilevit_xxs --threads 1
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.artifact import Artifact, find_artifacts, read_artifact
from mvit_export.benchmarks.devices.local import Local
from mvit_export.benchmarks.harness.configurations import plan_settings
from mvit_export.benchmarks.harness.timing import Plan, measure, ratio
from mvit_export.runner.__main__ import become_idle

LIMIT = 0.03


def bare_onnx(path: str, threads: int) -> Callable[[np.ndarray], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})


def bare_tflite(path: str, threads: int) -> Callable[[np.ndarray], Any]:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=path, num_threads=threads).get_signature_runner()
    return lambda image: runner(image=image)


BARE = {"onnx": bare_onnx, "tflite": bare_tflite}


def bare_loop(call: Callable[[np.ndarray], Any], image: np.ndarray) -> Callable[[int], list[float]]:
    def sample(count: int) -> list[float]:
        call(image)  # the harness ran in between: bring the caches back, as it does itself
        times = []
        for _ in range(count):
            start = time.perf_counter()
            call(image)
            times.append(1e3 * (time.perf_counter() - start))
        become_idle()  # or the runtime's threads, which spin for a while, would take a core from the harness
        return times

    return sample


def compare(artifact: Artifact, threads: int, plan: Plan) -> dict[str, Any]:
    (setting,) = plan_settings([artifact], threads=[threads])
    shape, dtype = setting.feed
    image = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    call = BARE[artifact.manifest.format](str(artifact.model_path), threads)
    with Local() as device, device.probe(setting) as probe:
        bare, harness = measure([bare_loop(call, image), probe.sample], plan)
    found = ratio(harness.rounds, bare.rounds)
    return {
        "path": str(artifact.path), "threads": threads, "bare_ms": bare.median, "harness_ms": harness.median,
        "ratio": found.median, "interval": list(found.interval), "ok": abs(found.median - 1) <= LIMIT,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--budget", type=float, default=30.0)
    arguments = parser.parse_args()
    rows = []
    for place in [place for path in arguments.artifacts for place in find_artifacts(path)]:
        artifact = read_artifact(place)
        for threads in arguments.threads if artifact.manifest.format in BARE else ():
            row = compare(artifact, threads, Plan(budget_s=arguments.budget))
            rows.append(row)
            interval = "[{:.3f}, {:.3f}]".format(*row["interval"])
            print(
                f"{row['path']}, {threads} thread(s): bare {row['bare_ms']:.2f} ms, harness {row['harness_ms']:.2f} ms"
            )
            print(f"  ratio {row['ratio']:.3f} {interval}, {'within' if row['ok'] else 'NOT within'} {LIMIT:.0%}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
