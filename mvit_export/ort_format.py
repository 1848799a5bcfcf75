"""Writing `.ort`, ONNX Runtime's own format of a graph that it has optimized."""

from __future__ import annotations

from pathlib import Path

from mvit_export.errors import require


def save_optimized(model: bytes, path: Path) -> None:
    """ONNX Runtime's `.ort` file of a model, as its own convert_onnx_models_to_ort writes it in style Fixed.

    All optimizations but NCHWc convolutions, which x86 alone has: the file would open nowhere else. Opened there, it
    does without them.
    """
    ort = require("onnxruntime", extra="onnx", purpose="to write .ort files")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = 1  # nothing is run
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"])
