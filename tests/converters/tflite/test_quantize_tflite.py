"""TFLite in fewer bits: which ops work how, in the file itself; ranges; refusals; what XNNPACK makes of it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mvit_export import export, load_model
from mvit_export.artifact import read_artifact
from mvit_export.checks.parity import verify
from mvit_export.converters.capture import Conversion
from mvit_export.converters.quantization.ranges import BINS, Histogram, divergence, entropy, learn_ranges, percentile
from mvit_export.converters.tflite import quantize as quantize_tflite
from mvit_export.converters.tflite.parts import kinds_of
from mvit_export.converters.tflite.quantize import PER_ROW, check_done, check_recipe, share_ranges
from mvit_export.data.calibration import METHODS, open_calibration
from mvit_export.errors import ConversionError, UsageError
from mvit_export.formats.base import PLAIN
from mvit_export.formats.recipes import Recipe, Rule, everything
from mvit_export.formats.targets import Target
from mvit_export.formats.tflite import TFLITE
from mvit_export.models.fold import fold_batch_norms
from mvit_export.readers.inspect import inspect_path
from mvit_export.readers.tflite import open_tflite
from mvit_export.readers.tflite_graph import WEIGHTED, Graph, read_graph

pytestmark = pytest.mark.slow

ACCURATE, FAST, SMALL = (TFLITE.recipes[name] for name in ("accurate", "fast", "small"))
Quantize = Callable[..., Path]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth random pictures, as ranges are learned from."""
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("calibration") / "pictures.npz"
    np.savez(path, images=coarse.repeat(8, axis=1).repeat(8, axis=2))
    return path


@pytest.fixture(scope="module")
def quantized(tiny_artifact, tiny_model, pictures, tmp_path_factory) -> Quantize:
    """`quantized("int8", FAST)` -> a quantized copy of the tiny network's fp32 file."""
    folded = fold_batch_norms(tiny_model.module, torch.zeros(tiny_model.input_shapes[0]))

    def make(precision: str, recipe: Recipe | None = None, method: str = "minmax", input: str = "tensor") -> Path:
        place = tmp_path_factory.mktemp("quantized")
        path = Path(shutil.copy(read_artifact(tiny_artifact("tflite", "fp32", input, form=PLAIN)).model_path, place))
        calibration = open_calibration(
            pictures, method=method, preprocessing=tiny_model.preprocessing, size=(64, 64), trained=True
        )
        target = Target("tflite", precision, input)
        quantize_tflite.quantize(path, Conversion(tiny_model, folded, target, recipe=recipe, calibration=calibration))
        return path

    return make


@pytest.fixture(scope="module")
def graph_of(quantized: Quantize) -> Callable[..., Graph]:
    made: dict[tuple, Graph] = {}

    def make(*key) -> Graph:
        if key not in made:
            made[key] = read_graph(quantized(*key))
        return made[key]

    return make


@pytest.fixture(scope="module")
def kinds(tiny_artifact, tiny_model) -> dict[str, tuple[str, str]]:
    """Kind and module of every op of the fp32 file by its name in a quantized one."""
    graph = read_graph(read_artifact(tiny_artifact("tflite", form=PLAIN)).model_path)
    found = kinds_of(graph, tiny_model.module, torch.zeros(tiny_model.input_shapes[0]))
    return {short(graph.name(graph.ops[index])): value for index, value in found.items()}


def short(name: str) -> str:
    return re.sub(r"(^|[/;])(\w+\.)+", r"\1", name)


def uses_of_kind(graph: Graph, kinds, kind: str, module: str = ".*") -> set[str]:
    """How the ops of a kind work, the classifier aside, whose name is that of the output."""
    names = {name for name, found in kinds.items() if found[0] == kind and re.fullmatch(module, found[1])}
    found = {graph.use(op) for op in graph.ops if graph.name(op) in names - {"serving_default_logits_output"}}
    assert found, kind
    return found


def count_partitions(path: Path) -> int:
    """The parts of a graph that XNNPACK runs; one means that it runs all of it."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    return sum(op["op_name"] == "DELEGATE" for op in interpreter._get_ops_details())


def takes_whole_graph(path: Path) -> bool:
    """Whether the one delegate takes the graph's input and gives its output."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    parts = [op for op in interpreter._get_ops_details() if op["op_name"] == "DELEGATE"]
    made = {t for op in interpreter._get_ops_details() if op["op_name"] != "DELEGATE" for t in op["outputs"]}
    (output,) = interpreter.get_output_details()
    return len(parts) == 1 and not made & set(parts[0]["inputs"]) and list(parts[0]["outputs"]) == [output["index"]]


