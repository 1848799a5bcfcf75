"""The part of the harness that runs where the model runs: a fresh process here, a Raspberry Pi, an emulated ARM, a Mac.

One self-contained file for Python 3.8 or newer: standard library, numpy and the runtime found there. It answers one
JSON line on stdout for each JSON line on stdin, and ends with its input, which a lost connection ends too.

    python runner.py
"""

from __future__ import annotations

import base64
import contextlib
import gc
import glob
import importlib
import json
import os
import platform
import sys
import threading
import time
import zipfile
from typing import IO, Any, Callable, NamedTuple

try:
    import numpy as np
except ImportError:  # answered with a reason, once a model is to be opened
    np = None  # type: ignore[assignment]

Call = Callable[[Any], "dict[str, Any]"]  # one array in, every output by name
PROVIDERS = {
    "cpu": "CPUExecutionProvider", "xnnpack": "XnnpackExecutionProvider", "coreml": "CoreMLExecutionProvider",
    "nnapi": "NnapiExecutionProvider", "qnn": "QNNExecutionProvider",
}  # fmt: skip
COMPUTE_UNITS = {
    "all": "ALL", "cpuOnly": "CPU_ONLY", "cpuAndGPU": "CPU_AND_GPU", "cpuAndNeuralEngine": "CPU_AND_NE",
}  # fmt: skip
IDLE_STEP, IDLE_SHARE, IDLE_TIMEOUT = 0.005, 0.2, 1.0  # seconds, of one core, seconds
COPY_BYTES = 1 << 27  # of the bandwidth probe: several times any cache


class Opened(NamedTuple):
    """A loaded model: its call, what executes it, and the labels that the file carries."""

    call: Call
    executed: str
    labels: list[str] | None = None


class Refusal(Exception):
    """An answer other than a result. `kind`: unavailable (not possible here), rejected (the file's fault) or misuse."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Runner:
    """The state of one process: at most one open model and the array that is fed to it."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
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
        """Load the model once, cold: after its pages were dropped from the system's file cache, where that can be."""
        if np is None:
            raise Refusal("unavailable", f"numpy is not installed beside {sys.executable}: pip install numpy")
        cpus = pin_to(threads) if pin else None
        name, version, opener = RUNTIMES[runtime.partition(":")[0]](runtime, threads)
        self.base_mb = memory_mb()
        evicted = evict(model)
        start = self.clock()
        try:
            opened = opener(model)
        except Refusal:
            raise
        except Exception as error:
            raise Refusal("rejected", f"{model} is rejected by {name}: {one_line(error)}") from error
        self.call, self.reload = opened.call, (opener, model)
        load_ms = 1e3 * (self.clock() - start)
        runtime = f"{name} {version} {opened.executed}"
        return {"runtime": runtime, "load_ms": load_ms, "evicted": evicted, "cpus": cpus, "labels": opened.labels}

    def do_feed(self, shape: list[int], dtype: str, seed: int = 0) -> dict[str, Any]:
        """Random input, never zeros: sparsity and denormals change some kernels' time. Gives the first run's time."""
        generator = np.random.default_rng(seed)
        integers = np.dtype(dtype).kind == "u"
        array = generator.integers(0, 256, shape) if integers else generator.standard_normal(shape)
        self.array = array.astype(dtype)
        return {"first_ms": self.time_one()}

    def do_run(self, input: dict[str, Any]) -> dict[str, Any]:
        assert self.call is not None
        outputs = self.call(unpack(input))  # a Core ML classifier's label and probabilities are no arrays
        return {"outputs": {name: pack(value) for name, value in outputs.items() if isinstance(value, np.ndarray)}}

    def do_sample(self, count: int) -> dict[str, Any]:
        """`count` times in ms, after one untimed run that brings caches back from whatever ran in between.

        Answers once the runtime's own threads are asleep, so that the next process has the cores to itself.
        """
        gc.disable()
        try:
            self.time_one()
            found: dict[str, Any] = {"ms": [self.time_one() for _ in range(count)]}
        finally:
            gc.enable()
        return found if become_idle() else found | {"restless": True}

    def do_finish(self) -> dict[str, Any]:
        """Peak memory of the model (the process's, less the bare runtime's), then the time of a warm load."""
        peak = max(0.0, memory_mb(peak=True) - self.base_mb)
        opener, model = self.reload
        self.call = None
        start = self.clock()
        self.call = opener(model).call
        return {"peak_rss_mb": peak, "load_warm_ms": 1e3 * (self.clock() - start)}

    def do_bandwidth(self, threads: int) -> dict[str, Any]:
        """Bytes read and written a second by `threads` threads that copy arrays larger than the caches."""
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

    def do_profile(self, model: str, runtime: str, input: str, threads: int, runs: int) -> dict[str, Any]:
        """Time by op type; `input` is the input's name."""
        profiling = importlib.import_module("profiling")  # the file beside this one
        name, _, option = runtime.partition(":")
        feeds, settings = {input: self.array}, {"threads": threads, "runs": runs}
        try:
            if name == "litert" and not option.startswith("delegate"):
                settings.update(xnnpack=option != "builtin", fp16=option == "fp16")
                return {"ops": profiling.profile_tflite(model, feeds, **settings)}
            if name == "onnxruntime" and option in ("", "cpu"):
                return {"ops": profiling.profile_onnx(model, feeds, **settings)}
        except profiling.ProfilerUnavailable as error:
            raise Refusal("unavailable", str(error)) from error
        raise Refusal("unavailable", f"{runtime} has no profiler that is known here")

    def do_placement(self, model: str, runtime: str) -> dict[str, Any]:
        """Which device Core ML plans for each operation, by MLComputePlan."""
        return coreml_placement(model, runtime)

    def time_one(self) -> float:
        assert self.call is not None
        start = self.clock()
        self.call(self.array)
        return 1e3 * (self.clock() - start)


