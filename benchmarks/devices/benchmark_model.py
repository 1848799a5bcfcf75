"""TFLite's own benchmark tool on an Android phone: latency, and parity through its input and output files.

The user brings the binary (`benchmark_model`, built for Android from tflite/tools/benchmark of google-ai-edge/LiteRT,
or Google's nightly `android_aarch64_benchmark_model`). Flags and output are those of its sources there:
benchmark_tflite_model.cc (flags, delegates, files), benchmark_model.cc (timings), tsl/util/stats_calculator.h (counts).
"""

from __future__ import annotations

import functools
import math
import re
import statistics
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from mvit_export.artifact import Artifact, TensorSpec
from mvit_export.benchmarks.devices.adb import Adb, Finished, Phone
from mvit_export.benchmarks.devices.base import FileRefused
from mvit_export.errors import DeviceError, RuntimeUnavailable, UsageError, printable
from mvit_export.readers.session import Arrays, Session
from mvit_export.readers.tflite import litert_runtime, stored_labels
from mvit_export.system.reading import GB, open_regular

TOOL = "benchmark_model"
RUNTIME = "litert"  # the runner's name for it
LOAD_SECONDS = 180.0  # a GPU delegate may compile its shaders for minutes
MACHINES = {"arm64-v8a": 183, "armeabi-v7a": 40, "x86_64": 62, "x86": 3}  # Android ABI: e_machine of its ELF files


@dataclass(frozen=True)
class BenchmarkOptions:
    """What executes the model. Without `gpu` and `nnapi`: the CPU, by XNNPACK or by TFLite's own kernels.

    `fp16` allows half precision: XNNPACK is forced to it, GPU and NNAPI may choose it. Without it, all sums are fp32.
    """

    threads: int = 1
    gpu: bool = False
    nnapi: bool = False
    xnnpack: bool = True
    fp16: bool = False

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UsageError(f"--threads is {self.threads}, expected 1 or more")
        if self.gpu and self.nnapi:
            raise UsageError("GPU and NNAPI exclude each other: choose one")
        if self.fp16 and self.delegate is None:
            raise UsageError("TFLite's own kernels have no fp16: leave it out, or keep XNNPACK")

    @property
    def delegate(self) -> str | None:
        """What the tool must confirm, by its own name for it; None for TFLite's own kernels."""
        return "GPU" if self.gpu else "NNAPI" if self.nnapi else "XNNPACK" if self.xnnpack else None

    @property
    def flags(self) -> tuple[str, ...]:
        half, flags = str(self.fp16).lower(), [f"--num_threads={self.threads}"]
        if self.gpu:
            flags += ["--use_gpu=true", f"--gpu_precision_loss_allowed={half}"]
        elif self.nnapi:
            flags += ["--use_nnapi=true", f"--nnapi_allow_fp16={half}"]
        elif self.xnnpack:
            flags += ["--use_xnnpack=true", *(["--xnnpack_force_fp16=true"] if self.fp16 else [])]
        if not self.xnnpack:  # if unset, XNNPACK would run what the other delegate leaves, or all
            flags.append("--use_xnnpack=false")
        return tuple(flags)


@dataclass(frozen=True)
class Round:
    """One start of the tool: figures in ms, memory in MB as the tool counts it (growth since its start)."""

    load_ms: float
    first_ms: float
    ms: float
    figure: str  # what `ms` is: median, or average if the tool prints no median
    runs: int
    memory_mb: float | None
    delegate: str  # in words, e.g. "GPU", or "GPU in 3 parts, the rest on the CPU"


@dataclass(frozen=True)
class Measurement:
    """Several rounds. The first one's load is cold: the file was in none of the phone's caches."""

    runtime: str
    load_ms: float
    load_warm_ms: float | None
    first_ms: float
    samples_ms: tuple[float, ...]  # one figure per round
    figure: str
    runs_per_round: tuple[int, ...]
    memory_mb: float | None
    delegate: str


