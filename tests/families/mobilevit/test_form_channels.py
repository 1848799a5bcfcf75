"""The form `channels`: the same function, within what the Neural Engine and GPU delegates ask of a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY
from helpers import randomize
from tiny import CONFIG

from mvit_export import export, load_model, verify
from mvit_export.artifact import read_artifact
from mvit_export.errors import UsageError
from mvit_export.families.mobilevit.forms import take_form
from mvit_export.families.mobilevit.forms.algebra import (
    SHIFT,
    CarryingNorm,
    carry_biases,
    fold_norm_affine,
    move_value_bias,
)
from mvit_export.families.mobilevit.forms.blocks import OpenBlock
from mvit_export.families.mobilevit.network import MobileViT, MobileViTBlock
from mvit_export.formats.table import FORMATS
from mvit_export.formats.targets import plan_targets
from mvit_export.mil.lint import lint
from mvit_export.mil.listing import Operation, list_operations
from mvit_export.mil.package import read_package
from mvit_export.models.fold import fold_batch_norms
from mvit_export.readers.tflite_graph import Graph, read_graph

pytestmark = pytest.mark.slow

Exported = Callable[..., Path]
Shape = tuple[int | None, ...]
ENCODERS, NORMS, BLOCKS = 4, 11, 3
TINY_SIZE = 64
PSNR_DB = {"fp32": 100, "fp16": 50}
# What TensorFlow's tools/versioning/gpu_compatibility.cc lets a GPU delegate take, of the ops that occur here.
GPU_OPS = {
    "ADD", "BATCH_MATMUL", "CONCATENATION", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "LOGISTIC", "MEAN",
    "MUL", "PAD", "RESHAPE", "RESIZE_BILINEAR", "RSQRT", "SLICE", "SOFTMAX", "TRANSPOSE", "TRANSPOSE_CONV",
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tiny_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`exported("coreml", "channels", size=80)` -> the tiny network's artifact, unverified, made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(fmt: str, form: str, *, precision: str = "fp32", size: int = TINY_SIZE) -> Path:
        if size == TINY_SIZE:
            return tiny_artifact(fmt, precision, form=form)
        key = (fmt, form, precision, size)
        if key not in made:
            model, out = load_model(model=TINY, image_size=size), tmp_path_factory.mktemp(fmt)
            (result,) = export(model, to=fmt, form=form, precision=precision, out=out, verify=False)
            made[key] = result.artifact.path
        return made[key]

    return make


def mil_operations(artifact: Path) -> list[Operation]:
    return list_operations(read_package(read_artifact(artifact).model_path))


def tflite_graph(artifact: Path) -> Graph:
    return read_graph(read_artifact(artifact).model_path)


def onnx_shapes(artifact: Path) -> list[Shape]:
    graph = onnx.shape_inference.infer_shapes(onnx.load(read_artifact(artifact).model_path)).graph
    return [tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.value_info)]


def activation_shapes(artifact: Path) -> list[Shape]:
    """Of all that is computed, and of the input."""
    fmt = read_artifact(artifact).manifest.format
    if fmt == "onnx":
        return onnx_shapes(artifact)
    if fmt == "coreml":
        return [x.shape for op in mil_operations(artifact) for x in op.activations]
    graph = tflite_graph(artifact)
    return [graph.tensors[t].shape for op in graph.ops for t in (*graph.activations(op), *op.outputs)]


# The same function


@pytest.mark.parametrize("fmt", ["coreml", "tflite"])
@pytest.mark.parametrize("patch_config", ["A", "B"])
@pytest.mark.parametrize(("batch", "size"), [(1, (64, 64)), (3, (64, 128)), (2, (56, 72))])
@torch.no_grad()
def test_channels_is_the_network(fmt: str, patch_config: str, batch: int, size: tuple[int, int]) -> None:
    """Sizes that the patch divides, and one where maps are resized and back."""
    network = randomize(MobileViT(replace(CONFIG, patch_config=patch_config)))
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
    formed = take_form(fold_batch_norms(network, x), (fmt, "channels"), x)
    assert formed is not None
    expected = network(x)
    assert float((formed(x) - expected).abs().max() / expected.abs().max()) < 2e-6


@pytest.mark.parametrize("fmt", ["coreml", "tflite"])
@torch.no_grad()
def test_nothing_is_carried_without_biases(fmt: str) -> None:
    """An untrained network gives 0 for a black picture, from which norms lead anywhere if it is not exact."""
    network, black = MobileViT(CONFIG).eval(), torch.zeros(1, 3, 64, 64)
    formed = take_form(fold_batch_norms(network, black), (fmt, "channels"), torch.rand(1, 3, 64, 64))
    assert formed is not None
    assert not formed(black).any()
    assert not any(isinstance(module, CarryingNorm) for module in formed.modules())


@torch.no_grad()
def test_carried_biases_are_the_biases() -> None:
    """q, k and v of the carrying norm, up to the constants that attention ignores or passes on."""
    (block, *_) = (m for m in randomize(MobileViT(CONFIG)).modules() if isinstance(m, MobileViTBlock))
    opened = OpenBlock(block)
    fold_norm_affine(opened)
    move_value_bias(opened)
    x = torch.randn(5, 16)
    encoder = opened.encoders[0]
    expected = encoder.attention.qkv(encoder.norm1(x))
    carry_biases(opened, scale=0.5)
    assert isinstance(encoder.norm1, CarryingNorm)
    torch.testing.assert_close(encoder.norm1(x).mean(dim=-1), torch.full((5,), SHIFT / 2))
    assert float(encoder.attention.qkv.weights[0].sum(dim=1).abs().min()) > 0.1  # a bias was there to be carried
    for found, wanted in zip(encoder.attention.qkv(encoder.norm1(x)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize(("fmt", "precision"), [("coreml", "fp32"), ("coreml", "fp16"), ("tflite", "fp32")])
def test_file_passes(exported: Exported, fmt: str, precision: str, size: int) -> None:
    for verdict in verify(exported(fmt, "channels", precision=precision, size=size)):
        assert verdict.status == "pass", verdict.reason
        assert verdict.metrics is not None
        assert verdict.metrics.psnr_db >= PSNR_DB[precision]


# What is in the files


@pytest.mark.parametrize("fmt", FORMATS)
def test_no_tensor_above_five_axes(exported: Exported, fmt: str) -> None:
    """In any form: the Neural Engine's limit, and what everything else takes."""
    for form in FORMATS[fmt].forms:
        shapes = activation_shapes(exported(fmt, form))
        assert len(shapes) > 100
        assert max(map(len, shapes)) <= 5, form