def become_idle() -> bool:
    """Wait until this process uses no time: ONNX Runtime's threads spin for 40 ms after a run, on cores of others.

    False where it never stops.
    """
    end = time.monotonic() + IDLE_TIMEOUT
    while time.monotonic() < end:
        used = time.process_time()
        time.sleep(IDLE_STEP)
        if time.process_time() - used < IDLE_SHARE * IDLE_STEP:
            return True
    return False


# Runtimes: each function takes the option behind the colon and gives (name, version, open(model) -> Opened)


def onnx_runtime(spec: str, threads: int) -> tuple[str, str, Callable[[str], Opened]]:
    # From 1.29 on it would report models to its maker, and leave files of its own in the system's temporary folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    ort = import_runtime("onnxruntime")
    provider = PROVIDERS[spec.partition(":")[2] or "cpu"]
    if provider not in ort.get_available_providers():
        there = ", ".join(ort.get_available_providers())
        raise Refusal("unavailable", f"this onnxruntime {ort.__version__} has no {provider}, only {there}")

    def open_model(path: str) -> Opened:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # XNNPACK has a thread pool of its own, which ORT's spinning threads would fight for the cores.
        settings = {"intra_op_num_threads": str(threads)} if provider == PROVIDERS["xnnpack"] else {}
        if settings:
            options.intra_op_num_threads = 1
        session = ort.InferenceSession(path, options, providers=[(provider, settings)])
        if provider not in session.get_providers():
            raise Refusal(
                "unavailable", f"{provider} did not start; onnxruntime fell back to {session.get_providers()}"
            )
        (name,) = [node.name for node in session.get_inputs()]
        names = [node.name for node in session.get_outputs()]
        executed = provider.replace("ExecutionProvider", "")
        labels = session.get_modelmeta().custom_metadata_map.get("labels")

        def call(array: Any) -> dict[str, Any]:
            return dict(zip(names, session.run(names, {name: array})))

        return Opened(call, executed, json.loads(labels) if labels else None)

    return "onnxruntime", ort.__version__, open_model


