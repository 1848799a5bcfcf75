"""The graph that ONNX Runtime makes before it runs a model, written to a file."""

from __future__ import annotations

from pathlib import Path

from mvit_export.errors import require


def save_optimized(model: bytes | Path, path: Path, *, portable: bool = True) -> None:
    """Write a model as ONNX Runtime optimizes it: in its own format if `path` ends in `.ort`, else as ONNX.

    A portable file is what its own convert_onnx_models_to_ort writes in style Fixed: all optimizations except NCHWc
    convolutions, which only x86 has: with them the file would open nowhere else. On x86 it does without them.
    """
    ort = require("onnxruntime", extra="onnx", purpose="to optimize ONNX files")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = 1  # nothing is run
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path)
    disabled = ["NchwcTransformer"] if portable else None
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
