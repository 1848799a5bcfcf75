"""What the machine can do at best, measured in the runtime itself: a large matrix product, and a copy of memory.

The roofline model (Williams, Waterman & Patterson, CACM 52(4), 2009) bounds a time from below by the larger of
operations over peak and bytes over bandwidth. The bytes counted here are the weights, each read once: activations that
leave the caches come on top, so the bound is a low one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.benchmarks.devices import Device
from mvit_export.benchmarks.probe import start_runner
from mvit_export.errors import require

SIDE = 1024  # of the square matrices: 1.07 GMAC, 12 MB in fp32
RUNS = 15


@dataclass(frozen=True)
class Roofline:
    """Peaks of a runtime with some threads on a device."""

    peak_gmacs: float  # 1e9 multiply-accumulates a second
    bandwidth_gbs: float  # 1e9 bytes read or written a second

    def judge(self, *, macs: int, weight_bytes: int, median_ms: float) -> dict[str, float]:
        """Where a model stands: MACs a second reached, their share of the peak, and the least time it could take."""
        ceiling_s = max(macs / self.peak_gmacs, weight_bytes / self.bandwidth_gbs) / 1e9
        achieved = macs / median_ms / 1e6
        return asdict(self) | {
            "achieved_gmacs": achieved,
            "peak_share": achieved / self.peak_gmacs,
            "ceiling_ms": 1e3 * ceiling_s,
        }


def measure_roofline(runtime: str, format: str, threads: int, device: Device) -> Roofline:
    """The best of several runs of one fp32 matrix product, and of several copies.

    Raises RuntimeUnavailable or DeviceError as a probe does, MissingDependencyError where the product cannot be
    written down here.
    """
    with tempfile.TemporaryDirectory() as folder, start_runner(device) as worker:
        local = Path(folder) / f"product{SUFFIXES[format]}"
        WRITERS[format](local)
        model = str(local) if device.name == "local" else device.put(local, local.name)
        worker.ask("hello", timeout=120)
        worker.ask("open", model=model, runtime=runtime, threads=threads, pin=True)
        worker.ask("feed", shape=(SIDE, SIDE), dtype="float32")
        best_ms = min(worker.ask("sample", count=RUNS)["ms"])
        bandwidth = worker.ask("bandwidth", threads=threads)["gbs"]
    return Roofline(SIDE**3 / best_ms / 1e6, bandwidth)


def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32)


def write_onnx(path: Path) -> None:
    """Y = X W with a constant W, as an exported Linear is."""
    onnx = require("onnx", extra="onnx", purpose="to measure ONNX Runtime's peak")
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [tensor("x", onnx.TensorProto.FLOAT, [SIDE, SIDE])],
        [tensor("y", onnx.TensorProto.FLOAT, [SIDE, SIDE])],
        [onnx.numpy_helper.from_array(weights(), "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, str(path))


def write_tflite(path: Path) -> None:
    """One FULLY_CONNECTED with constant weights, under a signature."""
    require("ai_edge_litert", extra="tflite", purpose="to measure LiteRT's peak")
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    def record(kind: type, **fields: Any) -> Any:
        made = kind()
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    def tensor(name: str, buffer: int) -> Any:
        return record(schema.TensorT, name=name, shape=[SIDE, SIDE], type=schema.TensorType.FLOAT32, buffer=buffer)

    builtin = schema.BuiltinOperator.FULLY_CONNECTED
    code = record(schema.OperatorCodeT, builtinCode=builtin, deprecatedBuiltinCode=builtin)
    operator = record(
        schema.OperatorT, opcodeIndex=0, inputs=[0, 1, -1], outputs=[2],
        builtinOptionsType=schema.BuiltinOptions.FullyConnectedOptions, builtinOptions=schema.FullyConnectedOptionsT(),
    )  # fmt: skip
    tensors = [tensor("x", 0), tensor("w", 1), tensor("y", 0)]
    graph = record(schema.SubGraphT, tensors=tensors, inputs=[0], outputs=[2], operators=[operator], name="main")
    x, y = ([record(schema.TensorMapT, name=name, tensorIndex=index)] for name, index in (("x", 0), ("y", 2)))
    signature = record(schema.SignatureDefT, signatureKey="serving_default", inputs=x, outputs=y, subgraphIndex=0)
    buffers = [schema.BufferT(), record(schema.BufferT, data=weights().view(np.uint8).ravel())]
    model = record(
        schema.ModelT, version=3, operatorCodes=[code], subgraphs=[graph], buffers=buffers, signatureDefs=[signature]
    )
    flatbuffer_utils.write_model(model, str(path))


def write_coreml(path: Path) -> None:
    """One linear of an ML Program in fp16, which is what the GPU and the Neural Engine compute in."""
    ct = require("coremltools", extra="coreml", purpose="to measure Core ML's peak")
    from coremltools.converters.mil import Builder

    @Builder.program(input_specs=[Builder.TensorSpec(shape=(SIDE, SIDE))])
    def product(x: Any) -> Any:
        return Builder.linear(x=x, weight=weights(), name="y")

    ct.convert(product, minimum_deployment_target=ct.target.iOS16).save(str(path))


SUFFIXES = {"onnx": ".onnx", "tflite": ".tflite", "coreml": ".mlpackage"}
WRITERS: dict[str, Callable[[Path], None]] = {"onnx": write_onnx, "tflite": write_tflite, "coreml": write_coreml}
