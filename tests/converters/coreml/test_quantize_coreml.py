"""Core ML in fewer bits: which ops lose them, in the saved package; weights and palettes by hand; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, ROOT, TINY
from sklearn.datasets import load_digits
from torch import nn

from mvit_export import export, load_model, mil, verify
from mvit_export.artifact import read_artifact
from mvit_export.converters.coreml import quantize as quantize_coreml
from mvit_export.converters.coreml.quantize import Work, check_recipe, cluster, fit_int4, shrink_int4
from mvit_export.data.preprocessing import Preprocessing, to_tensor
from mvit_export.errors import ConversionError, UsageError
from mvit_export.formats.coreml import COREML
from mvit_export.formats.recipes import Recipe, Rule, everything, write_toml
from mvit_export.mil.listing import Operation, list_operations
from mvit_export.mil.package import read_package
from mvit_export.readers.coreml import open_mil

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
TRAINED = ROOT / "examples/digits_xxs.safetensors"
WEIGHTS = 52  # of the tiny network: 35 convolutions and 17 linears
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth random pictures, as ranges are learned from."""
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("calibration") / "pictures.npz"
    np.savez(path, images=coarse.repeat(8, axis=1).repeat(8, axis=2))
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the trained network knows."""
    grey = np.kron(load_digits().images[:16] * 15.9375, np.ones((8, 8))).astype(np.uint8)
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, images=np.repeat(grey[..., None], 3, axis=3))
    return path


@pytest.fixture(scope="module")
def make(tiny_model: Any, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make("int8", recipe="fast")` -> an artifact directory; made once for equal words."""
    made: dict[Any, Path] = {}

    def export_once(precision: str, **options: Any) -> Path:
        key = (precision, *sorted(options.items()))
        if key not in made:
            few = {} if precision in ("fp16", "fp32") else {"calibration": pictures}
            out = tmp_path_factory.mktemp("quantized")
            (result,) = export(tiny_model, to="coreml", precision=precision, out=out, **few, **options, verify=False)
            made[key] = result.artifact.path
        return made[key]

    return export_once


def operations(place: Path) -> list[Operation]:
    return list(list_operations(read_package(read_artifact(place).model_path)))


def maker(operation: Operation, parameter: str) -> str:
    """The type of the op that gives a value, "const" for a plain constant or an input."""
    operand = operation.input(parameter)
    return operand.maker.type if operand and operand.maker else "const"


def weighted(place: Path) -> list[Operation]:
    found = [operation for operation in operations(place) if operation.type in ("conv", "linear")]
    assert len(found) == WEIGHTS
    return found


def is_depthwise(operation: Operation) -> bool:
    return operation.type == "conv" and operation.constant("groups", 1) > 1


def products(place: Path) -> list[Operation]:
    """The two products of each attention."""
    found = [operation for operation in operations(place) if operation.type == "matmul"]
    assert len(found) == 8  # in 4 encoders
    return found


def blob(place: Path) -> Path:
    (file,) = read_artifact(place).model_path.rglob("weight.bin")
    return file


# What is in the package


@pytest.mark.parametrize(
    ("precision", "ios", "types"),
    [
        ("int8-weight", 16, {"constexpr_affine_dequantize"}),
        ("int4-weight", 18, {"constexpr_blockwise_shift_scale"}),
        ("palette8", 18, {"constexpr_blockwise_shift_scale"}),
        ("palette6", 18, {"constexpr_blockwise_shift_scale"}),
        ("palette4", 18, {"constexpr_blockwise_shift_scale"}),
    ],
)
def test_every_weight_loses_bits_and_no_activation(make: Make, precision: str, ios: int, types: set[str]) -> None:
    place = make(precision)
    for operation in weighted(place):
        small = np.prod(operation.input("weight").shape) < 512  # a table may take more than such a weight
        allowed = types | ({"const"} if precision.startswith("palette") and small else set())
        assert maker(operation, "weight") in allowed, operation.op
    assert not {"quantize", "dequantize"} & {operation.type for operation in operations(place)}
    assert read_artifact(place).manifest.target.deployment_target == f"iOS{ios}"


def test_palettes_are_tables_of_int8_with_scales(make: Make) -> None:
    """Of 16 values for most, of 256 for weights that are few and that everything passes through."""
    found = {16: 0, 256: 0}
    for operation in operations(make("palette4")):
        if operation.type == "constexpr_lut_to_dense":
            lut, indices = operation.input("lut"), operation.input("indices")
            entries = lut.shape[-2]
            assert (lut.dtype, lut.shape[-1], indices.dtype) == ("INT8", 1, {16: "UINT4", 256: "UINT8"}[entries])
            found[entries] += 1
    assert found[16] > 20 > found[256] > 3


