"""The tensors of an ONNX graph on calibration inputs, in ONNX Runtime, one batch at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from mvit_export.converters.capture import INPUT_NAME, Conversion
from mvit_export.converters.quantization.ranges import Range, learn_ranges
from mvit_export.errors import require


def calibrate(model: Any, tensors: Sequence[str], conversion: Conversion) -> dict[str, Range]:
    """The range of each tensor by the calibration's method."""
    assert conversion.calibration is not None
    onnx = require("onnx", extra="onnx", purpose="to write ONNX files")
    ort = require("onnxruntime", extra="onnx", purpose="to calibrate ONNX files")
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    known = {value.name for value in (*watched.graph.output, *watched.graph.input)}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in known)
    session = ort.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    return learn_ranges(partial(run_inputs, session, tensors, conversion), conversion.calibration.method)


def run_inputs(session: Any, tensors: Sequence[str], conversion: Conversion) -> Iterator[dict[str, np.ndarray]]:
    names = [name for name in tensors if name != INPUT_NAME]
    for array in batches(conversion.calibration_inputs(), conversion.model.input_shapes[0][0]):
        found = dict(zip(names, session.run(names, {INPUT_NAME: array}), strict=True))
        yield found | ({INPUT_NAME: array} if INPUT_NAME in tensors else {})


def batches(inputs: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Inputs of batch 1 as batches of `size`; the last one is filled up by repeating its own."""
    while batch := list(itertools.islice(inputs, size)):
        yield np.concatenate(list(itertools.islice(itertools.cycle(batch), size)))
