"""The ranges of an ONNX graph's tensors on calibration pictures, learned in ONNX Runtime one input at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mvit_export.converters.capture import INPUT_NAME, Conversion
from mvit_export.errors import ConversionError, require

PERCENTILE = 99.99  # of all values, between the two ends
BINS = 1024  # of histograms; the search by entropy takes the square of it
QUANTIZED_BINS = 128  # what a candidate range is judged by, as TensorRT does it

Range = tuple[float, float]


class Observer(Protocol):
    """Takes the tensors of one run after the other; bounded in memory."""

    def collect(self, tensors: Mapping[str, np.ndarray]) -> None: ...

    def ranges(self) -> dict[str, Range]: ...


class MinMax:
    """The smallest and the largest value that a tensor ever had."""

    def __init__(self) -> None:
        self.found: dict[str, Range] = {}

    def collect(self, tensors: Mapping[str, np.ndarray]) -> None:
        for name, tensor in tensors.items():
            low, high = self.found.get(name, (math.inf, -math.inf))
            self.found[name] = (min(low, float(tensor.min())), max(high, float(tensor.max())))

    def ranges(self) -> dict[str, Range]:
        return self.found


class Histograms:
    """ONNX Runtime's own calibration by histograms: `method` is percentile or entropy."""

    def __init__(self, method: str) -> None:
        calibrate = require("onnxruntime.quantization.calibrate", extra="onnx", purpose="to calibrate ONNX files")
        self.collector = calibrate.HistogramCollector(method, False, BINS, QUANTIZED_BINS, PERCENTILE, None)

    def collect(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.collector.collect(tensors)

    def ranges(self) -> dict[str, Range]:
        found = self.collector.compute_collection_result()
        return {name: (float(low), float(high)) for name, (low, high, *_) in found.items()}


def learn_ranges(model: Any, tensors: Sequence[str], conversion: Conversion) -> dict[str, Range]:
    """(lowest, highest) of each tensor, as the calibration's method has it.

    Raises ConversionError where a tensor is not finite, and UsageError where the pictures cannot be read.
    """
    assert conversion.calibration is not None
    method = conversion.calibration.method
    observer: Observer = MinMax() if method == "minmax" else Histograms(method)
    for found in run_calibration(model, tensors, conversion):
        for name, tensor in found.items():
            if not np.isfinite(tensor).all():
                raise ConversionError(f"calibration: {name} holds NaN or Inf on {conversion.calibration.source}")
        observer.collect(found)
    return observer.ranges()


def run_calibration(model: Any, tensors: Sequence[str], conversion: Conversion) -> Iterator[dict[str, np.ndarray]]:
    """The tensors for one batch of calibration inputs after the other."""
    onnx = require("onnx", extra="onnx", purpose="to write ONNX files")
    ort = require("onnxruntime", extra="onnx", purpose="to calibrate ONNX files")
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    known = {value.name for value in (*watched.graph.output, *watched.graph.input)}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in known)
    session = ort.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [name for name in tensors if name != INPUT_NAME]
    for array in batches(conversion.calibration_inputs(), conversion.model.input_shapes[0][0]):
        found = dict(zip(names, session.run(names, {INPUT_NAME: array}), strict=True))
        yield found | ({INPUT_NAME: array} if INPUT_NAME in tensors else {})


def batches(inputs: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Inputs of batch 1 as batches of `size`; the last one is filled up with its own first ones."""
    while batch := list(itertools.islice(inputs, size)):
        yield np.concatenate(list(itertools.islice(itertools.cycle(batch), size)))