def test_every_op_is_known_by_kind_and_module(kinds):
    count = {kind: sum(found[0] == kind for found in kinds.values()) for kind, _ in kinds.values()}
    # 3 blocks with two dense and two pointwise convolutions, 7 inverted residuals; stem, head, classifier
    encoders = 4
    assert count["linear"] == 4 * encoders + 1
    assert count["attention"] == encoders * 3  # the scaling of q is part of it
    assert count["conv"] == 3 * 2 + 1
    assert count["depthwise"] == 7
    assert count["conv1x1"] == 3 * 2 + 7 * 2 + 1
    assert count["activation"] == 2 * (encoders + 3 * 3 + 7 * 2 + 2)
    assert count["elementwise"] == 2 * encoders + 3 + 3  # concatenations, and the residuals of inverted residuals
    modules = {module for kind, module in kinds.values() if kind == "linear"}
    assert {"stages.2.1.encoders.0.attention.qkv", "stages.4.1.encoders.0.mlp.reduce", "classifier"} <= modules
    assert ("activation", "stages.2.1.encoders.0.mlp.act") in kinds.values()
    assert ("attention", "stages.3.1.encoders.1.attention") in kinds.values()
    assert ("norm", "stages.3.1.norm") in kinds.values()


@pytest.mark.parametrize(
    ("precision", "products", "depthwise"),
    [("int8-weight", {"weight"}, {"weight"}), ("int8-dynamic", {"dynamic"}, {"weight"})],
)
def test_weights_have_8_bits_and_the_rest_is_float(graph_of, kinds, precision, products, depthwise):
    graph = graph_of(precision)
    for kind in ("conv", "conv1x1", "linear"):
        assert uses_of_kind(graph, kinds, kind) == products
    assert uses_of_kind(graph, kinds, "depthwise") == depthwise
    for kind in ("activation", "elementwise", "attention", "softmax", "norm"):
        assert uses_of_kind(graph, kinds, kind) == {"float"}
    weights = [graph.weight(op) for op in graph.ops if op.type in WEIGHTED and graph.weight(op)]
    assert {weight.type for weight in weights} == {"INT8"}
    assert all(len(weight.scales) > 1 for weight in weights)  # one for each channel


def test_fast_is_static_but_for_attention_softmax_norm_and_the_output(graph_of, kinds):
    graph = graph_of("int8", FAST)
    for kind in ("conv", "conv1x1", "linear", "depthwise", "activation", "elementwise"):
        assert uses_of_kind(graph, kinds, kind) == {"static"}
    for kind in ("attention", "softmax", "norm"):
        assert uses_of_kind(graph, kinds, kind) == {"float"}
    (output,) = graph.outputs
    assert graph.use(graph.makers[output]) == "dynamic"
    assert graph.tensors[output].type == graph.tensors[graph.inputs[0]].type == "FLOAT32"


@pytest.mark.parametrize("recipe", [ACCURATE, FAST, SMALL], ids=lambda recipe: recipe.name)
def test_a_named_recipe_stays_whole_in_xnnpack(quantized, recipe):
    assert takes_whole_graph(quantized("int8", recipe))


@pytest.mark.parametrize("precision", ["int8-weight", "int8-dynamic", "int4-weight"])
def test_a_precision_stays_whole_in_xnnpack(quantized, precision):
    assert takes_whole_graph(quantized(precision))


def test_static_everything_breaks_the_graph(quantized):
    assert count_partitions(quantized("int8", everything("static", name="all"))) > 20


def test_moves_follow_the_static_ops_beside_them(graph_of):
    """Reshapes, slices and padding between int8 ops are int8, and nothing is converted from int8 to int8."""
    graph = graph_of("int8", FAST)
    pads = [op for op in graph.ops if op.type == "PAD"]
    assert pads and all(graph.tensors[op.outputs[0]].type == "INT8" for op in pads)
    for op in graph.ops:
        if op.type == "QUANTIZE":
            assert graph.tensors[op.inputs[0]].type == "FLOAT32"
        if op.type == "CONCATENATION":
            assert len({graph.tensors[t].scales for t in (*op.inputs, *op.outputs)}) == 1