@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("fmt", ["coreml", "tflite"])
def test_four_axes_and_the_batch_stays_outermost(exported: Exported, fmt: str, size: int) -> None:
    shapes = activation_shapes(exported(fmt, "channels", size=size))
    assert len(shapes) > 100
    assert max(map(len, shapes)) <= 4
    assert {shape[0] for shape in shapes if shape} == {1}


def test_encoders_are_fourteen_ops(exported: Exported) -> None:
    """Layer norms are whole; the layout changes by one swap of k in each encoder, and at the ends of a block."""
    operations = mil_operations(exported("coreml", "channels"))
    counts = Counter(op.type for op in operations)
    assert counts["layer_norm"] == NORMS
    assert counts["einsum"] == 2 * ENCODERS
    assert counts["transpose"] == counts["split"] == counts["conv_transpose"] == counts["softmax"] == ENCODERS
    assert (counts["reshape"], counts["pixel_unshuffle"], counts["pixel_shuffle"]) == (2 * BLOCKS, BLOCKS, BLOCKS)
    assert not {"matmul", "squeeze", "expand_dims", "tile", "mul", "reduce_sum"} & set(counts)
    assert sum(counts.values()) <= 140
    assert all(op.constant("axis", -1) == 1 for op in operations if op.type == "softmax")


def test_lint_finds_sizes_only(exported: Exported) -> None:
    """Maps of a tiny network are narrow; nothing else is against the rules but casts, classifier and patches."""
    found = lint(mil_operations(exported("coreml", "channels", precision="fp16"))).to_json()
    assert {rule["id"] for rule in found["rules"]} <= {
        "dtype", "singleton-last-axis", "narrow-last-axis", "linear", "innermost-axis",
    }  # fmt: skip
    assert {op["type"] for op in found["ops"] if "dtype" in op["broken"]} == {"cast"}
    assert [op["module"] for op in found["ops"] if "linear" in op["broken"]] == ["classifier"]
    assert {op["type"] for op in found["ops"] if "innermost-axis" in op["broken"]} <= {"reshape", "transpose"}


def test_tflite_has_gpu_ops(exported: Exported) -> None:
    """Nothing that the delegates refuse, nor what TensorFlow Lite's reads wrongly: swapped factors, dropped axes."""
    from ai_edge_litert.tools import flatbuffer_utils

    artifact = exported("tflite", "channels", size=128)  # at 64 a softmax is over one token, and written out
    graph = tflite_graph(artifact)
    assert {op.type for op in graph.ops} <= GPU_OPS
    model = flatbuffer_utils.read_model(str(read_artifact(artifact).model_path))
    options = [model.subgraphs[0].operators[op.index].builtinOptions for op in graph.ops if op.type == "BATCH_MATMUL"]
    assert len(options) == 2 * ENCODERS
    assert not any(option.adjX or option.adjY for option in options)
    means = [graph.tensors[op.outputs[0]].shape for op in graph.ops if op.type == "MEAN"]
    assert Counter(map(len, means)) == {4: NORMS, 2: 1}  # the last is the head's pooling


def test_ios15_is_refused() -> None:
    """pixel_unshuffle came with iOS16."""
    with pytest.raises(UsageError, match="--deployment-target iOS15 has no form channels, expected iOS16 or later"):
        plan_targets("coreml", form="channels", deployment_target="iOS15")
    assert plan_targets("coreml", form="plain", deployment_target="iOS15")[0].deployment_target == "iOS15"
    assert plan_targets("coreml", form="channels")[0].deployment_target == "iOS16"


def test_xxs_at_full_size(tmp_path: Path) -> None:
    """At most 210 ops beside fp16's two casts, to and from the float32 of inputs and outputs; `plain` has 290."""
    model = load_model("xxs", image_size=256)
    results = export(model, to="coreml", form="channels", precision=("fp32", "fp16"), out=tmp_path)
    for result in results:
        counts = Counter(op.type for op in mil_operations(result.artifact.path))
        assert sum(counts.values()) - counts["cast"] <= 210
        assert (counts["layer_norm"], counts["cast"] <= 2) == (21, True)
        assert result.parity is not None
        assert result.parity.status == "pass"
    shapes = [np.array(shape) for shape in activation_shapes(results[0].artifact.path)]
    assert all(shape.size <= 4 and shape[0] == 1 for shape in shapes)