def check_binary(path: Path, abi: str) -> None:
    """Refuse a file that the phone's processor cannot start, by its ELF header."""
    try:
        with open_regular(path, GB) as file:
            header = file.read(20)
    except OSError as error:
        raise DeviceError(f"--benchmark-binary {path} cannot be read: {error.strerror}") from error
    if len(header) < 20 or header[:4] != b"\x7fELF":
        raise DeviceError(
            f"--benchmark-binary {path} is not an ELF executable; expected TFLite's {TOOL} for Android {abi}"
        )
    (machine,) = struct.unpack_from("<H", header, 18)
    if abi not in MACHINES:
        raise DeviceError(f"the phone's architecture {abi} is not known, expected one of {', '.join(MACHINES)}")
    if machine != MACHINES[abi]:
        names = {number: name for name, number in MACHINES.items()}
        found = names.get(machine, f"ELF machine {machine}")
        raise DeviceError(f"--benchmark-binary {path} is built for {found}, the phone is {abi}; use the build for it")


def check_tool(binary: Path | None, device: Adb) -> Path:
    """The tool that a user named. Raises UsageError if there is none."""
    if binary is None:
        raise UsageError(f"--device {device.name} needs --benchmark-binary FILE, TFLite's {TOOL} built for Android")
    return binary