def test_what_a_concatenation_joins_has_one_range(tiny_artifact):
    graph = read_graph(read_artifact(tiny_artifact("tflite", form=PLAIN)).model_path)
    concatenation = next(op for op in graph.ops if op.type == "CONCATENATION")
    (first, second), (output,) = concatenation.inputs, concatenation.outputs
    ranges = {first: (-1.0, 2.0), second: (0.0, 5.0), output: (-1.0, 4.0), graph.inputs[0]: (0.0, 9.0)}
    shared = share_ranges([concatenation], graph, ranges)
    assert shared == {**dict.fromkeys((first, second, output), (-1.0, 5.0)), graph.inputs[0]: (0.0, 9.0)}


def test_an_excluded_module_stays_float(graph_of, kinds):
    graph = graph_of("int8", FAST.before(Rule("float", modules=r"stages\.3(\..*)?")))
    for kind in ("conv", "conv1x1", "linear", "depthwise", "activation", "elementwise"):
        assert uses_of_kind(graph, kinds, kind, r"stages\.3\..*") == {"float"}
        assert uses_of_kind(graph, kinds, kind, r"stages\.2\..*") == {"static"}


def test_a_rule_reaches_the_layer_that_makes_the_output(graph_of):
    graph = graph_of("int8", FAST.before(Rule("weight", ("linear",), "classifier")))
    assert graph.use(graph.makers[graph.outputs[0]]) == "weight"


def test_int16_has_activations_of_16_bits(graph_of, kinds):
    graph = graph_of("int16")
    for kind in ("conv", "conv1x1", "linear", "depthwise", "activation", "elementwise"):
        assert uses_of_kind(graph, kinds, kind) == {"static"}
    convolutions = [op for op in graph.ops if op.type == "CONV_2D"]
    assert {graph.tensors[op.outputs[0]].type for op in convolutions} == {"INT16"}
    assert {graph.weight(op).type for op in convolutions} == {"INT8"}


def test_int4_is_for_linear_layers(graph_of):
    graph = graph_of("int4-weight")
    for op in graph.ops:
        weight = graph.weight(op)
        if weight is not None:
            assert weight.type == ("INT4" if op.type == "FULLY_CONNECTED" else "INT8")


@pytest.mark.parametrize(
    ("precision", "raised"), [("int8-weight", False), ("int8-dynamic", True), ("int4-weight", True)]
)
def test_old_runtimes_are_told_that_they_lack_the_kernels(quantized, precision, raised):
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(quantized(precision)))
    versions = {flatbuffer_utils.opcode_to_name(model, i): code.version for i, code in enumerate(model.operatorCodes)}
    assert (versions["FULLY_CONNECTED"] >= PER_ROW) is raised


def test_equal_inputs_give_equal_files(quantized):
    assert quantized("int8", FAST).read_bytes() == quantized("int8", FAST).read_bytes()


def test_methods_of_calibration_give_different_ranges(graph_of):
    def scales(method: str) -> list[tuple[float, ...]]:
        graph = graph_of("int8", ACCURATE, method)
        return [graph.tensors[op.outputs[0]].scales for op in graph.ops if graph.use(op) == "static"]

    found = {method: scales(method) for method in METHODS}
    assert all(found[a] != found[b] for a, b in itertools.combinations(METHODS, 2))


