"""The Neural Engine lint: each rule broken alone, MACs counted by hand, shares, and what `inspect` prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function
from coremltools.converters.mil.mil import Program as MilProgram
from coremltools.converters.mil.mil import types as mt
from mil_build import save_program
from mil_models import capture, convert, mobilevit, photo, saved

from mvit_export.errors import ArtifactError
from mvit_export.mil.lint import Lint, lint_package
from mvit_export.mil.rules import RULES
from mvit_export.readers.inspect import describe, inspect_path

Cli = Callable[..., Any]
iOS17, iOS18 = ct.target.iOS17, ct.target.iOS18


def half(*shape: int) -> np.ndarray:
    return np.linspace(-1, 1, int(np.prod(shape))).astype(np.float16).reshape(shape)


def lint_of(build: Callable[..., Any], path: Path, *shapes: tuple[int, ...], target: Any = iOS17) -> Lint:
    """Of a program with fp16 inputs x, y, ..., of these shapes."""
    inputs = {name: half(*shape) for name, shape in zip("xyz", shapes, strict=False)}
    return lint_package(save_program(build, inputs, path / "m.mlpackage", target))


X = (1, 8, 4, 32)  # last axis of 64 bytes


def conv(x: Any, *kernel: int, **options: Any) -> Any:
    return mb.conv(x=x, weight=half(8, x.shape[1], *kernel), **options)


def written_out_norm(x: Any, root: str) -> Any:
    centred = mb.sub(x=x, y=mb.reduce_mean(x=x, axes=[1], keep_dims=True))
    variance = mb.reduce_mean(x=mb.square(x=centred), axes=[1], keep_dims=True)
    if root == "rsqrt":
        return mb.mul(x=centred, y=mb.rsqrt(x=variance, epsilon=np.float16(1e-3)))
    shifted = mb.add(x=np.float16(1e-3), y=variance)
    if root == "sqrt":
        return mb.real_div(x=centred, y=mb.sqrt(x=shifted))
    return mb.mul(x=centred, y=mb.pow(x=shifted, y=np.float16(-0.5)))


def quantized(x: Any) -> Any:
    return mb.dequantize(input=mb.quantize(input=x, scale=np.float16(0.1), output_dtype="int8"), scale=np.float16(0.1))


@dataclass(frozen=True)
class Case:
    rules: tuple[str, ...]
    build: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...] = (X,)
    target: Any = iOS17


def case(rules: str, build: Callable[..., Any], *shapes: tuple[int, ...], target: Any = iOS17) -> Case:
    return Case(tuple(rules.split()), build, shapes or (X,), target)


INDEX = np.array([0, 1], np.int16)
WIDE = (1, 8, 64, 64)
CASES = {
    # clean, at each rule's limit
    "conv": case("", lambda x: conv(x, 1, 1)),
    "rank 5": case("", lambda x: mb.relu(x=x), (1, 2, 2, 2, 32)),
    "largest dimension": case("", lambda x: mb.relu(x=x), (1, 1, 1, 16384)),
    "kernel 16": case("", lambda x: conv(x, 16, 16, pad_type="same"), WIDE),
    "pool 13 by 2": case("", lambda x: mb.max_pool(x=x, kernel_sizes=[13, 13], strides=[2, 2], pad_type="same"), WIDE),
    "upsample 2": case("", lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=2)),
    "matmul": case("", lambda x, y: mb.matmul(x=x, y=y), (1, 2, 32, 32), (1, 2, 32, 32)),
    "reshape of outer axes": case("", lambda x: mb.reshape(x=x, shape=[1, 32, 1, 32])),
    "transpose of outer axes": case("", lambda x: mb.transpose(x=x, perm=[0, 2, 1, 3])),
    "softmax over channels": case("", lambda x: mb.softmax(x=x, axis=1)),
    "softmax over channels, from the end": case("", lambda x: mb.softmax(x=x, axis=-3)),
    "layer_norm": case("", lambda x: mb.layer_norm(x=x, axes=[1], gamma=half(8), beta=half(8))),
    "root of a plain mean": case("", lambda x: mb.sqrt(x=mb.reduce_mean(x=x, axes=[1], keep_dims=True))),
    "axes and masks are no tensors": case("", lambda x: mb.slice_by_index(x=x, begin=[0, 0, 0, 0], end=[1, 2, 2, 32])),
    # each rule alone
    "dimension": case("dimension", lambda x: mb.relu(x=x), (1, 1, 1, 16385)),
    "dimension of a weight": case(
        "dimension linear", lambda x: mb.linear(x=x, weight=half(32, 16390)), (1, 16390)
    ),
    "gather": case("gather-scatter", lambda x: mb.gather(x=x, indices=INDEX, axis=1)),
    "gather_along_axis": case(
        "gather-scatter", lambda x: mb.gather_along_axis(x=x, indices=np.zeros(X, np.int16), axis=1)
    ),
    "scatter_nd": case(
        "gather-scatter", lambda x: mb.scatter_nd(data=x, indices=np.zeros((1, 1), np.int32), updates=half(*X))
    ),
    "kernel 17": case("conv-kernel", lambda x: conv(x, 17, 1, pad_type="same"), WIDE),
    "kernel 17 transposed": case("conv-kernel", lambda x: mb.conv_transpose(x=x, weight=half(8, 2, 1, 17)), WIDE),
    "pool 14": case("pool-kernel", lambda x: mb.avg_pool(x=x, kernel_sizes=[1, 14], strides=[1, 1], pad_type="same")),
    "stride 4": case("pool-stride", lambda x: mb.max_pool(x=x, kernel_sizes=[2, 2], strides=[4, 1], pad_type="same")),
    "upsample 3": case("upsample", lambda x: mb.upsample_bilinear(x=x, scale_factor_height=3.0)),
    "resize 3": case(
        "upsample", lambda x: mb.resize_bilinear(x=x, target_size_height=12, target_size_width=32)
    ),
    "singleton": case("singleton-last-axis", lambda x: mb.relu(x=x), (1, 32, 8, 1)),
    "narrow": case("narrow-last-axis", lambda x: mb.relu(x=x), (1, 32, 8, 31)),
    "narrow in int8": case("narrow-last-axis", quantized),
    "linear": case("linear", lambda x: mb.linear(x=x, weight=half(64, 32)), (1, 4, 32)),
    "matmul by a weight": case("linear", lambda x: mb.matmul(x=x, y=half(32, 32))),
    "reshape": case("innermost-axis", lambda x: mb.reshape(x=x, shape=[1, 8, 2, 64])),
    "squeeze": case("innermost-axis singleton-last-axis", lambda x: mb.squeeze(x=x, axes=[-1]), (1, 8, 32, 1)),
    "transpose": case("innermost-axis", lambda x: mb.transpose(x=x, perm=[0, 1, -1, 2]), (1, 8, 32, 32)),
    "norm by rsqrt": case("split-norm", lambda x: written_out_norm(x, "rsqrt")),
    "norm by sqrt": case("split-norm", lambda x: written_out_norm(x, "sqrt")),
    "norm by pow": case("split-norm", lambda x: written_out_norm(x, "pow")),
    "softmax": case("softmax-axis", lambda x: mb.softmax(x=x, axis=-1)),
    "attention": case(
        "softmax-axis", lambda x: mb.scaled_dot_product_attention(query=x, key=x, value=x), target=iOS18
    ),
    "dilation": case("dilation", lambda x: conv(x, 3, 3, dilations=[1, 2], pad_type="same")),
    "tile": case("tile", lambda x: mb.tile(x=x, reps=[1, 1, 2, 1])),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_breaks_exactly(name: str, tmp_path: Path) -> None:
    this = CASES[name]
    lint = lint_of(this.build, tmp_path, *this.shapes, target=this.target)
    assert {rule.id for rule, _ in lint.rules} == set(this.rules)
    blocks = any(rule.severity == "blocks" for rule, _ in lint.rules)
    assert any(not finding.eligible for finding in lint.findings) == blocks


def test_every_rule_is_tested_and_sourced() -> None:
    cases = {rule for this in CASES.values() for rule in this.rules}
    assert {rule.id for rule in RULES} == cases | {"dtype", "rank", "dynamic-shape"}, "these are tested below"
    assert len({rule.id for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.text and "/" in rule.source and rule.severity in ("blocks", "slows")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_other_dtypes_break_one_rule(dtype: type, tmp_path: Path) -> None:
    package = save_program(lambda x: mb.add(x=x, y=x), {"x": np.ones(X, dtype)}, tmp_path / "m.mlpackage")
    assert [rule.id for rule, _ in lint_package(package).rules] == ["dtype"]


def test_cast_from_fp32_is_not_eligible_but_what_follows_is(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        return conv(mb.cast(x=x, dtype="fp16"), 1, 1)

    lint = lint_package(save_program(build, {"x": np.ones(X, np.float32)}, tmp_path / "m.mlpackage"))
    assert [finding.eligible for finding in lint.findings] == [False, True]
    assert lint.eligible_mac_share == 1


def test_fp32_weights_alone_break_the_rule(tmp_path: Path) -> None:
    lint = lint_of(lambda x: mb.cast(x=mb.const(val=np.ones(X, np.float32)), dtype="fp16"), tmp_path, X)
    assert [rule.id for rule, _ in lint.rules] == ["dtype"]


def change_last(package: Path, change: Callable[[Any], object]) -> Path:
    """`change` the last operation of each function in the saved specification."""
    (file,) = package.rglob("*.mlmodel")
    spec = ct.utils.load_spec(str(file))
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            change(block.operations[-1])
    file.write_bytes(spec.SerializeToString())
    return package


def test_rank_6(tmp_path: Path) -> None:
    """coremltools refuses to write one, so the rank is declared afterwards."""

    def more(operation: Any) -> None:
        operation.outputs[0].type.tensorType.dimensions.insert(0, operation.outputs[0].type.tensorType.dimensions[0])

    package = save_program(lambda x: mb.relu(x=x), {"x": half(1, 2, 2, 2, 32)}, tmp_path / "m.mlpackage")
    lint = lint_package(change_last(package, more))
    assert [rule.id for rule, _ in lint.rules] == ["rank"]
    assert not lint.findings[0].eligible


def flexible(build: Callable[..., Any], path: Path) -> Path:
    """fp16 input x of (1, 8, 4, any)."""
    size = mb.placeholder((1, 8, ct.converters.mil.mil.get_new_symbol(), 32), dtype=mt.fp16)
    with Function({"x": size}, opset_version=iOS17) as function:
        function.set_outputs([build(function.inputs["x"])])
    program = MilProgram()
    program.add_function("main", function)
    model = ct.convert(
        program, source="milinternal", convert_to="mlprogram", minimum_deployment_target=iOS17, skip_model_load=True,
        inputs=[ct.TensorType("x", (1, 8, ct.RangeDim(4, 16), 32))], pass_pipeline=ct.PassPipeline.EMPTY,
    )  # fmt: skip
    model.save(str(path))
    return path


def test_flexible_shapes_are_not_eligible_and_leave_macs_open(tmp_path: Path) -> None:
    package = flexible(lambda x: conv(x, 1, 1), tmp_path / "m.mlpackage")
    lint = lint_package(package)
    assert "dynamic-shape" in {rule.id for rule, _ in lint.rules}
    assert (lint.macs, lint.eligible_mac_share) == (None, None)
    lines = list(describe(inspect_path(package)[0], verbose=True))
    assert any(line.startswith("  eligible    unknown, sizes are flexible") for line in lines)
    assert any("MACs unknown, not eligible: dynamic-shape" in line for line in lines)


MACS = {
    "conv": (lambda x: conv(x, 3, 5, strides=[2, 2], pad_type="same"), (X,), 8 * 2 * 16 * 8 * 15),
    "grouped": (lambda x: mb.conv(x=x, weight=half(12, 2, 3, 3), groups=4), (X,), 12 * 2 * 30 * 2 * 9),
    "conv1d": (lambda x: mb.conv(x=x, weight=half(6, 8, 3)), ((2, 8, 10),), 2 * 6 * 8 * 8 * 3),
    "transposed": (
        lambda x: mb.conv_transpose(x=x, weight=half(8, 3, 2, 2), strides=[2, 2], groups=2), (X,), 8 * 4 * 32 * 3 * 4,
    ),
    "linear": (lambda x: mb.linear(x=x, weight=half(5, 32)), ((2, 3, 32),), 2 * 3 * 32 * 5),
    "matmul": (lambda x, y: mb.matmul(x=x, y=y), ((2, 3, 5, 7), (2, 3, 7, 4)), 6 * 5 * 7 * 4),
    "matmul of a transposed": (
        lambda x, y: mb.matmul(x=x, y=y, transpose_x=True), ((2, 7, 5), (2, 7, 4)), 2 * 5 * 7 * 4,
    ),
    "matmul with broadcast": (lambda x, y: mb.matmul(x=x, y=y), ((2, 3, 5, 7), (7, 4)), 6 * 5 * 7 * 4),
    "einsum": (
        lambda x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"), ((1, 4, 2, 5), (1, 5, 2, 6)), 4 * 2 * 5 * 6,
    ),
    "attention": (
        lambda x, y, z: mb.scaled_dot_product_attention(query=x, key=y, value=z),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)), 6 * 5 * 7 * (8 + 4),
    ),
    "elementwise": (lambda x: mb.silu(x=x), (X,), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", MACS)
def test_macs_by_hand(name: str, tmp_path: Path) -> None:
    build, shapes, expected = MACS[name]
    lint = lint_of(build, tmp_path, *shapes, target=iOS18)
    assert lint.macs == expected
    assert lint.eligible_mac_share == (1 if expected else None)


def test_share_counts_macs_not_ops(tmp_path: Path) -> None:
    def build(x: Any) -> Any:  # 8 * 8 * 128 MACs eligible, 17 times as many that are not
        return conv(conv(x, 1, 1), 1, 17, pad_type="same")

    assert lint_of(build, tmp_path, X).eligible_mac_share == pytest.approx(1 / 18)


def test_compressed_weights_are_no_ops(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        data, scale = np.ones((8, 8, 1, 1), np.int8), np.float16(0.1)
        weight = mb.constexpr_affine_dequantize(
            quantized_data=data, scale=scale, zero_point=np.int8(0), axis=np.int32(0)
        )
        return mb.conv(x=x, weight=weight)

    lint = lint_of(build, tmp_path, X)
    assert [finding.op.type for finding in lint.findings] == ["conv"]
    assert (lint.macs, lint.rules) == (8 * 8 * 128, ())


@pytest.mark.parametrize("nested", [False, True])
def test_nested_blocks_are_read(nested: bool, tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        if not nested:
            return conv(x, 1, 1)
        positive = mb.greater(x=mb.reduce_sum(x=x, axes=[0, 1, 2, 3]), y=np.float16(0))
        return mb.cond(pred=positive, _true_fn=lambda: conv(x, 1, 1), _false_fn=lambda: mb.relu(x=x))

    assert lint_of(build, tmp_path, X).macs == 8 * 8 * 128


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_tiny_model(precision: str, tiny_artifact: Callable[..., Path], tiny_model: Any) -> None:
    (report,) = inspect_path(tiny_artifact("coreml", precision))
    lint = report["lint"]
    assert lint["macs"] == tiny_model.info.macs == report["model"]["macs"]
    assert lint["eligible_mac_share"] == (1 if precision == "fp16" else 0)
    assert sum(op["macs"] for op in lint["ops"]) == lint["macs"]
    assert len(lint["ops"]) == report["operator_count"]
    for rule in lint["rules"]:
        assert rule["count"] == sum(rule["id"] in op["broken"] for op in lint["ops"])
    modules = {op["module"] for op in lint["ops"] if "linear" in op["broken"]}
    assert "classifier" in modules or any(module and "attention" in module for module in modules)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "millions"), [("xxs", 407.364096), ("xs", 1025.9), ("s", 2000.8)])
def test_mobilevit_macs(variant: str, millions: float, tmp_path: Path) -> None:
    lint = lint_package(saved(convert(capture(mobilevit(variant), photo()), "fp16"), tmp_path))
    assert lint.macs is not None
    assert lint.macs / 1e6 == pytest.approx(millions, abs=1e-9 if variant == "xxs" else 0.05)
    assert lint.eligible_mac_share == 1


# The command line


def test_text(cli: Cli, tiny_artifact: Callable[..., Path]) -> None:
    done = cli("inspect", tiny_artifact("coreml", "fp16"))
    lines = done.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  operators "))
    assert lines[start + 1] == "  eligible    100.0 % of 2.0M MACs (Neural Engine lint; device, system and size decide)"
    rules = lines[start + 2 :]
    assert [line.split()[0] for line in rules] == sorted(line.split()[0] for line in rules), "blocking ones first"
    for line in rules:
        assert re.fullmatch(
            r"  (blocks|slows )      [\w-]+, \d+ ops?, e\.g\. \w+ \w+( \([\w.]+\))?: .+ \[.+/.+\]", line
        )
    assert "dtype, 2 ops, e.g. cast image_to_fp16" in rules[0]
    for text in (done.out, *(rule.text for rule in RULES)):
        assert "runs on" not in text.lower()


def test_verbose_lists_every_op(cli: Cli, tiny_artifact: Callable[..., Path]) -> None:
    place = tiny_artifact("coreml", "fp32")
    (report,) = cli("inspect", place, "--json").json["artifacts"]
    done = cli("inspect", place, "-v")
    ops = [line for line in done.out.splitlines() if line.startswith("  op ")]
    assert len(ops) == len(report["lint"]["ops"])
    assert all("MACs, not eligible: dtype" in line for line in ops)
    assert "runs on" not in done.out.lower()


def test_json(cli: Cli, tiny_artifact: Callable[..., Path]) -> None:
    (report,) = cli("inspect", tiny_artifact("coreml", "fp16"), "--json").json["artifacts"]
    lint = report["lint"]
    assert list(lint) == ["eligible_mac_share", "macs", "rules", "ops"]
    assert all(list(rule) == ["id", "severity", "text", "source", "count"] for rule in lint["rules"])
    assert all(list(op) == ["op", "type", "module", "macs", "broken", "eligible"] for op in lint["ops"])


def test_other_formats_have_no_lint(tiny_artifact: Callable[..., Path]) -> None:
    (report,) = inspect_path(tiny_artifact("onnx"))
    assert "lint" not in report
    assert not any("eligible" in line for line in describe(report))


def test_bare_package(cli: Cli, tmp_path: Path) -> None:
    package = save_program(lambda x: conv(x, 1, 1), {"x": half(*X)}, tmp_path / "some.mlpackage")
    done = cli("inspect", "some.mlpackage", "--json", cwd=tmp_path)
    (report,) = done.json["artifacts"]
    assert list(report) == ["path", "format", "bytes", "details", "operator_count", "operators", "lint"]
    assert report["operators"] == {"conv": 1}
    assert report["bytes"] == sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
    text = list(describe(report))
    assert [line.split()[0] for line in text] == ["some.mlpackage", "file", "operators", "eligible"]


def test_model_inside_an_artifact_is_the_artifact(tiny_artifact: Callable[..., Path]) -> None:
    (report,) = inspect_path(tiny_artifact("coreml") / "tiny.mlpackage")
    assert report["path"] == str(tiny_artifact("coreml"))
    assert report["model"]["name"] == "tiny"


def test_damaged_bare_package_is_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "some.mlpackage").mkdir()
    done = cli("inspect", tmp_path / "some.mlpackage")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "is not a .mlpackage: it has no Manifest.json" in done.err


def test_undefined_name_is_an_error(tmp_path: Path) -> None:
    package = save_program(lambda x: mb.relu(x=x), {"x": half(*X)}, tmp_path / "m.mlpackage")

    def rename(operation: Any) -> None:
        operation.inputs["x"].arguments[0].name = "nobody"

    change_last(package, rename)
    with pytest.raises(ArtifactError, match="refers to 'nobody', which nothing has defined"):
        lint_package(package)


def test_torch_norm_stays_whole(tmp_path: Path) -> None:
    """What coremltools makes of nn.LayerNorm is one op."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(32)).eval()
    lint = lint_package(saved(convert(capture(model, torch.ones(1, 4, 32)), "fp16"), tmp_path))
    assert "layer_norm" in {finding.op.type for finding in lint.findings}
    assert "split-norm" not in {rule.id for rule, _ in lint.rules}
