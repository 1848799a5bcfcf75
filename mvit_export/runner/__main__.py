"""The part of the harness that runs where the model runs: a fresh process here, a Raspberry Pi, an emulated ARM, a Mac.

For Python 3.8 or newer, with only the standard library, numpy and the runtime found there. It answers each JSON line on
stdin with one on stdout, and exits when its input ends, which a lost connection also causes.

    python -m mvit_export.runner    here
    python runner.pyz               on a device: this folder alone, packed into one file
"""

from __future__ import annotations

import base64
import contextlib
import gc
import importlib
import json
import os
import platform
import sys
import threading
import time
from typing import IO, Any, Callable

from .common import Adapter, Call, Refusal, np, one_line
from .machine import (
    allowed_cpus,
    cpu_name,
    evict,
    found_runtimes,
    involuntary_switches,
    load_average,
    memory_mb,
    pin_to,
)

ADAPTERS = {  # runtime: (file of this folder, class); each is imported when requested
    "onnxruntime": ("run_onnxruntime", "OnnxRuntime"),
    "litert": ("run_litert", "LiteRt"),
    "coreml": ("run_coreml", "CoreMl"),
    "pytorch": ("run_torch", "Torch"),
}
IDLE_STEP, IDLE_SHARE, IDLE_TIMEOUT = 0.005, 0.2, 1.0  # seconds, of one core, seconds
COPY_BYTES = 1 << 27  # of the bandwidth probe: several times any cache


def find_adapter(runtime: str, threads: int) -> Adapter:
    """`runtime` is name[:option]. Raises Refusal if it cannot work here."""
    name, _, option = runtime.partition(":")
    module, kind = ADAPTERS[name]
    return getattr(importlib.import_module("." + module, __package__), kind)(option, threads)