@pytest.mark.parametrize(("kind", "use"), [("attention", "dynamic"), ("norm", "weight"), ("activation", "dynamic")])
def test_a_use_that_a_kind_cannot_have_is_refused(tiny_model, pictures, tmp_path, kind, use):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'[[rules]]\nkinds = ["linear", "{kind}"]\nuse = "{use}"\n')
    kinds = ("linear", kind)
    with pytest.raises(UsageError, match=f"'mine': {kind} cannot be '{use}' in TFLite, expected one of float, static"):
        export(tiny_model, to="tflite", precision="int8", recipe=recipe, calibration=pictures, out=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tflite"))
    check_recipe(Recipe("mine", (Rule("static", kinds), Rule("dynamic"))))  # for all kinds: for those that can


def test_an_op_that_the_quantizer_left_out_is_an_error(graph_of):
    graph = graph_of("int8-weight")
    op = next(op for op in graph.ops if op.type == "CONV_2D")
    with pytest.raises(ConversionError, match=r"left CONV_2D .* weight, expected static: leave it out of the recipe"):
        check_done(graph, graph, {op.index: "static"})


def test_export_verifies_and_keeps_what_is_in_the_file(tiny_model, pictures, tmp_path):
    (result,) = export(tiny_model, to="tflite", precision="int8", recipe="fast", calibration=pictures, out=tmp_path)
    assert result.parity.status == "pass", result.parity.reason
    artifact = result.artifact
    assert artifact.path.name == "tflite-int8-fast"
    assert artifact.manifest.quantization["recipe"]["name"] == "fast"
    session = open_tflite(artifact)
    outputs = session.run(np.zeros((1, 3, 64, 64), np.float32))
    assert outputs["logits"].dtype == np.float32 and outputs["logits"].shape == (1, 10)
    (report,) = inspect_path(artifact.path)
    assert report["details"]["static_operators"] > 200 and report["details"]["dynamic_operators"] == 1
    assert b"mvit_export_version" in artifact.model_path.read_bytes()
    (located,) = verify(artifact.path, find_layer=True)
    assert located.located is not None and located.located.module


def test_pictures_stay_pictures(quantized, tiny_artifact, tiny_model):
    """`--input image`: bytes go in, and the preprocessing before the first convolution stays float."""
    path = quantized("int8", FAST, "minmax", "image")
    graph = read_graph(path)
    assert graph.tensors[graph.inputs[0]].type == "UINT8"
    preprocessing = [
        op for op in graph.ops if "Normalise" in graph.name(op) and op.type not in ("QUANTIZE", "DEQUANTIZE")
    ]
    assert preprocessing and not [op for op in preprocessing if graph.use(op) == "static"]
    plain = read_artifact(tiny_artifact("tflite", "fp32", "image", form=PLAIN)).model_path
    assert count_partitions(path) == count_partitions(plain)


def passes(*arrays: np.ndarray) -> Callable[[], Iterator[dict[int, np.ndarray]]]:
    return lambda: iter([{0: array} for array in arrays])


def test_minmax_is_the_extremes_of_all_inputs_with_zero():
    arrays = np.array([1.0, 2.0]), np.array([0.5, 7.0])
    assert learn_ranges(passes(*arrays), "minmax") == {0: (0.0, 7.0)}
    assert learn_ranges(passes(*(-array for array in arrays)), "minmax") == {0: (-7.0, 0.0)}


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_one_outlier_does_not_set_the_range(method):
    values = np.random.default_rng(0).normal(size=200_000)
    values[0] = 40.0
    ((low, high),) = learn_ranges(passes(values[:1000], values[1000:]), method).values()
    assert 2.5 < high < 6
    assert -6 < low < -2.5


def test_percentile_cuts_the_share_that_it_says():
    counts = np.full(BINS, 1000)
    histogram = Histogram(-1.0, 1.0, counts)
    low, high = percentile(histogram)
    assert (low, high) == pytest.approx((-1, 1), abs=2 / BINS)
    counts[-1], counts[0] = 1, 1  # of two million, 2 are far fewer than one in ten thousand
    low, high = percentile(Histogram(-1.0, 1.0, counts))
    assert (low, high) == pytest.approx((-1 + 2 / BINS, 1 - 2 / BINS))


def test_entropy_prefers_the_range_that_loses_nothing():
    flat = Histogram(0.0, 1.0, np.full(BINS, 10))
    assert entropy(flat) == (0.0, 1.0)
    assert divergence(flat.counts, 0, BINS) == pytest.approx(0, abs=1e-12)
    assert divergence(flat.counts, 0, BINS // 2) > 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_range_is_learned_from_nan(bad):
    with pytest.raises(ConversionError, match="NaN or Inf"):
        learn_ranges(passes(np.array([1.0, bad])), "minmax")


def test_a_full_size_network_is_small_and_whole(cli, tmp_path):
    """MobileViT-XXS at 256x256, untrained: at most 0.30 of the bytes of fp32, and all of it in XNNPACK."""
    model = load_model("xxs")
    (plain,) = export(model, to="tflite", form=PLAIN, out=tmp_path, verify=False)
    common = ("--variant", "xxs", "--to", "tflite", "--no-verify", "--out", tmp_path)
    assert cli(*common, "--precision", "int8", "--recipe", "fast").code == 0
    files = {"fast": next(tmp_path.rglob("tflite-int8-fast/*.tflite"))}
    for precision in ("int8-weight", "int4-weight"):  # of the same fp32 file, as the converter does
        files[precision] = Path(shutil.copy(plain.artifact.model_path, tmp_path / f"{precision}.tflite"))
        target = Target("tflite", precision, "tensor")
        quantize_tflite.quantize(files[precision], Conversion(model, model.module, target))
    whole = plain.artifact.model_bytes
    assert [name for name, file in files.items() if file.stat().st_size >= 0.3 * whole] == []
    assert all(takes_whole_graph(path) for path in (plain.artifact.model_path, *files.values()))
    manifest = json.loads(next(tmp_path.rglob("tflite-int8-fast/manifest.json")).read_text())
    assert manifest["quantization"]["calibration"]["source"] == "seeded noise"
