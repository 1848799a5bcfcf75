"""LiteRT, or its predecessor tflite-runtime: `.tflite` files.

XNNPACK by default; the option `fp16` forces it to fp16, `builtin` disables it, `delegate=PATH` loads another delegate.
"""

from __future__ import annotations

import importlib
import os
import zipfile
import zlib
from typing import Any

from .common import Adapter, Opened, Refusal, distribution_version, np, one_line

FORCE_FP16 = 4  # TFLITE_XNNPACK_DELEGATE_FLAG_FORCE_FP16
MOST_LABEL_BYTES = 16 * 10**6
MODULES = (("ai-edge-litert", "ai_edge_litert"), ("tflite-runtime", "tflite_runtime"))  # the successor first


class LiteRt(Adapter):
    def __init__(self, option: str, threads: int) -> None:
        super().__init__(option, threads)
        self.kind, _, self.library = option.partition("=")
        self.name, self.version, self.module = find_litert()
        if self.kind == "fp16":
            self.half = import_half(self.name)

    def open(self, path: str) -> Opened:
        if self.kind == "fp16":
            return self.open_half(path)
        interpreter = self.module.Interpreter(**self.settings(path))
        if self.library and not any(op["op_name"] == "DELEGATE" for op in interpreter._get_ops_details()):
            raise Refusal("unavailable", f"{self.library} takes none of the model's ops")
        interpreter.allocate_tensors()  # part of loading; otherwise the first run would do it
        runner = interpreter.get_signature_runner()
        (name,) = runner.get_input_details()
        kernels = {"": "CPU XNNPACK", "builtin": "CPU builtin kernels", "delegate": os.path.basename(self.library)}
        return Opened(lambda array: dict(runner(**{name: array})), kernels[self.kind], packed_labels(path))

    def settings(self, path: str) -> dict[str, Any]:
        settings: dict[str, Any] = {"model_path": path, "num_threads": self.threads}
        if self.kind:  # with a delegate too: one that accepts no op would silently leave all to XNNPACK
            settings["experimental_op_resolver_type"] = self.module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        if self.library:
            settings["experimental_delegates"] = [load_delegate(self.module, self.library)]
        return settings

    def open_half(self, path: str) -> Opened:
        """XNNPACK with every fp32 sum computed in fp16: only the newer API can force it."""
        compiled_model, cpu_options, options = self.half
        cpu = cpu_options(num_threads=self.threads, xnnpack_flags=FORCE_FP16)
        model = compiled_model.from_file(path, options=options(cpu_options=cpu))
        key = model.get_signature_by_index(0)["key"]
        details = model.get_output_tensor_details(key)
        (fed,), outputs = model.create_input_buffers(0), model.create_output_buffers(0)

        def read(buffer: Any, detail: dict[str, Any]) -> Any:
            return buffer.read(int(np.prod(detail["shape"])), detail["dtype"]).reshape(detail["shape"])

        def call(array: Any) -> dict[str, Any]:
            fed.write(array)
            model.run_by_index(0, [fed], outputs)
            return {name: read(buffer, details[name]) for name, buffer in zip(details, outputs)}

        return Opened(call, "CPU XNNPACK forced fp16", packed_labels(path))

    def profile(self, path: str, feeds: dict[str, Any], runs: int) -> list[dict[str, Any]] | None:
        if self.library:
            return None
        from .profile_ops import ProfilerUnavailable, profile_tflite

        settings = {"xnnpack": self.kind != "builtin", "fp16": self.kind == "fp16"}
        try:
            return profile_tflite(path, feeds, threads=self.threads, runs=runs, **settings)
        except ProfilerUnavailable as error:
            raise Refusal("unavailable", str(error)) from error


def find_litert() -> tuple[str, str, Any]:
    """(distribution, version, interpreter module) of whichever TFLite runtime is installed."""
    reasons = []
    for distribution, package in MODULES:
        version = distribution_version(distribution)
        try:
            return distribution, version, importlib.import_module(package + ".interpreter")
        except (ImportError, AttributeError) as error:  # numpy 2 breaks tflite-runtime with either
            absent = isinstance(error, ModuleNotFoundError) and str(error.name).startswith(package)
            if version or not absent:
                there = f"{distribution} {version}".rstrip()
                reasons.append(f"{there} does not import beside numpy {np.__version__} ({one_line(error)})")
    raise Refusal("unavailable", "; ".join(reasons) or "no TFLite runtime is installed: pip install ai-edge-litert")


def import_half(name: str) -> tuple[Any, Any, Any]:
    try:
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.cpu_options import CpuOptions
        from ai_edge_litert.options import Options
    except ImportError as error:
        reason = f"this {name} cannot force fp16 ({one_line(error)}): pip install 'ai-edge-litert>=2.3'"
        raise Refusal("unavailable", reason) from error
    return CompiledModel, CpuOptions, Options


def load_delegate(module: Any, library: str) -> Any:
    try:
        return module.load_delegate(library)
    except Exception as error:
        raise Refusal("unavailable", f"the delegate {library} does not load: {one_line(error)}") from error


def packed_labels(path: str) -> list[str] | None:
    """TFLite metadata packs its label file as a zip at the end of the model. Raises ValueError for a damaged one."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as packed:
            entry = packed.getinfo("labels.txt")
            if entry.file_size > MOST_LABEL_BYTES:
                raise ValueError(f"the labels in it unpack to {entry.file_size:,} bytes")
            return packed.read(entry).decode("utf-8").splitlines()
    except KeyError:
        return None
    # encrypted, or damaged further in
    except (RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"the labels in it cannot be unpacked ({one_line(error)})") from error
