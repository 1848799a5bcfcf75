"""What ONNX Runtime makes of a graph before it runs it, written to a file."""

from __future__ import annotations

from pathlib import Path

from mvit_export.errors import require


def save_optimized(model: bytes | Path, path: Path, *, portable: bool = True) -> None:
    """Write a model as ONNX Runtime optimizes it: in its own format where `path` ends in `.ort`, else as ONNX.

    A portable file is what its own convert_onnx_models_to_ort writes in style Fixed: all optimizations but NCHWc
    convolutions, which x86 alone has, for the file would open nowhere else. Opened there, it does without them.
    """
    ort = require("onnxruntime", extra="onnx", purpose="to optimize ONNX files")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = 1  # nothing is run
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path)
    disabled = ["NchwcTransformer"] if portable else None
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
