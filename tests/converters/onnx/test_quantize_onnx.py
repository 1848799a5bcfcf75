"""ONNX in few bits: what the file holds, what ONNX Runtime makes of it, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import LABELS
from onnx import TensorProto, numpy_helper

from mvit_export import export, load_model, verify
from mvit_export.checks.parity import FAIL, PASS
from mvit_export.converters.capture import Conversion
from mvit_export.converters.onnx import calibrate as calibrate_onnx
from mvit_export.converters.onnx import quantize as quantize_onnx
from mvit_export.converters.quantization.integers import (
    BIAS_LIMIT,
    pack_int4,
    split_blocks,
    to_bias,
    to_int4,
    to_int8,
    to_uint8,
)
from mvit_export.data.calibration import open_calibration
from mvit_export.errors import ConversionError, UsageError
from mvit_export.formats.targets import find_recipe, plan_targets
from mvit_export.readers.onnx import onnx_modules

pytestmark = pytest.mark.slow

TINY_ENCODERS = 4
TINY_LINEARS = 4 * TINY_ENCODERS + 1  # qkv, proj, expand, reduce in each; the classifier
STATIC_CONVS = 6  # local and fuse in three blocks; the stem stays float
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration pictures, enough for a percentile to cut some: noise over ramps, of several contrasts."""
    rng, ramp = np.random.default_rng(0), np.linspace(0, 1, 64)
    images = [
        (ramp[:, None, None] * 200 * contrast + rng.integers(0, 56, (64, 64, 3))).clip(0, 255)
        for contrast in np.linspace(0.2, 1, 64)
    ]
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    np.savez(path, images=np.array(images, np.uint8))
    return path


@pytest.fixture(scope="module")
def make(tiny_model: Any, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`make("int8", recipe="fast")` -> the export's result with its verdict; made once for equal words."""
    made: dict[Any, Any] = {}

    def build(precision: str, **options: Any) -> Any:
        key = (precision, *sorted(options.items()))
        if key not in made:
            if precision == "int8":
                options = {"calibration": pictures, **options}
            out = tmp_path_factory.mktemp("out")
            (made[key],) = export(tiny_model, to="onnx", precision=precision, out=out, **options)
        return made[key]

    return build


def write_recipe(path: Path, *rules: str) -> Path:
    path.write_text("\n".join(f"[[rules]]\n{rule}" for rule in rules))
    return path


def graph_of(result: Any) -> Any:
    return onnx.load(str(result.artifact.model_path)).graph


def count(graph: Any) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def optimised(result: Any, tmp_path: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(result.artifact.model_path), options, providers=["CPUExecutionProvider"])
    return count(onnx.load(tmp_path / "optimised.onnx").graph)


def weight_types(graph: Any) -> dict[int, int]:
    """Values of two and more dimensions by their type."""
    types: Counter[int] = Counter()
    for tensor in graph.initializer:
        types[tensor.data_type] += int(np.prod(tensor.dims)) if len(tensor.dims) > 1 and 1 not in tensor.dims else 0
    return types


# The files


@pytest.mark.parametrize(
    ("precision", "recipe"),
    [
        ("int8-weight", None), ("int8-dynamic", None), ("int4-weight", None),
        ("int8", "accurate"), ("int8", "fast"), ("int8", "small"),
    ],
)  # fmt: skip
def test_one_portable_file_that_is_right(precision: str, recipe: str | None, make: Callable[..., Any]) -> None:
    result = make(precision, **({"recipe": recipe} if recipe else {}))
    assert result.parity.status == PASS, result.parity.reason
    model = onnx.load(str(result.artifact.model_path))
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {""}, "an operator that only ONNX Runtime has"
    assert not [t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert {entry.key: entry.value for entry in model.metadata_props}["precision"] == precision


def test_weights_of_8_bits_cost_no_time(make: Callable[..., Any], tmp_path: Path) -> None:
    result = make("int8-weight")
    graph = graph_of(result)
    assert weight_types(graph)[TensorProto.FLOAT] == 0
    assert count(graph)["DequantizeLinear"] == 0
    run = optimised(result, tmp_path)
    assert not {"Cast", "DequantizeLinear", "MatMulNBits"} & set(run), "weights are restored at every run"


def test_weights_of_4_bits_where_they_bear_it(make: Callable[..., Any], tmp_path: Path) -> None:
    result = make("int4-weight")
    model = onnx.load(str(result.artifact.model_path))
    assert [entry.version for entry in model.opset_import] == [21]
    four = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT4}
    assert {"model.stages.2.1.local.conv.weight_int4", "model.stages.4.1.fuse.conv.weight_int4"} <= four
    assert not [name for name in four if "stem" in name or "depthwise" in name or "to_tokens" in name]
    stored = sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.name in four)
    assert sum(len(t.raw_data) for t in model.graph.initializer if t.name in four) <= stored / 2 + len(four)
    assert "DequantizeLinear" not in optimised(result, tmp_path)


