"""PyTorch -> Core ML ML Program (.mlpackage) through coremltools.

fp16 is the compute precision; inputs and outputs are float32 in all precisions, so that the same app code works with
all. Files with fewer bits than fp16 compute the rest in fp16, which the Neural Engine needs (`quantize.py`). With
`--input image` the input is an ImageType with the checkpoint's channel order and scale; with labels the model is a
classifier that returns `classLabel` and `classLabel_probs` next to `logits`. Several input shapes become one package
with enumerated shapes, which accepts these and no others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvit_export.converters.capture import INPUT_NAME, JIT_TRACE, TORCH_EXPORT, Conversion, Exportable
from mvit_export.converters.coreml.quantize import add_pass, check_done, plan_bits
from mvit_export.data.preprocessing import Preprocessing
from mvit_export.errors import require
from mvit_export.families.forms import make_flexible
from mvit_export.mil.modules import module_names, number_nodes, store_module_names
from mvit_export.tasks.classification import CLASSIFICATION, PROBABILITIES
from mvit_export.tasks.segmentation import palette

WRAPPER = "model.model."  # CoreMLForm holds Exportable, which holds the network


def convert(conversion: Conversion, path: Path) -> str:
    """Write the package `path` and return how the model was captured.

    torch.export is tried first. Some models convert from a trace only (Swin with coremltools 9: "Unsupported fx node
    alias"), which follows the branches of one run and is still exact for the declared shape. Models with several shapes
    are traced, after MobileViT's own branches have been removed.
    """
    ct = require("coremltools", extra="coreml", purpose="to write Core ML packages")
    shapes = conversion.model.input_shapes
    if len(shapes) > 1:
        conversion = replace(conversion, module=make_flexible(conversion.module, shapes))
    module = CoreMLForm(conversion).eval()
    example = torch.rand(shapes[0], generator=torch.Generator().manual_seed(0))
    options = conversion_options(ct, conversion, module)
    with torch.no_grad():
        ways = (capture_trace,) if len(shapes) > 1 else (capture_export, capture_trace)
        captured, (mlmodel, modules) = convert_any(ct, ways, module, example, options)
        if not conversion.target.precision_row.full:
            plan = plan_bits(mlmodel, network_paths(modules), conversion)
            add_pass(options["pass_pipeline"], plan)
            mlmodel, modules = captured.convert(ct, options)
            check_done(mlmodel, plan)
            modules = {op: path for op, path in modules.items() if op in plan.names}  # not what was put in
    store_module_names(mlmodel, network_paths(modules))
    describe(mlmodel, conversion)
    mlmodel.save(str(path))
    # coremltools writes this for ExecuTorch if ops are numbered: nothing reads it, and it is as large as the program.
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    return captured.how


def network_paths(modules: dict[str, str]) -> dict[str, str]:
    """Op -> module of the network, without the modules that wrap it here."""
    return {op: f"{path}.".removeprefix(WRAPPER).rstrip(".") for op, path in modules.items()}


Converted = tuple[Any, dict[str, str]]  # the MLModel, its module names


@dataclass(frozen=True)
class Captured:
    """A graph that may be converted more than once, and what tells the module of each of its ops."""

    source: Any
    how: str
    handles: dict[int, str] | None = None  # of an exported graph
    module: nn.Module | None = None  # that was traced

    def convert(self, ct: Any, options: dict[str, Any]) -> Converted:
        mlmodel = ct.convert(self.source, **options)
        return mlmodel, module_names(mlmodel, handles=self.handles, model=self.module)


Way = Callable[[nn.Module, Tensor], Captured]


def capture_export(module: nn.Module, example: Tensor) -> Captured:
    program = torch.export.export(module, (example,)).run_decompositions({})
    return Captured(program, TORCH_EXPORT, handles=number_nodes(program))


def capture_trace(module: nn.Module, example: Tensor) -> Captured:
    return Captured(torch.jit.trace(module, example), JIT_TRACE, module=module)


def convert_any(
    ct: Any, ways: Sequence[Way], module: nn.Module, example: Tensor, options: dict[str, Any]
) -> tuple[Captured, Converted]:
    """By the first way that succeeds; the error of the last is raised."""
    way, *others = ways
    try:
        captured = way(module, example)
        return captured, captured.convert(ct, options)
    except Exception:  # the converter's errors have no common type
        if not others:
            raise
        return convert_any(ct, others, module, example, options)


class CoreMLForm(nn.Module):
    """The model with outputs as a tuple; std and mean for image inputs, probabilities where there are labels."""

    def __init__(self, conversion: Conversion) -> None:
        super().__init__()
        self.model = Exportable(conversion)
        preprocessing = conversion.model.preprocessing if conversion.target.input == "image" else None
        self.standardise = Standardise(preprocessing) if preprocessing else nn.Identity()
        self.classifier = conversion.classifier
        self.sure = conversion.model.info.scores == PROBABILITIES

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(self.model(self.standardise(image)).values())
        if not self.classifier:
            return outputs
        scores = outputs[0]  # a quotient by their sum, 1, since two outputs may not be one value
        return (*outputs, scores / scores.sum(dim=-1, keepdim=True) if self.sure else scores.softmax(dim=-1))


class Standardise(nn.Module):
    """(x - mean) / std per channel, which ImageType's single scale cannot express. x is in [0, 1], (B, 3, H, W)."""

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.needed = preprocessing.mean != (0.0, 0.0, 0.0) or preprocessing.std != (1.0, 1.0, 1.0)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std if self.needed else x


def conversion_options(ct: Any, conversion: Conversion, module: CoreMLForm) -> dict[str, Any]:
    """The keyword arguments of ct.convert."""
    target, outputs = conversion.target, list(conversion.model.output_names)
    dtype = np.int32 if conversion.model.info.settings.get("output") == "labels" else np.float32
    options: dict[str, Any] = {
        "convert_to": "mlprogram",
        "inputs": [input_type(ct, conversion)],
        "outputs": [ct.TensorType(name=name, dtype=dtype) for name in outputs],
        "compute_precision": ct.precision.FLOAT32 if target.precision == "fp32" else ct.precision.FLOAT16,
        "minimum_deployment_target": getattr(ct.target, str(target.deployment_target)),
        "pass_pipeline": ct.PassPipeline.DEFAULT,
    }
    if module.classifier:
        options["outputs"].append(ct.TensorType(name="probabilities", dtype=np.float32))
        options["classifier_config"] = ct.ClassifierConfig(
            list(conversion.labels or ()), predicted_probabilities_output="probabilities"
        )
        forget_types(options["pass_pipeline"])
    return options


def forget_types(pipeline: Any) -> None:
    """Append a pass that forgets the output types, which have been applied by then.

    coremltools 9 adds `classLabel` to a classifier's outputs after the passes and then looks each output up in the
    list of types, one short: "list index out of range" for any classifier with a second output such as logits.
    """
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

    name = "mvit_export::forget_output_types"
    if name not in PASS_REGISTRY.passes:

        @register_pass(namespace="mvit_export")
        class forget_output_types(AbstractGraphPass):  # noqa: N801 (the registry takes the pass's name from it)
            def apply(self, program: Any) -> None:
                program.functions["main"].set_output_types(None)

    pipeline.append_pass(name)


def input_type(ct: Any, conversion: Conversion) -> Any:
    """A float32 tensor, or an image with the checkpoint's channel order and scale 1/255; the first shape is default."""
    shapes = conversion.model.input_shapes
    shape = ct.EnumeratedShapes(shapes=shapes, default=shapes[0]) if len(shapes) > 1 else shapes[0]
    if conversion.target.input == "tensor":
        return ct.TensorType(name=INPUT_NAME, shape=shape, dtype=np.float32)
    preprocessing = conversion.model.preprocessing
    assert preprocessing is not None
    layout = getattr(ct.colorlayout, preprocessing.channel_order)
    return ct.ImageType(name=INPUT_NAME, shape=shape, scale=1 / 255, color_layout=layout)


def describe(mlmodel: Any, conversion: Conversion) -> None:
    """The fields that Xcode shows, then the manifest's essentials."""
    metadata = conversion.metadata
    mlmodel.short_description = metadata["description"]
    mlmodel.author = metadata["author"]
    mlmodel.license = metadata["license"]
    mlmodel.version = metadata["version"]
    mlmodel.user_defined_metadata.update(metadata)
    if conversion.labels:
        mlmodel.user_defined_metadata["labels"] = json.dumps(conversion.labels, ensure_ascii=False)
    if conversion.classifier:
        mlmodel.user_defined_metadata["com.apple.coreml.model.preview.type"] = "imageClassifier"
    if conversion.segmenter:
        mlmodel.user_defined_metadata["com.apple.coreml.model.preview.type"] = "imageSegmenter"
        mlmodel.user_defined_metadata["com.apple.coreml.model.preview.params"] = preview_of(conversion)
    mlmodel.input_description[INPUT_NAME] = describe_input(conversion)
    for name, text in describe_outputs(conversion):
        mlmodel.output_description[name] = text


def preview_of(conversion: Conversion) -> str:
    """What Xcode's preview of a segmenter reads: names and colours, a list each, by the classes' indices."""
    count = conversion.model.info.num_classes or 0
    labels = conversion.labels or tuple(map(str, range(count)))
    return json.dumps({"labels": labels, "colors": palette(count)}, ensure_ascii=False)


def describe_input(conversion: Conversion) -> str:
    """E.g. "RGB image, 256x256" or "BGR image as (x / 255 - mean) / std, NCHW 1x3x160x160 or 1x3x192x192"."""
    shapes, preprocessing = conversion.model.input_shapes, conversion.model.preprocessing
    whole = " or ".join("x".join(map(str, shape)) for shape in shapes)
    if preprocessing is None:
        return f"float32, {whole}"
    if conversion.target.input == "image":
        sizes = " or ".join("x".join(map(str, shape[2:])) for shape in shapes)
        return f"{preprocessing.channel_order} image, {sizes}"
    plain = set(preprocessing.mean) == {0.0} and set(preprocessing.std) == {1.0}
    values = "x / 255" if plain else f"(x / 255 - {list(preprocessing.mean)}) / {list(preprocessing.std)}"
    return f"{preprocessing.channel_order} image as {values}, NCHW {whole}"


def describe_outputs(conversion: Conversion) -> Iterator[tuple[str, str]]:
    """(name, text) of every output."""
    sure = conversion.model.info.scores == PROBABILITIES
    for name in conversion.model.output_names:
        classifier = conversion.model.info.task == CLASSIFICATION.name
        scores = "probabilities of the classes" if sure else "class scores before softmax"
        yield name, scores if classifier else f"{name} of {conversion.model.info.name}"
    if conversion.classifier:
        yield "classLabel", "label of the most probable class"
        yield "classLabel_probs", "probability of each label" + ("" if sure else ", the softmax of the class scores")