def litert(spec: str, threads: int) -> tuple[str, str, Callable[[str], Opened]]:
    """XNNPACK by default, `litert:fp16` forced to fp16, `litert:builtin` without, `litert:delegate=PATH` beside it."""
    option, _, library = spec.partition(":")[2].partition("=")
    name, module = litert_module()
    version = distribution_version(name)
    if option == "fp16":
        return name, version, half_litert(name, threads)

    def open_model(path: str) -> Opened:
        settings: dict[str, Any] = {"model_path": path, "num_threads": threads}
        executed = "CPU XNNPACK"
        if option:  # beside a delegate too: one that takes no op would leave all of them to XNNPACK, silently
            settings["experimental_op_resolver_type"] = module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            executed = "CPU builtin kernels"
        if option == "delegate":
            settings["experimental_delegates"] = [load_delegate(module, library)]
            executed = os.path.basename(library)
        interpreter = module.Interpreter(**settings)
        if option == "delegate" and not any(op["op_name"] == "DELEGATE" for op in interpreter._get_ops_details()):
            raise Refusal("unavailable", f"{library} takes none of the model's ops")
        interpreter.allocate_tensors()  # part of loading; left alone, the first run would do it
        runner = interpreter.get_signature_runner()
        (input_name,) = runner.get_input_details()
        return Opened(lambda array: dict(runner(**{input_name: array})), executed, packed_labels(path))

    return name, version, open_model


def half_litert(name: str, threads: int) -> Callable[[str], Opened]:
    """XNNPACK with every fp32 sum made in fp16: the newer API alone can force it."""
    try:
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.cpu_options import CpuOptions
        from ai_edge_litert.options import Options
    except ImportError as error:
        reason = f"this {name} cannot force fp16 ({one_line(error)}): pip install 'ai-edge-litert>=2.3'"
        raise Refusal("unavailable", reason) from error

    def open_model(path: str) -> Opened:
        flags = 4  # TFLITE_XNNPACK_DELEGATE_FLAG_FORCE_FP16
        options = Options(cpu_options=CpuOptions(num_threads=threads, xnnpack_flags=flags))
        model = CompiledModel.from_file(path, options=options)
        key = model.get_signature_by_index(0)["key"]
        details = model.get_output_tensor_details(key)
        (fed,), outputs = model.create_input_buffers(0), model.create_output_buffers(0)

        def call(array: Any) -> dict[str, Any]:
            fed.write(array)
            model.run_by_index(0, [fed], outputs)
            return {
                name: buffer.read(int(np.prod(details[name]["shape"])), details[name]["dtype"]).reshape(
                    details[name]["shape"]
                )
                for name, buffer in zip(details, outputs)
            }

        return Opened(call, "CPU XNNPACK forced fp16", packed_labels(path))

    return open_model


def packed_labels(path: str) -> list[str] | None:
    """TFLite metadata packs its label file as a zip at the end of the model."""
    try:
        with zipfile.ZipFile(path) as packed:
            return packed.read("labels.txt").decode("utf-8").splitlines()
    except (zipfile.BadZipFile, KeyError):
        return None


def load_delegate(module: Any, library: str) -> Any:
    try:
        return module.load_delegate(library)
    except Exception as error:
        raise Refusal("unavailable", f"the delegate {library} does not load: {one_line(error)}") from error


def coreml(spec: str, threads: int) -> tuple[str, str, Callable[[str], Opened]]:
    """Core ML chooses its own threads; the option is one of its compute units."""
    if platform.system() != "Darwin":
        raise Refusal(
            "unavailable",
            f"Core ML runs on macOS only, this is {platform.system()}; "
            "the reference executor proves files, its time is no latency",
        )
    ct = import_runtime("coremltools")
    units = spec.partition(":")[2] or "all"

    def open_model(path: str) -> Opened:
        model = ct.models.MLModel(path, compute_units=getattr(ct.ComputeUnit, COMPUTE_UNITS[units]))
        description = model.get_spec().description
        (name,) = [i.name for i in description.input]
        labels = description.metadata.userDefined.get("labels")

        def call(array: Any) -> dict[str, Any]:
            return model.predict({name: as_picture(array)})

        return Opened(call, units, json.loads(labels) if labels else None)

    return "Core ML", "macOS " + platform.mac_ver()[0], open_model


def as_picture(array: Any) -> Any:
    """uint8 (1, H, W, 3) as the PIL image that Core ML's image inputs take; other arrays as they are."""
    if array.dtype != np.uint8:
        return array
    from PIL import Image

    return Image.fromarray(array[0])


