"""PyTorch -> ONNX through torch.onnx's dynamo exporter: one self-contained file, checked by onnx.checker.

fp16: weights and arithmetic in half precision, inputs and outputs in float32. Fewer bits: quantize.py.
On request the file is in ONNX Runtime's own format, with the graph as it optimizes it on opening.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mvit_export.converters.capture import (
    INPUT_NAME,
    TORCH_EXPORT,
    Conversion,
    Exportable,
    baked_preprocessing,
    example_input,
)
from mvit_export.converters.onnx.quantize import quantize
from mvit_export.errors import ConversionError, require
from mvit_export.readers.onnx import NAME_SCOPES
from mvit_export.readers.ort import save_optimized
from mvit_export.tasks.segmentation import palette


def convert(conversion: Conversion, path: Path) -> str:
    """Write the ONNX file `path`. Raises ConversionError if the result is not a valid model."""
    onnx = require("onnx", extra="onnx", purpose="to write ONNX files")
    require("onnxscript", extra="onnx", purpose="to write ONNX files")
    target = conversion.target
    few_bits = not target.precision_row.full
    module = Exportable(conversion, preprocessing=baked_preprocessing(conversion), half=target.precision == "fp16")
    # The exporter fixes a batch axis that it sees as 1, so a dynamic one is traced at 2.
    example = example_input(conversion, batch=2 if target.dynamic_batch else None)
    program = torch.onnx.export(
        module,
        (),
        kwargs={INPUT_NAME: example},
        dynamo=True,
        opset_version=target.opset,
        input_names=[INPUT_NAME],
        output_names=list(conversion.model.output_names),
        dynamic_shapes={INPUT_NAME: {0: torch.export.Dim("batch", min=1)}} if target.dynamic_batch else None,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    check_opset(model, target.opset)
    strip_traces(model)
    if few_bits:
        quantize(model, conversion)
    describe(model, conversion)
    if target.ort:
        onnx.checker.check_model(model, full_check=True)
        save_optimized(model.SerializeToString(), path)
    else:
        onnx.save(model, path)
        onnx.checker.check_model(str(path), full_check=True)
    return TORCH_EXPORT


def check_opset(model, opset: int | None) -> None:  # type: ignore[no-untyped-def]  # onnx's own protobuf class
    """Where the exporter cannot convert to the requested opset, it only warns and keeps its native one."""
    found = {entry.domain: entry.version for entry in model.opset_import}.get("")
    if found != opset:
        raise ConversionError(f"the ONNX exporter wrote opset {found}, --opset {opset} was asked for; try --opset 18")


def strip_traces(model) -> None:  # type: ignore[no-untyped-def]
    """Drop the exporter's notes on nodes and values, except module names: its stack traces show local paths."""
    for item in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info, model.graph):
        kept = [entry for entry in item.metadata_props if entry.key == NAME_SCOPES]
        del item.metadata_props[:]
        item.metadata_props.extend(kept)


def describe(model, conversion: Conversion) -> None:  # type: ignore[no-untyped-def]
    """Name, description, version and the manifest's essentials in the model's own fields."""
    metadata = dict(conversion.metadata)
    model.producer_name, model.producer_version = "mvit-export", metadata["mvit_export_version"]
    model.doc_string = metadata["description"]
    model.model_version = 1
    model.graph.name = conversion.model.info.name
    if conversion.labels:
        metadata["labels"] = json.dumps(conversion.labels, ensure_ascii=False)
    if conversion.segmenter:
        metadata["palette"] = json.dumps(palette(conversion.model.info.num_classes or 0))
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
