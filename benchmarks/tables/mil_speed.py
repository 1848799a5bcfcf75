"""Time per image of the Core ML reference executor, as a multiple of PyTorch eager on the same machine.

Interleaved: each round times every runner once, in turn, so that a busy machine slows all of them alike; the ratio is
taken round by round and its median reported. One thread unless --threads says otherwise, batch 1, 256x256. Ends with
one JSON line. The limits of a release are 2 for fp32 and 4 for fp16.

    python -m mvit_export.benchmarks.tables.mil_speed --variants xxs xs s --rounds 30
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import coremltools as ct
import torch

from mvit_export.families.mobilevit.network import create_mobilevit
from mvit_export.mil import load

LIMITS = {"fp32": 2.0, "fp16": 4.0}
PRECISIONS = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}
SIZE = 256


def runners(variant: str, folder: Path) -> dict[str, Callable[[], object]]:
    """PyTorch eager and the executor in both precisions, on one image."""
    model = create_mobilevit(variant).eval()
    x = torch.rand(1, 3, SIZE, SIZE)
    exported = torch.export.export(model, (x,)).run_decompositions({})

    def eager() -> object:
        with torch.inference_mode():
            return model(x)

    timed: dict[str, Callable[[], object]] = {"eager": eager}
    for name, precision in PRECISIONS.items():
        options = dict(minimum_deployment_target=ct.target.iOS17, compute_precision=precision, skip_model_load=True)
        inputs = [ct.TensorType(name="image", shape=x.shape)]
        package = folder / f"{variant}_{name}.mlpackage"
        ct.convert(exported, inputs=inputs, **options).save(str(package))
        program, array = load(package), x.numpy()
        timed[name] = functools.partial(program, image=array)
    return timed


def measure(timed: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each runner in each round."""
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(warmup + rounds):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            if turn >= warmup:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["xxs", "xs", "s"], choices=["xxs", "xs", "s"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results = []
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory() as folder:
            samples = measure(runners(variant, Path(folder)), arguments.rounds)
        eager = samples["eager"]
        row = {"variant": variant, "eager_ms": round(statistics.median(eager), 2)}
        for name, limit in LIMITS.items():
            ratio = statistics.median(b / a for a, b in zip(eager, samples[name], strict=True))
            row |= {f"{name}_ms": round(statistics.median(samples[name]), 2), f"{name}_ratio": round(ratio, 2)}
            row |= {f"{name}_ok": ratio <= limit}
        results.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(json.dumps({"threads": arguments.threads, "rounds": arguments.rounds, "size": SIZE, "results": results}))


if __name__ == "__main__":
    main()