def coreml_placement(model: str, runtime: str) -> dict[str, Any]:
    ct = import_runtime("coremltools")
    units = getattr(ct.ComputeUnit, COMPUTE_UNITS[runtime.partition(":")[2] or "all"])
    compiled = ct.models.MLModel(model, compute_units=units).get_compiled_model_path()
    plan = ct.models.compute_plan.MLComputePlan.load_from_path(path=compiled, compute_units=units)
    counts: dict[str, int] = {}
    for operation in plan.model_structure.program.functions["main"].block.operations:
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        if usage is not None:  # constants are placed nowhere
            device = type(usage.preferred_compute_device).__name__
            counts[device] = counts.get(device, 0) + 1
    return counts


def pytorch(spec: str, threads: int) -> tuple[str, str, Callable[[str], Opened]]:
    """The reference model in eager mode, rebuilt from the artifact beside the model file: takes this package."""
    torch = import_runtime("torch")
    torch.set_num_threads(threads)

    def open_model(path: str) -> Opened:
        from pathlib import Path

        from mvit_export.artifact import read_manifest
        from mvit_export.models.load import name_outputs, rebuild_model

        module = rebuild_model(read_manifest(Path(path).parent)).module

        def call(array: Any) -> dict[str, Any]:
            with torch.inference_mode():
                return {name: value.numpy() for name, value in name_outputs(module(torch.from_numpy(array))).items()}

        return Opened(call, "CPU eager")

    return "torch", torch.__version__, open_model


RUNTIMES = {"onnxruntime": onnx_runtime, "litert": litert, "coreml": coreml, "pytorch": pytorch}


def litert_module() -> tuple[str, Any]:
    reasons = []
    for distribution, module in (("ai-edge-litert", "ai_edge_litert"), ("tflite-runtime", "tflite_runtime")):
        try:
            return distribution, importlib.import_module(module + ".interpreter")
        except (ImportError, AttributeError) as error:  # numpy 2 breaks tflite-runtime with either
            if not isinstance(error, ModuleNotFoundError) or not str(error.name).startswith(module):
                reasons.append(f"{distribution} does not import beside numpy {np.__version__} ({one_line(error)})")
    raise Refusal("unavailable", "; ".join(reasons) or "no TFLite runtime is installed: pip install ai-edge-litert")


def import_runtime(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refusal("unavailable", f"{name} does not import ({one_line(error)}): pip install {name}") from error


# The machine


def found_runtimes() -> dict[str, str]:
    names = ("numpy", "onnxruntime", "ai-edge-litert", "tflite-runtime", "coremltools", "torch")
    versions = {name: distribution_version(name) for name in names}
    return {name: version for name, version in versions.items() if version}


def distribution_version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def cpu_name() -> str:
    """The processor's model, or its architecture where the system does not say."""
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        return named.get("model name") or named.get("Model") or named.get("Hardware") or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pin_to(threads: int) -> list[int] | None:
    """Stay on the last `threads` cores, which on big.LITTLE boards are the big ones; None where that cannot be."""
    cpus = allowed_cpus()
    if threads > len(cpus):
        raise Refusal("misuse", f"{threads} threads were asked for, this process may use {len(cpus)} cores")
    if not hasattr(os, "sched_setaffinity"):
        return None
    os.sched_setaffinity(0, cpus[-threads:])
    return cpus[-threads:]


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def memory_mb(*, peak: bool = False) -> float:
    """Resident memory of this process. Linux' ru_maxrss would count the parent's, which exec does not reset."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) / 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS; the peak for both


def evict(model: str) -> bool:
    """Drop a model's files from the page cache; False where the system has no call for it."""
    if not hasattr(os, "posix_fadvise"):
        return False
    paths = glob.glob(os.path.join(model, "**"), recursive=True) if os.path.isdir(model) else [model]
    for path in filter(os.path.isfile, paths):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # only clean pages can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


# The protocol


def pack(array: Any) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"shape": list(array.shape), "dtype": array.dtype.name, "data": data}


def unpack(packed: dict[str, Any]) -> Any:
    return np.frombuffer(base64.b64decode(packed["data"]), packed["dtype"]).reshape(packed["shape"])


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def serve(requests: IO[str], replies: IO[str]) -> None:
    runner = Runner()
    for line in requests:
        replies.write(json.dumps(runner.answer(json.loads(line))) + "\n")
        replies.flush()


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what runtimes print must not break the protocol
    with contextlib.suppress(BrokenPipeError):  # nobody reads any more
        serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
