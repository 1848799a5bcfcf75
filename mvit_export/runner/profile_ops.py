"""Where the time of one inference goes, by op type, as the runtime's own profiler counts it.

Self-contained: it may be copied to a device that has numpy and a runtime (Python 3.8 or newer).

A profile is a list of rows {"type", "ms", "share", "count"}, largest first. `ms` is the time of all ops of a type in
one inference, the mean over the faster half of the runs; `count` is how many there are in the graph that runs (after
fusion). A row "(runtime)" is the rest of the latency of runs without the profiler, interleaved with the profiled ones:
dispatch, copies of inputs and outputs. So the rows sum to that latency, or to the ops' own time if the profiler slowed
them beyond it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np

WARM_UP = 3
RUNTIME = "(runtime)"
# By their old names, which Python 3.8 can subscript outside of annotations
Row = Dict[str, Any]
OpTimes = Dict[str, Tuple[float, int]]


class ProfilerUnavailable(RuntimeError):
    """The runtime here has no working profiler; the message says why."""


def profile_onnx(
    model_path: str,
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int = 1,
    runs: int = 20,
    settings: Mapping[str, str] | None = None,
) -> list[Row]:
    """Profile ONNX Runtime's CPU provider. Types are those of the optimised graph, e.g. FusedMatMul, QuickGelu.

    `settings` are entries of the session's configuration. The profiler adds some microseconds to every node: many small
    nodes, such as reshapes, look slower than they are.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ProfilerUnavailable(f"onnxruntime does not import ({error})") from error

    def session(prefix: Path | None) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        for name, value in (settings or {}).items():
            options.add_session_config_entry(name, value)
        if prefix is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(prefix)
        return ort.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])

    with tempfile.TemporaryDirectory() as folder:
        plain, profiled = session(None), session(Path(folder) / "profile")
        latencies = interleave(lambda: plain.run(None, feeds), lambda: profiled.run(None, feeds), runs)
        with open(profiled.end_profiling(), encoding="utf-8") as file:
            per_run = onnx_op_times(json.load(file))[-runs:]
    return make_rows(per_run, latencies)


def onnx_op_times(events: Iterable[Mapping[str, Any]]) -> list[OpTimes]:
    """ONNX Runtime's trace, one entry for each run: its `model_run` and the nodes in it, `ts` and `dur` in us."""
    events = list(events)
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    found = []
    for run in (event for event in events if event["name"] == "model_run"):
        times: dict[str, list[float]] = defaultdict(list)
        for node in nodes:
            if run["ts"] <= node["ts"] <= run["ts"] + run["dur"]:
                times[node["args"]["op_name"]].append(node["dur"] / 1e3)
        found.append({kind: (sum(ms), len(ms)) for kind, ms in times.items()})
    return found


def profile_tflite(
    model_path: str,
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int = 1,
    runs: int = 20,
    xnnpack: bool = True,
    fp16: bool = False,
) -> list[Row]:
    """Profile LiteRT's CPU. With XNNPACK the types are its kernels, e.g. `Fully Connected (NC, F32) GEMM`."""
    with ExitStack() as stack:
        model = LiteRtModel(stack, str(model_path), threads=threads, xnnpack=xnnpack, fp16=fp16)
        model.feed(feeds)
        per_run: list[OpTimes] = []
        latencies = interleave(model.run, lambda: per_run.append(model.profile_run()), runs)
    return make_rows(per_run[-runs:], latencies)


def interleave(plain: Callable[[], object], profiled: Callable[[], object], runs: int) -> list[float]:
    """Call both in turn, after some warm-up calls; returns how long the plain ones took, in ms."""
    latencies = []
    for _ in range(WARM_UP + runs):
        start = time.perf_counter()
        plain()
        latencies.append((time.perf_counter() - start) * 1e3)
        profiled()
    return latencies[WARM_UP:]


def make_rows(per_run: list[OpTimes], latencies: list[float]) -> list[Row]:
    """Means by type, the rest of the latency, and shares that sum to 1."""
    quiet = faster_half(per_run, key=lambda times: sum(ms for ms, _ in times.values()))
    if not quiet or not all(quiet):
        raise ProfilerUnavailable("the profiler reported no op at all")
    counts = {kind: count for times in quiet for kind, (_, count) in times.items()}
    ms = {kind: statistics.mean(times.get(kind, (0.0, 0))[0] for times in quiet) for kind in counts}
    latency = statistics.mean(faster_half(latencies, key=float))
    ms[RUNTIME], counts[RUNTIME] = max(0.0, latency - sum(ms.values())), 0
    total = sum(ms.values())
    rows = [{"type": kind, "ms": ms[kind], "share": ms[kind] / total, "count": counts[kind]} for kind in ms]
    return sorted(rows, key=lambda row: (-row["ms"], row["type"]))


