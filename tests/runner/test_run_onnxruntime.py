"""ONNX Runtime on processors that add int8 products in 16 bits: the sessions compute what the file says."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import unavailable
from onnx import TensorProto, helper, numpy_helper

from mvit_export.runner.run_onnxruntime import PRODUCT

pytestmark = pytest.mark.slow

WITHOUT_VNNI = "Haswell"  # AVX2 alone
IN_BOTH_READERS = """if True:
    import json, sys
    import numpy as np
    from mvit_export.readers.onnx import read_layers
    from mvit_export.runner.run_onnxruntime import OnnxRuntime
    file, numbers = sys.argv[1:]
    x = np.load(numbers)
    whole = OnnxRuntime("cpu", 1).open(file).call(x)["y"]
    layers = {layer.op: layer.tensor for layer in read_layers(file, x, {})}
    print(json.dumps([whole.tolist(), layers["last"].tolist()]))
"""


def write_graph(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], *shapes: list[int]) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in zip("xy", shapes, strict=True))
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), str(path))


def dynamic_linear(path: Path, weights: np.ndarray) -> np.ndarray:
    """As the converter writes one: inputs near 1, which become integers near 255. Returns the exact product."""
    node = helper.make_node
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "unit", "zero"]),
        node("MatMulInteger", ["q", "w", "zero"], ["sums"]),
        node("Cast", ["sums"], ["cast"], to=TensorProto.FLOAT),
        node("Mul", ["unit", "scale"], ["units"]),
        node("Mul", ["cast", "units"], ["y"], name="last"),
    ]
    scale = np.full(weights.shape[1], 0.01, np.float32)
    write_graph(path, nodes, {"w": weights, "scale": scale}, [8, weights.shape[0]], [8, weights.shape[1]])
    return np.ones((8, weights.shape[0]), np.float32) @ (weights * np.float32(0.01))


def static_convolution(path: Path, weights: np.ndarray) -> np.ndarray:
    """A 1x1 convolution between QuantizeLinear and DequantizeLinear. Returns the exact product, in steps of 1."""
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "unit", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "unit", "zero"], ["float"]),
        node("DequantizeLinear", ["w", "scale"], ["weight"], axis=0),
        node("Conv", ["float", "weight"], ["sums"]),
        node("QuantizeLinear", ["sums", "one", "zero"], ["p"]),
        node("DequantizeLinear", ["p", "one", "zero"], ["y"], name="last"),
    ]
    outputs, inputs = weights.shape
    constants = {
        "w": weights.reshape(outputs, inputs, 1, 1), "scale": np.full(outputs, 0.01, np.float32),
        "unit": np.float32(1 / 255), "one": np.float32(1), "zero": np.uint8(0),
    }  # fmt: skip
    write_graph(path, nodes, constants, [1, inputs, 4, 4], [1, outputs, 4, 4])
    exact = np.rint(weights.sum(axis=1) * 0.01)
    return np.broadcast_to(exact[None, :, None, None], (1, outputs, 4, 4))


def test_the_product_that_is_tried_is_what_it_is_called() -> None:
    model = onnx.load_from_string(PRODUCT)
    onnx.checker.check_model(model)
    (product,), (weights,) = model.graph.node, model.graph.initializer
    assert (product.op_type, list(product.input)) == ("MatMulInteger", ["a", "b"])
    np.testing.assert_array_equal(numpy_helper.to_array(weights), np.array([[127], [127]], np.int8), strict=True)


@pytest.mark.parametrize(
    ("write", "shape"), [(dynamic_linear, (8, 64)), (static_convolution, (1, 32, 4, 4))], ids=["dynamic", "static"]
)
def test_int8_does_not_saturate_without_vnni(write: object, shape: tuple[int, ...], tmp_path: Path) -> None:
    """A pair of products is 2 * 255 * 100 and more, beyond int16. The real kernels run, under emulation."""
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if platform.machine() != "x86_64" or emulator is None:
        unavailable("an x86-64 machine with qemu-x86_64-static is needed: apt-get install qemu-user-static")
    rng = np.random.default_rng(0)
    sizes = (64, 32) if write is dynamic_linear else (8, 32)
    exact = write(tmp_path / "graph.onnx", rng.integers(100, 128, sizes).astype(np.int8))  # type: ignore[operator]
    np.save(tmp_path / "x.npy", np.ones(shape, np.float32))
    command = [emulator, "-cpu", WITHOUT_VNNI, sys.executable, "-c", IN_BOTH_READERS]
    done = subprocess.run(
        [*command, str(tmp_path / "graph.onnx"), str(tmp_path / "x.npy")],
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        np.testing.assert_allclose(np.array(found), exact, rtol=1e-4)