class Runner:
    """The state of one process: at most one open model and its input array."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, cpu_clock: Callable[[], float] = time.process_time
    ) -> None:
        self.clock, self.cpu_clock = clock, cpu_clock
        self.call: Call | None = None
        self.array: Any = None
        self.base_mb = 0.0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            action = getattr(self, "do_" + request.pop("do"))
            return {"ok": action(**request)}
        except Refusal as refusal:
            return {"error": {"kind": refusal.kind, "message": str(refusal)}}
        except Exception as error:  # every runtime has its own exception types
            return {"error": {"kind": "failed", "message": one_line(error)}}

    def do_hello(self) -> dict[str, Any]:
        return {
            "python": platform.python_version(), "system": platform.system(), "machine": platform.machine(),
            "cpu": cpu_name(), "cores": len(allowed_cpus()), "load_average": load_average(),
            "runtimes": found_runtimes(),
        }  # fmt: skip

    def do_open(self, model: str, runtime: str, threads: int, pin: bool = False) -> dict[str, Any]:
        """Load the model once, cold: after dropping its pages from the system's file cache, if possible."""
        if np is None:
            raise Refusal("unavailable", f"numpy is not installed beside {sys.executable}: pip install numpy")
        cpus = pin_to(threads) if pin else None
        adapter = find_adapter(runtime, threads)
        self.base_mb = memory_mb()
        evicted = evict(model)
        start = self.clock()
        try:
            opened = adapter.open(model)
        except Refusal:
            raise
        except Exception as error:
            raise Refusal("rejected", f"is rejected by {adapter.name}: {why(error, model)}") from error
        self.call, self.adapter, self.path, self.runtime = opened.call, adapter, model, runtime
        load_ms = 1e3 * (self.clock() - start)
        executed = f"{adapter.name} {adapter.version} {opened.executed}"
        return {"runtime": executed, "load_ms": load_ms, "evicted": evicted, "cpus": cpus, "labels": opened.labels}

    def do_feed(self, shape: list[int], dtype: str, seed: int = 0) -> dict[str, Any]:
        """Random input, never zeros: sparsity and denormals change some kernels' time. Returns the first run's time."""
        generator = np.random.default_rng(seed)
        integers = np.dtype(dtype).kind == "u"
        array = generator.integers(0, 256, shape) if integers else generator.standard_normal(shape)
        self.array = array.astype(dtype)
        return {"first_ms": self.time_one()}

    def do_run(self, input: dict[str, Any]) -> dict[str, Any]:
        assert self.call is not None
        outputs = self.call(unpack(input))  # a Core ML classifier's label and probabilities are not arrays
        return {"outputs": {name: pack(value) for name, value in outputs.items() if isinstance(value, np.ndarray)}}

    def do_sample(self, count: int) -> dict[str, Any]:
        """`count` times in ms, after one untimed run that brings caches back from whatever ran in between.

        `cpu_ms` is what all threads of this process used meanwhile; `involuntary`, how often another one was preferred.

        Answers once the runtime's own threads are asleep, so that the next process has the cores to itself.
        """
        gc.disable()
        try:
            self.time_one()
            before = involuntary_switches()
            times = [self.time_both() for _ in range(count)]
            after = involuntary_switches()
        finally:
            gc.enable()
        found: dict[str, Any] = {"ms": [wall for wall, _ in times], "cpu_ms": [cpu for _, cpu in times]}
        if before is not None and after is not None:
            found["involuntary"] = after - before
        return found if become_idle() else {**found, "restless": True}

    def do_finish(self) -> dict[str, Any]:
        """Peak memory of the model (the process's, less the bare runtime's), then the time of a warm load."""
        peak = max(0.0, memory_mb(peak=True) - self.base_mb)
        self.call = None
        start = self.clock()
        self.call = self.adapter.open(self.path).call
        return {"peak_rss_mb": peak, "load_warm_ms": 1e3 * (self.clock() - start)}

    def do_bandwidth(self, threads: int) -> dict[str, Any]:
        """Bytes read and written per second by `threads` threads that copy arrays larger than the caches."""
        size = COPY_BYTES // threads
        pairs = [(np.ones(size, np.uint8), np.ones(size, np.uint8)) for _ in range(threads)]
        best = min(self.copy(pairs) for _ in range(5))
        return {"gbs": 2 * size * threads / best / 1e9}

    def copy(self, pairs: list[Any]) -> float:
        workers = [threading.Thread(target=np.copyto, args=pair) for pair in pairs]
        start = self.clock()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return self.clock() - start

    def do_profile(self, input: str, runs: int) -> dict[str, Any]:
        """Time by op type of the open model; `input` is the input's name."""
        ops = self.adapter.profile(self.path, {input: self.array}, runs)
        if ops is None:
            raise Refusal("unavailable", f"{self.runtime} has no profiler that is known here")
        return {"ops": ops}

    def do_placement(self) -> dict[str, int] | None:
        """Which device Core ML plans for each operation of the open model; None from other runtimes."""
        return self.adapter.placement(self.path)

    def time_one(self) -> float:
        assert self.call is not None
        start = self.clock()
        self.call(self.array)
        return 1e3 * (self.clock() - start)

    def time_both(self) -> tuple[float, float]:
        """Wall and CPU time of one run, in ms."""
        start = self.cpu_clock()
        wall = self.time_one()
        return wall, 1e3 * (self.cpu_clock() - start)


def become_idle() -> bool:
    """Wait until this process uses no time: ONNX Runtime's threads spin for 40 ms after a run, on cores others need.

    False if it never stops.
    """
    end = time.monotonic() + IDLE_TIMEOUT
    while time.monotonic() < end:
        used = time.process_time()
        time.sleep(IDLE_STEP)
        if time.process_time() - used < IDLE_SHARE * IDLE_STEP:
            return True
    return False


# The protocol


def pack(array: Any) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"shape": list(array.shape), "dtype": array.dtype.name, "data": data}


def unpack(packed: dict[str, Any]) -> Any:
    return np.frombuffer(base64.b64decode(packed["data"]), packed["dtype"]).reshape(packed["shape"])


def serve(requests: IO[str], replies: IO[str]) -> None:
    runner = Runner()
    for line in requests:
        replies.write(json.dumps(runner.answer(json.loads(line))) + "\n")
        replies.flush()


def why(error: BaseException, model: str) -> str:
    """Runtimes take paths as UTF-8; Python holds other bytes as lone surrogates."""
    if any("\udc80" <= c <= "\udcff" for c in model):
        return "the path has bytes that are not UTF-8; rename the folder"
    return one_line(error)


def main() -> None:
    # Since 1.29 ONNX Runtime would report models to its maker and leave its own files in the temporary folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output printed by runtimes must not break the protocol
    with contextlib.suppress(BrokenPipeError):  # nobody is reading any more
        serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