def faster_half(values: list[Any], key: Callable[[Any], float]) -> list[Any]:
    """Other work on the machine only ever adds time, to a different op each time."""
    return sorted(values, key=key)[: (len(values) + 1) // 2]


# LiteRT: its Python classes have no profiler, its C library has (litert/c/litert_profiler.h)

PROFILED_VERSION = (2, 3)  # of ai-edge-litert: the C library is called by signatures that other versions may not have
CPU = 1  # kLiteRtHwAcceleratorCpu
WRITE = 1  # LiteRtTensorBufferLockMode
FORCE_FP16 = 4  # TFLITE_XNNPACK_DELEGATE_FLAG_FORCE_FP16
Pointer = ctypes.c_void_p


class LiteRtModel:
    """A compiled model with its buffers and profiler; `stack` destroys them in turn."""

    def __init__(self, stack: ExitStack, path: str, *, threads: int, xnnpack: bool, fp16: bool) -> None:
        self._stack, self._lib = stack, load_litert()
        self._sums: OpTimes = {}
        environment = self._make("LiteRtCreateEnvironment", 0, None, destroy="LiteRtDestroyEnvironment")
        model = self._make("LiteRtCreateModelFromFile", environment, path.encode(), destroy="LiteRtDestroyModel")
        options = self._make("LiteRtCreateOptions", destroy="LiteRtDestroyOptions")
        self._call("LiteRtSetOptionsHardwareAccelerators", options, CPU)
        self._add_options(options, "runtime_options_string", "enable_profiling = true\n")
        self._add_options(options, "xnnpack", cpu_options(threads=threads, xnnpack=xnnpack, fp16=fp16))
        made = "LiteRtCreateCompiledModel", environment, model, options
        self._compiled = self._make(*made, destroy="LiteRtDestroyCompiledModel")
        self._profiler = self._make("LiteRtCompiledModelGetProfiler", self._compiled)
        self._environment = environment
        self._signature = self._make("LiteRtGetModelSignature", model, ctypes.c_size_t(0))
        self._inputs, self._outputs = self._make_buffers("Input"), self._make_buffers("Output")

    def feed(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Fill every input, by its name in the signature."""
        if set(feeds) != set(self._inputs):
            raise ValueError(f"the file's inputs are {sorted(self._inputs)}, given: {sorted(feeds)}")
        for name, array in feeds.items():
            size, address = ctypes.c_size_t(), Pointer()
            self._call("LiteRtGetTensorBufferPackedSize", self._inputs[name], ctypes.byref(size))
            if size.value != array.nbytes:
                raise ValueError(f"{name} takes {size.value} bytes, given: {array.nbytes} ({array.shape})")
            self._call("LiteRtLockTensorBuffer", self._inputs[name], ctypes.byref(address), WRITE)
            ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
            self._call("LiteRtUnlockTensorBuffer", self._inputs[name])

    def run(self) -> None:
        arrays: list[Any] = []
        for buffers in (self._inputs, self._outputs):
            arrays += [ctypes.c_size_t(len(buffers)), (Pointer * len(buffers))(*(b.value for b in buffers.values()))]
        self._call("LiteRtRunCompiledModel", self._compiled, ctypes.c_size_t(0), *arrays)

    def profile_run(self) -> OpTimes:
        """One run under the profiler. The events are cleared each time, but the summary's sums grow from run to run."""
        self._call("LiteRtStartProfiler", self._profiler)
        self.run()
        self._call("LiteRtStopProfiler", self._profiler)
        summary = self._make("LiteRtGetProfileSummary", self._profiler, self._compiled)
        text = ctypes.string_at(summary).decode("utf-8", "replace")
        c_library().free(summary)
        self._call("LiteRtResetProfiler", self._profiler)
        before, self._sums = self._sums, tflite_op_times(text)
        # The sums are rounded (to 1e-5 of all): a difference of nothing may come out below it.
        return {kind: (max(0.0, ms - before.get(kind, (0.0, 0))[0]), n) for kind, (ms, n) in self._sums.items()}

    def _make_buffers(self, kind: str) -> dict[str, ctypes.c_void_p]:
        """{name: buffer} of all inputs or outputs of the signature, in its order."""
        count, buffers = ctypes.c_size_t(), {}
        self._call(f"LiteRtGetNumSignature{kind}s", self._signature, ctypes.byref(count))
        for index in map(ctypes.c_size_t, range(count.value)):
            name = self._make(f"LiteRtGetSignature{kind}Name", self._signature, index)
            tensor = self._make(f"LiteRtGetSignature{kind}TensorByIndex", self._signature, index)
            tensor_type = ctypes.create_string_buffer(512)  # LiteRtRankedTensorType, which we only pass on
            self._call("LiteRtGetRankedTensorType", tensor, tensor_type)
            which = self._compiled, ctypes.c_size_t(0), index
            requirements = self._make(f"LiteRtGetCompiledModel{kind}BufferRequirements", *which)
            buffers[ctypes.string_at(name).decode()] = self._make(
                "LiteRtCreateManagedTensorBufferFromRequirements", self._environment, tensor_type, requirements,
                destroy="LiteRtDestroyTensorBuffer",
            )  # fmt: skip
        return buffers

    def _add_options(self, options: ctypes.c_void_p, identifier: str, toml: str) -> None:
        """Options whose payload is text; the library frees the copy it receives."""
        copy = Pointer(c_library().strdup(toml.encode()))
        free = ctypes.cast(c_library().free, Pointer)
        opaque = self._make("LiteRtCreateOpaqueOptions", identifier.encode(), copy, free)
        self._call("LiteRtAddOpaqueOptions", options, opaque)

    def _make(self, function: str, *arguments: Any, destroy: str = "") -> ctypes.c_void_p:
        """Call a function that writes a handle to its last argument."""
        handle = Pointer()
        self._call(function, *arguments, ctypes.byref(handle))
        if destroy:
            self._stack.callback(getattr(self._lib, destroy), handle)
        return handle

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._lib, function)(*arguments)
        if status:
            raise ProfilerUnavailable(f"LiteRT's profiler does not work with this file: {function} gave error {status}")


def cpu_options(*, threads: int, xnnpack: bool, fp16: bool) -> str:
    """LiteRT's CPU options as the text that its C library expects (litert/c/options/litert_cpu_options.cc)."""
    if fp16 and not xnnpack:
        raise ValueError("only XNNPACK has fp16 kernels")
    lines = [f"num_threads = {threads}"]
    lines += [] if xnnpack else ['kernel_mode = "builtin"']
    lines += [f"flags = {FORCE_FP16}"] if fp16 else []
    return "\n".join([*lines, ""])


def tflite_op_times(summary: str) -> OpTimes:
    """The table by node type in TFLite's profile summary: times summed over all runs so far, counts of one run.

    A row's milliseconds are an average over its nodes with 3 digits; its percentage of the sum is finer.
    """
    table = summary.partition("Summary by node type")[2]
    total = re.search(r"^Timings \(microseconds\): count=\d+ (?:first=\d+ )?curr=(\d+)", table, re.MULTILINE)
    rows = re.findall(r"^ *(\S.*?) +(\d+) +[\d.]+ +([\d.]+)% +[\d.]+% +[\d.]+ +\d+$", table.expandtabs(), re.MULTILINE)
    if total is None or not rows:
        raise ProfilerUnavailable("the summary of LiteRT's profiler has another form than that of ai-edge-litert 2.3")
    ms = int(total[1]) / 1e3
    return {name[len("Delegate/") :] if name.startswith("Delegate/") else name: (float(percent) / 100 * ms, int(count))
            for name, count, percent in rows}  # fmt: skip


def load_litert() -> ctypes.CDLL:
    """ai-edge-litert's C library. Raises ProfilerUnavailable if it is absent or of another version."""
    try:
        version = importlib.metadata.version("ai-edge-litert")
    except importlib.metadata.PackageNotFoundError:
        reason = "per-op times of TFLite files come from ai-edge-litert, which is not installed"
        raise ProfilerUnavailable(f"{reason} (tflite-runtime has no profiler)") from None
    wanted = ".".join(map(str, PROFILED_VERSION))
    if tuple(map(int, re.findall(r"\d+", version)[:2])) != PROFILED_VERSION:
        raise ProfilerUnavailable(f"the profiler of ai-edge-litert {version} is not known here, only that of {wanted}")
    import ai_edge_litert

    folder = Path(next(iter(ai_edge_litert.__path__)))
    for name in ("libLiteRt.so", "libLiteRt.dylib"):
        if (folder / name).exists():
            return ctypes.CDLL(str(folder / name))
    raise ProfilerUnavailable(f"ai-edge-litert {version} came without its C library, libLiteRt")


def c_library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.strdup.restype, library.strdup.argtypes = Pointer, [ctypes.c_char_p]
    library.free.restype, library.free.argtypes = None, [Pointer]
    return library