class BenchmarkTool:
    """The tool on a phone. `load` copies a model there; its `measure` and `run` start the tool once each."""

    def __init__(self, device: Adb, binary: Path) -> None:
        check_binary(binary, device.phone.abi)
        self._device, self._models = device, 0
        self._binary = device.put(binary, TOOL)
        device.run(["chmod", "755", self._binary], timeout=30)

    @property
    def phone(self) -> Phone:
        return self._device.phone

    def describe(self, options: BenchmarkOptions) -> str:
        """The runtime for records, e.g. `TFLite benchmark_model GPU fp16, Pixel 8 Android 15`."""
        kind = f"{options.delegate or 'CPU kernels'}{' fp16' if options.fp16 else ''}"
        return f"TFLite {TOOL} {kind}, {self.phone.model} Android {self.phone.android}"

    def load(self, artifact: Artifact) -> LoadedModel:
        """Copy the model. Raises RuntimeUnavailable for a format that TFLite does not read."""
        fmt = artifact.manifest.format
        if RUNTIME not in artifact.manifest.target.row.runtimes:
            raise RuntimeUnavailable(
                f"Android phones are reached through TFLite's {TOOL}, which does not read {fmt} files"
            )
        self._models += 1  # two precisions of a model share a file name
        name = f"{self._models}-{artifact.model_path.name}"
        return LoadedModel(self, artifact, self._device.put(artifact.model_path, name))

    def start(self, artifact: Artifact, arguments: Sequence[str], options: BenchmarkOptions, *, timeout: float) -> str:
        """The output of one start. A failure becomes a one-line error whose cause is all that the tool printed."""
        command = [self._binary, *arguments, *options.flags]
        finished = self._device.shell(command, timeout=timeout)
        check_flags(finished.output)
        check_delegate(finished.output, options.delegate)
        if finished.code:
            raise_failure(finished, artifact)
        return finished.output

    def put_input(self, array: np.ndarray) -> str:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "input.bin"
            file.write_bytes(little_endian(array).tobytes())
            return self._device.put(file, file.name)

    def take_output(self, path: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "output.bin"
            self._device.get(Path(path).name, file)
            self._device.run(["rm", path], timeout=30)  # so that no later run is judged by this one's numbers
            return file.read_bytes()


@dataclass(frozen=True)
class LoadedModel:
    """A model on the phone beside the tool."""

    tool: BenchmarkTool
    artifact: Artifact
    path: str

    def measure(self, options: BenchmarkOptions, *, runs: int, max_seconds: float = 60.0) -> Round:
        """One round: at least half a second of warm-up, then `runs` inferences or `max_seconds` of them."""
        arguments = [
            f"--graph={self.path}", f"--num_runs={runs}", "--min_secs=0", f"--max_secs={max_seconds:g}",
            "--warmup_runs=1", "--warmup_min_secs=0.5",
        ]  # fmt: skip
        output = self.tool.start(self.artifact, arguments, options, timeout=LOAD_SECONDS + 3 * max_seconds)
        return parse_round(output)

    def run(self, array: np.ndarray, options: BenchmarkOptions) -> Arrays:
        """One inference on `array`. Raises RuntimeError if the tool's output file is not what the manifest says."""
        (spec,) = self.artifact.manifest.inputs
        place, result = self.tool.put_input(array), f"{Path(self.path).parent}/output.bin"
        arguments = [
            f"--graph={self.path}", "--num_runs=1", "--min_secs=0", "--warmup_runs=0", "--warmup_min_secs=0",
            f"--input_layer={spec.name}", f"--input_layer_shape={','.join(map(str, array.shape))}",
            f"--input_layer_value_files={spec.name.replace(':', '::')}:{place}", f"--output_filepath={result}",
        ]  # fmt: skip
        self.tool.start(self.artifact, arguments, options, timeout=LOAD_SECONDS)
        return split_outputs(self.tool.take_output(result), stored_outputs(self.artifact))


def benchmark(
    device: Adb,
    artifact: Artifact,
    options: BenchmarkOptions,
    *,
    binary: Path,
    rounds: int = 5,
    runs_per_round: int = 50,
    max_seconds: float = 60.0,
) -> Measurement:
    """Measure one artifact. To interleave several, load each and call their `measure` in turn; then `summarise`."""
    tool = BenchmarkTool(device, binary)
    model = tool.load(artifact)
    found = [model.measure(options, runs=runs_per_round, max_seconds=max_seconds) for _ in range(rounds)]
    return summarise(tool.describe(options), found)


def run_model(
    device: Adb, artifact: Artifact, array: np.ndarray, *, binary: Path, options: BenchmarkOptions | None = None
) -> Arrays:
    """Every output by name, for one input. For more inputs keep the model there: `open_session`."""
    return BenchmarkTool(device, binary).load(artifact).run(array, options or BenchmarkOptions())


def open_session(artifact: Artifact, tool: BenchmarkTool, *, options: BenchmarkOptions | None = None) -> Session:
    """What `verify` runs on a phone. Starts the tool once, so that failures show before any comparison.

    Raises RuntimeUnavailable for formats other than TFLite and for a delegate that the phone does not have.
    """
    options = options or BenchmarkOptions()
    model = tool.load(artifact)
    model.measure(options, runs=1)
    run = functools.partial(model.run, options=options)
    return Session(tool.describe(options), run, stored_labels(artifact))


def summarise(runtime: str, rounds: Sequence[Round]) -> Measurement:
    first, memory = rounds[0], [r.memory_mb for r in rounds if r.memory_mb is not None]
    return Measurement(
        runtime,
        load_ms=first.load_ms,
        load_warm_ms=statistics.median(r.load_ms for r in rounds[1:]) if len(rounds) > 1 else None,
        first_ms=first.first_ms,
        samples_ms=tuple(r.ms for r in rounds),
        figure=first.figure,
        runs_per_round=tuple(r.runs for r in rounds),
        memory_mb=max(memory, default=None),
        delegate=first.delegate,
    )


# What the tool prints

NUMBER = r"([^\s,]+)"
TIMINGS = re.compile(
    rf"Inference timings in us: Init: {NUMBER}, First inference: {NUMBER}, Warmup \(avg\): {NUMBER}, "
    rf"Inference \(avg\): {NUMBER}"
)
COUNTS = re.compile(r"^(?:INFO: )?count=(\d+)\b(.*)$", re.MULTILINE)
# "Peak memory footprint" until TensorFlow 2.4.
MEMORY = re.compile(rf"emory footprint (?:delta from the start of the tool )?\(MB\): init={NUMBER} overall={NUMBER}")
APPLIED = re.compile(
    r"pplied (\w+) delegate, and the model graph will be (completely|partially) executed (?:by|w/) the delegate"
    r"(?: w/ (\d+) delegate kernels)?"
)
REFUSED = re.compile(r"Failed to apply (\w+) delegate")
PROBLEM = re.compile(r"^(?:ERROR|FATAL): (.*)$", re.MULTILINE)
UNKNOWN_FLAGS = re.compile(r"Unconsumed cmdline flags: (.*)")


def parse_round(output: str) -> Round:
    """The figures of one start. Raises DeviceError if the output is another tool's, or ends before the figures."""
    timings, counts = TIMINGS.search(output), COUNTS.findall(output)
    if timings is None or not counts:
        if "BENCHMARK RESULTS" in output:
            found = "is LiteRT's CompiledModel tool; expected TFLite's (tflite/tools/benchmark:benchmark_model)"
            raise DeviceError(f"--benchmark-binary {found}") from RuntimeError(output)
        last = printable((output.strip().splitlines() or ["nothing"])[-1], 200)
        raise DeviceError(f"{TOOL} printed no timings; its last line: {last}") from RuntimeError(output)
    runs, rest = counts[-1]  # the warm-up's come first
    stats = dict(re.findall(r"(\w+)=([^\s(]+)", rest))
    figure = "median" if "median" in stats else "average"
    ms = microseconds(stats["median"] if figure == "median" else timings[4], figure)
    memory = MEMORY.search(output)
    return Round(
        load_ms=microseconds(timings[1], "load time"),
        first_ms=microseconds(timings[2], "first inference"),
        ms=ms,
        figure=figure,
        runs=int(runs),
        memory_mb=float(memory[2]) if memory else None,
        delegate=describe_delegates(output),
    )


def microseconds(text: str, what: str) -> float:
    """-> ms. Raises DeviceError for what is not a time: the average of no runs is `nan`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise DeviceError(
            f"{TOOL} printed {printable(text)!r} for its {what}, expected microseconds; did it run at all?"
        )
    return value / 1000


def describe_delegates(output: str) -> str:
    parts = [
        name if share == "completely" else f"{name} in {kernels or 'some'} parts, the rest on the CPU"
        for name, share, kernels in APPLIED.findall(output)
    ]
    return "; ".join(parts) or "none"


def check_delegate(output: str, wanted: str | None) -> None:
    """Refuse a run that was not done where it should be: the tool falls back to the CPU without an error."""
    if "Initialized session" not in output or wanted is None:
        return  # it ended earlier: its own words say why
    if wanted not in {name for name, _, _ in APPLIED.findall(output)}:
        said = [line for line in output.splitlines() if re.search(rf"(?i)\b{wanted}\b|delegate", line)]
        words = printable(said[-1].strip(), 200) if said else "it does not mention it"
        message = f"{wanted} was asked for, but {TOOL} did not apply it: {words}"
        raise RuntimeUnavailable(message) from RuntimeError(output)


def check_flags(output: str) -> None:
    if unknown := UNKNOWN_FLAGS.search(output):
        flags = printable(unknown[1].strip(), 200)
        message = f"this {TOOL} does not know {flags}: it was built without that part, or is another tool or too old"
        raise RuntimeUnavailable(message) from RuntimeError(output)


def raise_failure(finished: Finished, artifact: Artifact) -> NoReturn:
    """Tell apart what ended with an exit code: a binary that does not start, a crash, a rejected model."""
    cause = RuntimeError(finished.output)
    code, problems = finished.code, PROBLEM.findall(finished.output)
    last = printable((finished.output.strip().splitlines() or ["it printed nothing"])[-1], 200)
    if code in (126, 127):  # of the shell: found but not executable, not found (or without its dynamic linker)
        raise DeviceError(f"{TOOL} does not start on the phone ({last}); it must be built for Android") from cause
    if refused := REFUSED.search(finished.output):
        message = (
            f"the phone's {refused[1]} delegate cannot run {artifact.model_path.name}: {printable(problems[0], 300)}"
        )
        raise RuntimeUnavailable(message) from cause
    if problems:
        # The first says what happened; those after it, that it happened ("Benchmarking failed.").
        reason = printable(problems[0], 300)
        raise FileRefused(artifact.model_path, f"is rejected by {TOOL}: {reason}; export again") from cause
    ending = f"was ended by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
    raise DeviceError(f"{TOOL} {ending} without giving a reason; its last line: {last}") from cause


# Files


def little_endian(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def stored_outputs(artifact: Artifact) -> tuple[TensorSpec, ...]:
    """The manifest's outputs in the order of the file's graph, which is the order in which the tool writes them."""
    specs = artifact.manifest.outputs
    if len(specs) == 1:
        return specs
    interpreter = litert_runtime()[2](model_path=str(artifact.model_path))
    order = [detail["index"] for detail in interpreter.get_output_details()]
    named = interpreter.get_signature_runner().get_output_details()
    return tuple(sorted(specs, key=lambda spec: order.index(named[spec.name]["index"])))


def split_outputs(data: bytes, specs: Sequence[TensorSpec]) -> Arrays:
    """Cut the tool's output file into arrays. Raises RuntimeError if its size is not what the manifest says."""
    shapes = [tuple(1 if side is None else side for side in spec.shape) for spec in specs]
    dtypes = [np.dtype(spec.dtype).newbyteorder("<") for spec in specs]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    if len(data) != sum(sizes):
        raise RuntimeError(f"the file's outputs are {len(data)} bytes, the manifest's {sum(sizes)}")
    ends = np.cumsum([0, *sizes])
    return {
        spec.name: np.frombuffer(data[ends[i] : ends[i + 1]], dtypes[i]).reshape(shapes[i]).astype(spec.dtype)
        for i, spec in enumerate(specs)
    }