def test_dynamic_linears_are_fused(make: Callable[..., Any], tmp_path: Path) -> None:
    result = make("int8-dynamic")
    split = 2 * TINY_ENCODERS  # q, k and v are three layers
    assert count(graph_of(result))["MatMulInteger"] == TINY_LINEARS + split
    run = optimised(result, tmp_path)
    assert run["DynamicQuantizeMatMul"] + run["MatMulIntegerToFloat"] == TINY_LINEARS + split
    assert not {"MatMulInteger", "Gemm"} & set(run)


def test_fast_is_static_in_the_blocks_convolutions_alone(make: Callable[..., Any], tmp_path: Path) -> None:
    result = make("int8", recipe="fast")
    graph = graph_of(result)
    zeros = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 2 * STATIC_CONVS
    assert {zeros[node.input[2]].dtype.name for node in quantizers} == {"uint8"}
    quantized = [node for node in graph.node if node.op_type == "DequantizeLinear" and onnx_modules(node)]
    modules = {module for node in quantized for module in onnx_modules(node)}
    assert modules == {f"stages.{i}.1.{name}.conv" for i in (2, 3, 4) for name in ("local", "fuse")}
    assert optimised(result, tmp_path)["QLinearConv"] == STATIC_CONVS


def test_weights_of_static_convolutions_have_a_scale_a_channel(make: Callable[..., Any]) -> None:
    graph = graph_of(make("int8", recipe="fast"))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    inputs = [node.input for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in arrays]
    weights = [(arrays[q], arrays[s]) for q, s, *_ in inputs if arrays[q].ndim == 4]
    assert len(weights) == STATIC_CONVS
    for integers, scale in weights:
        assert integers.dtype == np.int8 and scale.shape == (integers.shape[0],)
        assert (np.abs(integers).max(axis=(1, 2, 3)) == 127).all()
    assert sorted(a.dtype.name for a in (arrays[q] for q, *_ in inputs)) == ["int32"] * 6 + ["int8"] * 6


def test_bytes_of_a_real_network(tmp_path: Path) -> None:
    model = load_model("xxs")
    plain, four = export(model, to="onnx", precision=["fp32", "int4-weight"], out=tmp_path, verify=False)
    assert four.artifact.model_bytes <= 0.21 * plain.artifact.model_bytes
    noise = open_calibration(None, method="minmax", preprocessing=model.preprocessing, size=(256, 256), trained=False)
    for recipe in ("fast", "accurate", "small"):  # in the graph that the exporter gave, once
        graph = onnx.load(str(plain.artifact.model_path))
        target = replace(plan_targets("onnx", precision="int8")[0], recipe=recipe)
        conversion = Conversion(model, model.module, target, recipe=find_recipe(target, recipe), calibration=noise)
        quantize_onnx.quantize(graph, conversion)
        assert graph.ByteSize() <= 0.30 * plain.artifact.model_bytes


# Recipes


