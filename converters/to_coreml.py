"""PyTorch -> Core ML ML Program (.mlpackage) through coremltools.

fp16 is compute precision; inputs and outputs are float32 in both precisions, so that one app code serves both. With
`--input image` the input is an ImageType with the checkpoint's channel order and scale; with labels the model is a
classifier that gives `classLabel` and `classLabel_probs` next to `logits`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvit_export.converters.capture import INPUT_NAME, JIT_TRACE, TORCH_EXPORT, Conversion, Exportable
from mvit_export.errors import require
from mvit_export.mil.modules import module_names, number_nodes, store_module_names
from mvit_export.preprocessing import Preprocessing

WRAPPER = "model.model."  # CoreMLForm holds Exportable, which holds the network


def convert(conversion: Conversion, path: Path) -> str:
    """Write the package `path` and tell how the model was captured.

    torch.export is tried first. Some models convert from a trace only (Swin with coremltools 9: "Unsupported fx node
    alias"), which follows one run's branches and is exact for the declared shape all the same.
    """
    ct = require("coremltools", extra="coreml", purpose="to write Core ML packages")
    module = CoreMLForm(conversion).eval()
    example = torch.rand(conversion.model.input_shapes[0], generator=torch.Generator().manual_seed(0))
    options = conversion_options(ct, conversion, module)
    with torch.no_grad():
        try:
            program = torch.export.export(module, (example,)).run_decompositions({})
            handles = number_nodes(program)
            mlmodel, capture = ct.convert(program, **options), TORCH_EXPORT
            modules = module_names(mlmodel, handles=handles)
        except Exception:  # the converter's errors have no common type; if the trace fails too, its error is raised
            mlmodel, capture = ct.convert(torch.jit.trace(module, example), **options), JIT_TRACE
            modules = module_names(mlmodel, model=module)
    store_module_names(mlmodel, {op: f"{path}.".removeprefix(WRAPPER).rstrip(".") for op, path in modules.items()})
    describe(mlmodel, conversion)
    mlmodel.save(str(path))
    return capture


class CoreMLForm(nn.Module):
    """The model with outputs as a tuple; std and mean for image inputs, probabilities where there are labels."""

    def __init__(self, conversion: Conversion) -> None:
        super().__init__()
        self.model = Exportable(conversion.module)
        preprocessing = conversion.model.preprocessing if conversion.target.input == "image" else None
        self.standardise = Standardise(preprocessing) if preprocessing else nn.Identity()
        self.classifier = conversion.labels is not None

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(self.model(self.standardise(image)).values())
        return (*outputs, outputs[0].softmax(dim=-1)) if self.classifier else outputs


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
    options: dict[str, Any] = {
        "convert_to": "mlprogram",
        "inputs": [input_type(ct, conversion)],
        "outputs": [ct.TensorType(name=name, dtype=np.float32) for name in outputs],
        "compute_precision": ct.precision.FLOAT16 if target.precision == "fp16" else ct.precision.FLOAT32,
        "minimum_deployment_target": getattr(ct.target, str(target.deployment_target)),
    }
    if module.classifier:
        options["outputs"].append(ct.TensorType(name="probabilities", dtype=np.float32))
        options["classifier_config"] = ct.ClassifierConfig(
            list(conversion.labels or ()), predicted_probabilities_output="probabilities"
        )
        options["pass_pipeline"] = classifier_pipeline(ct)
    return options


def classifier_pipeline(ct: Any) -> Any:
    """The default passes, then one that forgets the output types, which have been applied by then.

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

    pipeline = ct.PassPipeline.DEFAULT
    pipeline.append_pass(name)
    return pipeline


def input_type(ct: Any, conversion: Conversion) -> Any:
    """A float32 tensor, or an image with the checkpoint's channel order and the scale 1/255."""
    shape = conversion.model.input_shapes[0]
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
        mlmodel.user_defined_metadata["com.apple.coreml.model.preview.type"] = "imageClassifier"