@pytest.mark.parametrize("precision", ["int4-weight", "palette4"])
def test_4_bits_are_for_linear_layers_and_inner_dense_convolutions(make: Make, precision: str) -> None:
    for operation in weighted(make(precision)):
        shape = operation.input("weight").shape
        if (value := operation.input("weight")).maker is None:
            continue
        bits = {"INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8}[stored(value.maker)]
        dense = operation.type == "linear" or (not is_depthwise(operation) and shape[2:] == (3, 3) and shape[1] > 4)
        assert bits == (4 if dense else 8), (operation.op, shape)


def stored(maker: Any) -> str:
    """The type of the integers in a constexpr op."""
    if maker.type == "constexpr_affine_dequantize":
        return maker.input("quantized_data").dtype
    data = maker.input("data")
    return data.maker.input("indices").dtype if data.maker else data.dtype


def test_accurate_leaves_depthwise_and_attention_in_float(make: Make) -> None:
    place = make("int8")
    for operation in weighted(place):
        assert maker(operation, "weight") == "constexpr_affine_dequantize"
        assert (maker(operation, "x") == "dequantize") != is_depthwise(operation)
    assert all(maker(product, side) != "dequantize" for product in products(place) for side in "xy")


def test_fast_has_every_product_in_int8(make: Make) -> None:
    place = make("int8", recipe="fast")
    assert all(maker(operation, "x") == "dequantize" for operation in weighted(place))
    assert all(maker(product, side) == "dequantize" for product in products(place) for side in "xy")


def test_small_is_weights_alone(make: Make) -> None:
    assert not any(operation.type == "quantize" for operation in operations(make("int8", recipe="small")))


def test_ranges_are_shared_by_those_who_read_a_value(make: Make) -> None:
    found = operations(make("int8"))
    read = [operation.input("input").name for operation in found if operation.type == "quantize"]
    assert len(read) == len(set(read)) > 30


def test_a_module_that_a_recipe_leaves_out_stays_float(make: Make, tmp_path: Path) -> None:
    rules = (Rule("float", modules=r"stages\.4.*|classifier"), Rule("static", ("linear", "conv")), Rule("weight"))
    (tmp_path / "mine.toml").write_text(write_toml(Recipe("mine", rules)))
    kept = static = 0
    for operation in weighted(make("int8", recipe=tmp_path / "mine.toml")):
        module = operation.op.module or ""
        if module.startswith("stages.4") or module == "classifier":
            assert (maker(operation, "weight"), maker(operation, "x") == "dequantize") == ("const", False), module
            kept += 1
        else:
            assert maker(operation, "weight") == "constexpr_affine_dequantize", module
            dense = operation.type == "linear" or operation.input("weight").shape[2:] == (3, 3)
            assert (maker(operation, "x") == "dequantize") == (dense and not is_depthwise(operation)), module
            static += maker(operation, "x") == "dequantize"
    assert kept > 5 and static > 5


@pytest.mark.parametrize("precision", ["int8-weight", "palette8", "palette6"])
def test_few_bits_pass_on_pictures_like_their_calibration(make: Make, precision: str) -> None:
    (verdict,) = verify(make(precision))
    assert (verdict.status, verdict.runtime) == ("pass", "mil-reference"), verdict.reason
    assert verdict.metrics.psnr_db < 70, "bits were lost"


@pytest.mark.parametrize("precision", ["int8", "int4-weight", "palette4"])
def test_fewer_bits_pass_on_a_trained_network(tmp_path: Path, digits: Path, precision: str) -> None:
    """Random weights give nearly one answer to all pictures, which eight bits of noise then drown."""
    model = load_model(weights=TRAINED)
    (result,) = export(model, to="coreml", precision=precision, calibration=digits, out=tmp_path)
    assert result.parity.status == "pass", result.parity.reason
    assert result.parity.metrics.of_task["top1_agreement"] == 1.0


def test_weights_take_the_bytes_that_they_should(make: Make) -> None:
    full = blob(make("fp32")).stat().st_size
    shares = {
        p: blob(make(p)).stat().st_size / full for p in ("fp16", "int8-weight", "int8", "palette6", "int4-weight")
    }
    assert shares["int4-weight"] < shares["palette6"] < shares["int8-weight"] < 0.75 * shares["fp16"]
    assert shares["int8"] == pytest.approx(shares["int8-weight"], rel=0.1)


def test_xxs_in_int8_takes_less_than_a_third_of_its_bytes(tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "int8"):
        (result,) = export(load_model("xxs"), to="coreml", precision=precision, out=tmp_path, verify=False)
        found[precision] = result.artifact.model_bytes
    assert found["int8"] <= 0.30 * found["fp32"]


def test_no_small_constant_stands_twice(make: Make) -> None:
    """Hundreds of them, such as axes and types, take a tenth of a small network in int8."""
    main = read_package(read_artifact(make("int8")).model_path).spec.mlProgram.functions["main"]
    (block,) = main.block_specializations.values()
    constants = [op for op in block.operations if op.type == "const"]
    values = [op.attributes["val"] for op in constants]
    immediate = [value.SerializeToString() for value in values if value.HasField("immediateValue")]
    assert len(immediate) > 50
    assert len(set(immediate)) == len(immediate)


def test_a_package_holds_what_core_ml_reads_and_nothing_else(make: Make) -> None:
    package = read_artifact(make("int8")).model_path
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    data = "Data/com.apple.CoreML"
    assert files == {"Manifest.json", f"{data}/model.mlmodel", f"{data}/weights/weight.bin"}


def test_equal_input_gives_equal_weights_and_ranges(
    make: Make, tiny_model: Any, pictures: Path, tmp_path: Path
) -> None:
    for precision in ("int8", "palette4"):
        (again,) = export(
            tiny_model, to="coreml", precision=precision, calibration=pictures, out=tmp_path, verify=False
        )
        first = make(precision)
        assert blob(again.artifact.path).read_bytes() == blob(first).read_bytes()
        scales = [
            [op.constant("scale", None) for op in operations(place) if op.type == "quantize"]
            for place in (first, again.artifact.path)
        ]
        assert scales[0] == scales[1]


def test_methods_of_calibration_give_other_ranges(make: Make) -> None:
    found = {}
    for method in ("minmax", "percentile", "entropy"):
        place = make("int8", calibration_method=method)
        found[method] = sum(op.constant("scale", None) for op in operations(place) if op.type == "quantize")
    assert found["entropy"] < found["minmax"] and found["percentile"] < found["minmax"]
    assert found["entropy"] != found["percentile"]


def test_the_largest_value_of_the_calibration_is_held(make: Make, tiny_model: Any, pictures: Path) -> None:
    """minmax: int8's 127 stands for the largest value of the input, which the first convolution reads."""
    with np.load(pictures) as file:
        largest = np.abs(to_tensor(file["images"], tiny_model.preprocessing)).max()
    first = next(operation for operation in operations(make("int8")) if operation.type == "quantize")
    assert first.constant("scale", None) == pytest.approx(largest / 127, rel=1e-3)


def test_an_image_classifier_keeps_its_interface(tmp_path: Path, pictures: Path) -> None:
    """coremltools' own compression cannot write a classifier with a second output."""
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    model = load_model(model=TINY, labels=tmp_path / "labels.txt")
    (result,) = export(model, to="coreml", precision="int8", input="image", calibration=pictures, out=tmp_path)
    assert open_mil(result.artifact).labels == LABELS
    assert result.parity.status == "pass", result.parity.reason
    assert result.parity.metrics.psnr_db > 25


def test_several_sizes_share_the_ranges_of_the_first(tmp_path: Path, pictures: Path) -> None:
    model = load_model(model=TINY, image_size=[64, 96])
    (result,) = export(model, to="coreml", precision="int8", calibration=pictures, out=tmp_path)
    assert result.parity.status == "pass", result.parity.reason
    program = mil.load(result.artifact.model_path)
    for size in (64, 96):
        assert program(image=np.zeros((1, 3, size, size), np.float32))["logits"].shape == (1, 10)


# Other networks


class Others(nn.Module):
    """A transposed convolution, a grouped one, and products with a constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose2d(3, 8, 2, stride=2)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.table = nn.Parameter(torch.randn(16, 12) * torch.logspace(-2, 1, 12))
        self.preprocessing = Preprocessing("RGB", crop=(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.grouped(self.up(x)).mean((2, 3)) @ self.table


@pytest.mark.parametrize("precision", ["int8-weight", "int4-weight", "palette6"])
def test_other_ops_keep_their_output_channels_apart(precision: str, tmp_path: Path) -> None:
    """The columns of the table differ by a factor of 1000: with a scale for each none of them is lost."""
    network = Others().eval()
    (tmp_path / "others.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_quantize_coreml import Others\n"
    )
    model = load_model(model=f"{tmp_path / 'others.py'}:Others", input_shape=(1, 3, 8, 8))
    options = {"deployment_target": "iOS18"}
    (result,) = export(model, to="coreml", precision=precision, out=tmp_path, verify=False, **options)
    x = np.random.default_rng(1).random((1, 3, 8, 8), np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
        size = network.grouped(network.up(torch.from_numpy(x))).mean((2, 3)).norm() * network.table.norm(dim=0)
    (found,) = mil.load(result.artifact.model_path)(image=x).values()
    assert (np.abs(found - expected) / size.numpy()).max() < (0.1 if precision == "int4-weight" else 0.03)
    found_types = {
        op.type: maker(op, "y" if op.type == "matmul" else "weight") for op in operations(result.artifact.path)
    }
    few = found_types["conv_transpose"], found_types["conv"], found_types.get("matmul") or found_types["linear"]
    assert precision == "palette6" or set(few) == {"constexpr_blockwise_shift_scale"}


# Weights and palettes by hand


def test_four_bits_lose_least_with_a_scale_that_cuts() -> None:
    weight = np.random.default_rng(0).normal(size=(100, 32)).astype(np.float16)
    values, scale = fit_int4(weight, (1,))
    plain = np.abs(weight.astype(np.float32)).max(axis=1, keepdims=True) / 7
    rounded = np.clip(np.round(weight / plain), -8, 7) * plain
    assert ((values * scale - weight) ** 2).sum() < 0.85 * ((rounded - weight) ** 2).sum()
    assert set(np.unique(values)) <= set(range(-8, 8))


@pytest.mark.parametrize(("channels", "blocks"), [(64, 2), (80, 4), (24, 1), (37, 1), (7, 1)])
def test_a_scale_is_shared_by_a_block_of_input_channels(channels: int, blocks: int) -> None:
    weight = RNG.normal(size=(5, channels, 3, 3)).astype(np.float16)
    constant = shrink_int4(weight, Work("w", "conv", "weight", {}, "weight"), True)
    assert constant.arguments["scale"].shape == (5, blocks, 1, 1)
    assert constant.arguments["data"].shape == weight.shape


def test_a_palette_of_few_values_is_exact() -> None:
    weight = RNG.choice(np.array([-2.0, -0.5, 0.25, 3.0]), (20, 30))
    table, indices = cluster(weight, 16)
    np.testing.assert_allclose(table[indices], weight)


def test_a_palette_is_where_the_weights_are() -> None:
    """Two clouds, two values: their means."""
    weight = np.concatenate([RNG.normal(-1, 0.1, 500), RNG.normal(2, 0.1, 100)])
    table, indices = cluster(weight, 2)
    assert table == pytest.approx([weight[:500].mean(), weight[500:].mean()])
    assert indices.tolist() == [0] * 500 + [1] * 100


def test_a_palette_is_left_out_where_its_table_outweighs_it() -> None:
    work = Work("w", "conv", "weight", {}, "weight")
    few = RNG.normal(size=(8, 8, 3, 3)).astype(np.float16)
    first = RNG.normal(size=(8, 3, 3, 3)).astype(np.float16)  # which keeps 8 bits
    assert quantize_coreml.palettize(8)(few[:3], work, True) is None
    assert quantize_coreml.palettize(4)(few, work, True) is not None
    assert quantize_coreml.palettize(4)(first, work, True) is None


# What is refused


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((Rule("static", ("softmax",)),), "recipe mine: Core ML has no static softmax, expected one of float"),
        ((Rule("dynamic", ("linear",)),), "Core ML has no dynamic linear, expected one of float, weight, static"),
        ((Rule("dynamic"),), "recipe mine: Core ML has no dynamic, expected one of float, weight, static"),
        ((Rule("weight", ("attention",)),), "Core ML has no weight attention, expected one of float, static"),
    ],
)
def test_what_core_ml_cannot_do_is_refused(rules: tuple[Rule, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_recipe(Recipe("mine", rules))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["accurate", "fast", "small"])
def test_named_recipes_are_possible(name: str) -> None:
    recipe = COREML.recipes[name]
    check_recipe(Recipe("copy", recipe.rules))


def test_a_rule_without_kinds_speaks_of_all_that_can() -> None:
    check_recipe(everything("static", name="mine"))
    check_recipe(everything("weight", name="mine"))


def test_a_recipe_that_changes_nothing_is_refused(tiny_model: Any, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "none.toml").write_text(write_toml(Recipe("none", (Rule("static", modules="no such module"),))))
    with pytest.raises(ConversionError, match="recipe none asks for no part that this model has"):
        export(
            tiny_model, to="coreml", precision="int8", calibration=pictures, recipe=tmp_path / "none.toml", out=tmp_path
        )
    assert not list(tmp_path.rglob("*.mlpackage"))


@pytest.mark.parametrize(("skipped", "words"), [("rewrite", "the weight of"), ("make_pair", "the input of")])
def test_what_is_left_as_it_was_is_an_error(
    tiny_model: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: str, words: str
) -> None:
    monkeypatch.setattr(quantize_coreml, skipped, lambda *given: given[2] if skipped == "make_pair" else None)
    with pytest.raises(ConversionError, match=f"coremltools left {words} .* as it was"):
        export(tiny_model, to="coreml", precision="int8", calibration=pictures, out=tmp_path)
    assert not list(tmp_path.rglob("*.mlpackage"))