def test_an_excluded_module_stays_float(make: Callable[..., Any], tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "but.toml",
        'modules = "stages.3.1.fuse.conv|classifier"\nuse = "float"',
        'kinds = ["conv"]\nuse = "static"',
        'kinds = ["linear"]\nuse = "dynamic"',
    )
    result = make("int8", recipe=recipe)
    graph = graph_of(result)
    assert result.artifact.path.name == "onnx-int8-but"
    assert count(graph)["QuantizeLinear"] == 2 * STATIC_CONVS  # one less, and the stem
    assert count(graph)["MatMulInteger"] == TINY_LINEARS + 2 * TINY_ENCODERS - 1
    kept = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    assert {"model.stages.3.1.fuse.conv.weight", "model.classifier.weight"} <= kept
    assert "model.stages.3.1.local.conv.weight" not in kept
    assert result.parity.status == PASS


def test_everything_that_can_be_static(make: Callable[..., Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "all.toml", 'kinds = ["norm"]\nuse = "float"', 'use = "static"')
    result = make("int8", recipe=recipe)
    graph = graph_of(result)
    makers = {output: node for node in graph.node for output in node.output}
    for op_type in ("Conv", "MatMul", "Gemm", "Softmax", "Sigmoid"):
        nodes = [node for node in graph.node if node.op_type == op_type]
        assert nodes and all(makers[node.input[0]].op_type == "DequantizeLinear" for node in nodes), op_type
    assert count(graph)["LayerNormalization"] == 2 * TINY_ENCODERS + 3
    assert result.parity.metrics.psnr_db > 15


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ('kinds = ["conv"]\nuse = "dynamic"', "dynamic conv in stem.conv; in ONNX conv can be float, weight, static"),
        ('kinds = ["norm"]\nuse = "static"', "in stages.2.1.encoders.0.norm1; in ONNX norm can be float, weight"),
        ('kinds = ["attention"]\nuse = "dynamic"', "in ONNX attention can be float, weight, static"),
    ],
)  # fmt: skip
def test_a_use_that_onnx_has_not(rule: str, message: str, make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        make("int8", recipe=write_recipe(tmp_path / "odd.toml", rule))


def test_4_bits_need_their_opset(make: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="--opset 18 has no int4-weight, expected 21 or later"):
        make("int4-weight", opset=18)
    assert make("int4-weight", opset=23).parity.status == PASS


# Calibration


def test_equal_words_give_equal_graphs(make: Callable[..., Any], pictures: Path) -> None:
    first, second = make("int8", recipe="fast"), make("int8", recipe="fast", calibration=pictures)
    assert first is not second
    assert graph_of(first).SerializeToString() == graph_of(second).SerializeToString()


def test_methods_find_other_ranges(make: Callable[..., Any]) -> None:
    def scales(method: str) -> dict[str, float]:
        graph = graph_of(make("int8", recipe="fast", calibration_method=method))
        found = (tensor for tensor in graph.initializer if tensor.name.endswith("_static_scale"))
        return {tensor.name: float(numpy_helper.to_array(tensor)) for tensor in found}

    widest, cut, told = (scales(method) for method in ("minmax", "percentile", "entropy"))
    assert len(widest) == 2 * STATIC_CONVS
    assert all(cut[name] <= scale * 1.001 and told[name] <= scale * 1.001 for name, scale in widest.items())
    assert len({tuple(found.values()) for found in (widest, cut, told)}) == 3


def test_ranges_that_do_not_fit_fail(
    tiny_model: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow(*given: Any) -> Any:
        return {name: (low / 8, high / 8) for name, (low, high) in calibrate_onnx.calibrate(*given).items()}

    monkeypatch.setattr(quantize_onnx, "calibrate", narrow)
    (result,) = export(tiny_model, to="onnx", precision="int8", recipe="fast", calibration=pictures, out=tmp_path)
    assert result.parity.status == FAIL


def test_4_bits_in_the_wrong_half_fail(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(array: np.ndarray) -> bytes:
        return bytes(byte >> 4 | (byte & 0xF) << 4 for byte in pack_int4(array))

    monkeypatch.setattr(quantize_onnx, "pack_int4", swapped)
    (result,) = export(tiny_model, to="onnx", precision="int4-weight", out=tmp_path)
    assert result.parity.status == FAIL


def test_batches_are_filled_up() -> None:
    inputs = [np.full((1, 2), value) for value in range(3)]
    batches = list(calibrate_onnx.batches(iter(inputs), 2))
    assert [batch[:, 0].tolist() for batch in batches] == [[0, 1], [2, 2]]


# Beside other options


def test_pictures_labels_and_any_batch(pictures: Path, tmp_path: Path, tiny_model: Any) -> None:
    from conftest import TINY

    file = tmp_path / "labels.txt"
    file.write_text("\n".join(LABELS))
    model = load_model(model=TINY, labels=file)
    options = dict(input="image", dynamic_batch=True, calibration=pictures, recipe="fast", out=tmp_path)
    (result,) = export(model, to="onnx", precision="int8", **options)
    assert result.parity.status == PASS, result.parity.reason
    session = onnxruntime.InferenceSession(str(result.artifact.model_path))
    images = np.load(pictures)["images"]
    together = session.run(None, {"image": images[:3]})[0]
    alone = np.concatenate([session.run(None, {"image": images[i : i + 1]})[0] for i in range(3)])
    assert np.abs(together - alone).max() < 0.1 * np.abs(alone).max()  # dynamic ranges are those of the whole batch
    assert "digit 9" in session.get_modelmeta().custom_metadata_map["labels"]


def test_locate_looks_into_it(make: Callable[..., Any]) -> None:
    (result,) = verify(make("int8-dynamic").artifact.path, find_layer=True)
    assert result.status == PASS and result.located is not None and not result.located.diverges


# Integers


def test_int8_is_within_half_a_step() -> None:
    weights = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32) * np.float32([[[[100]]]])
    integers, scale = to_int8(weights, 0)
    assert (scale.shape, integers.dtype) == ((4, 1, 1, 1), np.int8)
    assert np.abs(integers * scale - weights).max() <= scale.max() * 0.5001
    assert to_int8(np.zeros((2, 2), np.float32), 1)[1].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("bounds", [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_uint8_holds_zero_exactly(bounds: tuple[float, float]) -> None:
    scale, zero = to_uint8(*bounds)
    assert (scale.dtype, zero.dtype) == (np.float32, np.uint8) and 0 <= zero <= 255
    low, high = (0 - int(zero)) * float(scale), (255 - int(zero)) * float(scale)
    assert low <= min(bounds[0], 0) + scale and high >= max(bounds[1], 0) - scale


def test_a_bias_beyond_its_weights_still_fits() -> None:
    weights, bias, unit = np.zeros((2, 3), np.float32), np.float32([1e4, 0.5]), 1e-8
    _, scale = to_int8(weights, 0, least=(np.abs(bias) / (unit * BIAS_LIMIT))[:, None])
    units = unit * scale.ravel()
    np.testing.assert_allclose(to_bias(bias, units) * units, bias, rtol=1e-6)


@pytest.mark.parametrize(("shape", "axis"), [((6, 64), 0), ((64, 6), 1), ((6, 8, 3, 3), 0)])
def test_int4_in_blocks(shape: tuple[int, ...], axis: int) -> None:
    weights = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    blocks, inner = split_blocks(weights, axis) or pytest.fail("no blocks")
    integers, scale = to_int4(blocks, inner)
    assert integers.min() >= -8 and integers.max() <= 7 and scale.shape[inner] == 1
    restored = (integers * scale).reshape(shape)
    plain = np.abs(blocks).max(inner, keepdims=True) / 7
    naive = (np.clip(np.rint(blocks / plain), -8, 7) * plain).reshape(shape)
    assert np.square(restored - weights).sum() < np.square(naive - weights).sum()
    tensor = onnx.helper.make_tensor("t", TensorProto.INT4, integers.shape, pack_int4(integers), raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), integers)


def test_short_sums_have_no_blocks() -> None:
    assert split_blocks(np.zeros((8, 1, 3, 3)), 0) is None  # depthwise
    assert split_blocks(np.zeros((37, 4)), 1) is None  # a prime
    assert pack_int4(np.array([1, -2, 3], np.int8)) == bytes([0xE1, 0x03])


def test_a_scaled_product_cannot_be_int8() -> None:
    from mvit_export.converters.onnx.parts import Part

    node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"], alpha=0.5, name="odd")
    with pytest.raises(ConversionError, match=r"odd \(head\) has alpha and cannot be int8"):
        Part(node, "linear", "head", "w", 1).plain_weight()
