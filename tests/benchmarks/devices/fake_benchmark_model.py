"""A stand-in for TFLite's benchmark_model: the flags we use, its wording, and the model really run (by ai-edge-litert).

Wording and order follow benchmark_tflite_model.cc, benchmark_model.cc and stats_calculator.h of its sources.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

DEFAULTS = {
    "graph": "", "num_threads": "-1", "num_runs": "50", "min_secs": "1", "max_secs": "150", "warmup_runs": "1",
    "warmup_min_secs": "0.5", "use_xnnpack": "", "use_gpu": "false", "use_nnapi": "false", "input_layer": "",
    "input_layer_shape": "", "input_layer_value_files": "", "output_filepath": "", "gpu_precision_loss_allowed": "true",
    "nnapi_allow_fp16": "false",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    given = dict(word.removeprefix("--").split("=", 1) for word in arguments)
    flags = DEFAULTS | given
    info("STARTING!")
    if phone()["fault"] == "hang":
        time.sleep(600)
    unknown = [word for word in arguments if word.removeprefix("--").split("=")[0] not in DEFAULTS]
    if unknown:
        print("WARN: Unconsumed cmdline flags:", *unknown)
    info("Log parameter values verbosely: [0]")
    info(f"Graph: [{flags['graph']}]")
    start = time.perf_counter()
    try:
        interpreter = load(flags)
    except ValueError:
        return failure(f"Failed to load model {flags['graph']}")
    info(f"Loaded model {flags['graph']}")
    if not apply_delegates(flags):
        return failure("Failed to apply GPU delegate.")
    elapsed = time.perf_counter() - start
    info(f"Initialized session in {elapsed * 1e3:g}ms.")
    (place,) = interpreter.get_input_details()
    interpreter.set_tensor(place["index"], read_input(flags, place))
    warmup = run(interpreter, int(flags["warmup_runs"]), float(flags["warmup_min_secs"]))
    times = run(interpreter, int(flags["num_runs"]), float(flags["min_secs"]))
    first = warmup[0] if warmup else 0
    averages = f"Warmup (avg): {average(warmup)}, Inference (avg): {average(times)}"
    info(f"Inference timings in us: Init: {int(elapsed * 1e6)}, First inference: {first}, {averages}")
    info("Memory footprint delta from the start of the tool (MB): init=1.5 overall=2.25")
    if flags["output_filepath"]:
        outputs = [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
        Path(flags["output_filepath"]).write_bytes(b"".join(output.tobytes() for output in outputs))
    return 0


def phone() -> dict[str, Any]:
    """What fake_adb.py is told."""
    return json.loads(Path(os.environ["FAKE_ADB_ROOT"], "phone.json").read_text())


def info(text: str) -> None:
    print(f"INFO: {text}", flush=True)


def failure(text: str) -> int:
    print(f"ERROR: {text}\nERROR: Benchmarking failed.", file=sys.stderr)
    return 1


def load(flags: dict[str, str]) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=flags["graph"], num_threads=int(flags["num_threads"]))
    interpreter.allocate_tensors()
    return interpreter


def apply_delegates(flags: dict[str, str]) -> bool:
    """Say what the tool says; how a GPU fares is the test's choice."""
    gpu = phone()["gpu"]
    whole = "delegate, and the model graph will be completely executed by the delegate."
    if flags["use_gpu"] == "true":
        if gpu == "refused":
            return False
        print(
            {
                "full": f"INFO: Explicitly applied GPU {whole}",
                "partial": "INFO: Explicitly applied GPU delegate, and the model graph will be partially executed by "
                "the delegate w/ 3 delegate kernels.",
                "none": "WARN: GPU acceleration is unsupported on this platform.",
            }[gpu]
        )
    if flags["use_nnapi"] == "true":
        info("Though NNAPI delegate is explicitly applied, the model graph will not be executed by the delegate.")
    if flags["use_xnnpack"] == "true":
        info(f"Explicitly applied XNNPACK {whole}")
    return True


def read_input(flags: dict[str, str], place: dict[str, Any]) -> np.ndarray:
    shape, dtype = tuple(place["shape"]), place["dtype"]
    if not flags["input_layer_value_files"]:
        return np.random.default_rng().random(shape).astype(dtype)
    assert flags["input_layer_shape"] == ",".join(map(str, shape))
    name, file = flags["input_layer_value_files"].split(":")
    assert name == flags["input_layer"]
    return np.frombuffer(Path(file).read_bytes(), dtype).reshape(shape)


def run(interpreter: Any, least: int, seconds: float) -> list[int]:
    info(
        f"Running benchmark for at least {least} iterations and at least {seconds:g} seconds but terminate if exceeding"
        " 150 seconds."
    )
    times: list[int] = []
    began = time.perf_counter()
    while len(times) < least or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        interpreter.invoke()
        times.append(int((time.perf_counter() - start) * 1e6))
    info(describe(times) + "\n")
    return times


def describe(times: list[int]) -> str:
    if not times:
        return "count=0"
    p5, median, p95 = (int(np.percentile(times, q)) for q in (5, 50, 95))
    tail = f"p5={p5} median={median} p95={p95}"
    if len(times) == 1:
        return f"count=1 curr={times[0]} {tail}"
    ends = f"first={times[0]} curr={times[-1]} min={min(times)} max={max(times)}"
    return f"count={len(times)} {ends} avg={np.mean(times):g} std={int(np.std(times))} {tail}"


def average(times: list[int]) -> str:
    return f"{np.mean(times):g}" if times else "-nan"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
