"""PyTorch -> TFLite through litert-torch.

fp16: weights stored in half precision (litert-quantizer's float casting), arithmetic as the delegate does it: fp32 on
CPUs, fp16 on GPUs. Fewer bits: quantize.py.
"""

from __future__ import annotations

import zipfile
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
from mvit_export.converters.tflite.quantize import check_recipe, quantize
from mvit_export.errors import require


def convert(conversion: Conversion, path: Path) -> str:
    """Write the TFLite file `path`."""
    litert_torch = require("litert_torch", extra="tflite", purpose="to write TFLite files")
    if conversion.recipe is not None:
        check_recipe(conversion.recipe)
    module = Exportable(conversion, preprocessing=baked_preprocessing(conversion))
    with torch.no_grad():
        edge_model = litert_torch.convert(module, sample_kwargs={INPUT_NAME: example_input(conversion)})
    edge_model.export(str(path))
    if conversion.target.precision == "fp16":
        cast_weights(path)
    elif conversion.target.precision != "fp32":
        quantize(path, conversion)
    describe(path, conversion)
    return TORCH_EXPORT


def cast_weights(path: Path) -> None:
    """Store the weights of `path` as fp16, in place."""
    quantizer = require("litert_quantizer", extra="tflite", purpose="to write fp16 TFLite files")
    q = quantizer.qtyping
    work = quantizer.Quantizer(str(path))
    work.update_quantization_recipe(
        regex=".*",
        operation_name=q.TFLOperationName.ALL_SUPPORTED,
        op_config=q.OpQuantizationConfig(
            weight_tensor_config=q.TensorQuantizationConfig(num_bits=16, dtype=q.TensorDataType.FLOAT),
            compute_precision=q.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
        algorithm_key=quantizer.algorithm_manager.AlgorithmName.FLOAT_CASTING,
    )
    work.quantize().export_model(str(path), overwrite=True)


def describe(path: Path, conversion: Conversion) -> None:
    """Put description and metadata into the flatbuffer, and append the labels as a zip, like TFLite metadata."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(path))
    model.description = conversion.metadata["description"]
    model.metadata = model.metadata or []
    for key, value in conversion.metadata.items():
        buffer = schema.BufferT()
        buffer.data = list(value.encode("utf-8"))
        entry = schema.MetadataT()
        entry.name, entry.buffer = key, len(model.buffers)
        model.buffers.append(buffer)
        model.metadata.append(entry)
    flatbuffer_utils.write_model(model, str(path))
    if conversion.labels:
        with zipfile.ZipFile(path, "a") as packed:
            packed.writestr("labels.txt", "\n".join(conversion.labels) + "\n")
