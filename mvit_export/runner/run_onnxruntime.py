"""ONNX Runtime: `.onnx` and `.ort` files. The option is one of its execution providers, by default the CPU's."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from .common import Adapter, Opened, Refusal, import_runtime, np, read_labels

PROVIDERS = {
    "cpu": "CPUExecutionProvider", "xnnpack": "XnnpackExecutionProvider", "coreml": "CoreMLExecutionProvider",
    "nnapi": "NnapiExecutionProvider", "qnn": "QNNExecutionProvider",
}  # fmt: skip
ERRORS_ONLY = 3  # of its log


# An ONNX model, since a device has nothing that writes one: y = MatMulInteger(a, b) with b = [[127], [127]] in int8.
PRODUCT = (
    b'\x08\x05\x12\x00:V\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01g*\r\x08\x02\x08\x01\x10\x03B\x01b'
    b"J\x02\x7f\x7fZ\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02\x08\x01\n\x02\x08\x02b\x13\n\x01y\x12\x0e\n\x0c"
    b"\x08\x06\x12\x08\n\x02\x08\x01\n\x02\x08\x01B\x04\n\x00\x10\n"
)


def session_options(ort: Any, threads: int) -> Any:
    """What every session of ours is opened with. Where int8 products saturate, they are told not to.

    x86 processors with AVX2 or AVX-512 but without VNNI add pairs of products in 16 bits, so that the answers are not
    those of the file. ARM and VNNI add in 32 bits. The option: https://github.com/microsoft/onnxruntime/pull/12088
    """
    options = plain_options(ort, threads)
    for name, value in settings_of(ort).items():
        options.add_session_config_entry(name, value)
    return options


def settings_of(ort: Any) -> dict[str, str]:
    return {"session.x64quantprecision": "1"} if saturates(ort) else {}


def plain_options(ort: Any, threads: int) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return options


@lru_cache(maxsize=None)
def saturates(ort: Any) -> bool:
    """Whether this processor's kernels lose bits of 255 * 127 + 255 * 127."""
    try:
        session = ort.InferenceSession(PRODUCT, plain_options(ort, 1), providers=[PROVIDERS["cpu"]])
    except Exception:  # a reduced build, which has no such operator, or reads no .onnx
        return False
    ((found,),) = session.run(None, {"a": np.full((1, 2), 255, np.uint8)})[0]
    return int(found) != 2 * 255 * 127


class OnnxRuntime(Adapter):
    name = "onnxruntime"

    def __init__(self, option: str, threads: int) -> None:
        super().__init__(option, threads)
        self.ort = import_runtime("onnxruntime")
        self.version, self.provider = self.ort.__version__, PROVIDERS[option or "cpu"]
        if self.provider not in self.ort.get_available_providers():
            there = ", ".join(self.ort.get_available_providers())
            raise Refusal("unavailable", f"this onnxruntime {self.version} has no {self.provider}, only {there}")
        saturates(self.ort)  # now, not while a file's opening is timed

    def open(self, path: str) -> Opened:
        session = self.start(path)
        if self.provider not in session.get_providers():
            raise Refusal(
                "unavailable", f"{self.provider} did not start; onnxruntime fell back to {session.get_providers()}"
            )
        (name,) = [node.name for node in session.get_inputs()]
        names = [node.name for node in session.get_outputs()]
        labels = read_labels(session.get_modelmeta().custom_metadata_map.get("labels"))

        def call(array: Any) -> dict[str, Any]:
            return dict(zip(names, session.run(names, {name: array})))

        executed = self.provider.replace("ExecutionProvider", "")
        return Opened(call, executed, labels)

    def start(self, path: str) -> Any:
        options = session_options(self.ort, self.threads)
        # XNNPACK has its own thread pool, which ORT's spinning threads would compete with for the cores.
        settings = {"intra_op_num_threads": str(self.threads)} if self.option == "xnnpack" else {}
        if settings:
            options.intra_op_num_threads = 1
        return self.ort.InferenceSession(path, options, providers=[(self.provider, settings)])

    def profile(self, path: str, feeds: dict[str, Any], runs: int) -> list[dict[str, Any]] | None:
        if self.option not in ("", "cpu"):
            return None
        from .profile_ops import ProfilerUnavailable, profile_onnx

        try:
            return profile_onnx(path, feeds, threads=self.threads, runs=runs, settings=settings_of(self.ort))
        except ProfilerUnavailable as error:
            raise Refusal("unavailable", str(error)) from error
