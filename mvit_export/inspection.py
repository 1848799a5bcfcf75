"""What is inside an exported file, read from the file itself: operators, opset or specification, sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mvit_export.artifact import Artifact, TensorSpec
from mvit_export.errors import require


def inspect_artifact(artifact: Artifact) -> dict[str, Any]:
    """The JSON record of `mvit-export inspect`. Raises MissingDependencyError without the format's package."""
    manifest = artifact.manifest
    details, operators = READERS[manifest.format](artifact.model_path)
    return {
        "path": str(artifact.path),
        "model": manifest.to_json()["model"] | {"labels": len(manifest.model.labels or ())},
        "format": manifest.format,
        "precision": manifest.precision,
        "bytes": artifact.model_bytes,
        "created": manifest.created,
        "trained": manifest.weights.trained,
        "preprocessing": manifest.preprocessing.to_json() if manifest.preprocessing else None,
        "inputs": [_spec(spec) for spec in manifest.inputs],
        "outputs": [_spec(spec) for spec in manifest.outputs],
        "details": details,
        "operator_count": sum(operators.values()),
        "operators": dict(operators.most_common()),
        "tools": dict(manifest.tools),
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    record = {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype, "layout": spec.layout}
    return record | ({"enumerated": [list(shape) for shape in spec.enumerated]} if spec.enumerated else {})


def read_onnx(path: Path) -> tuple[dict[str, Any], Counter[str]]:
    onnx = require("onnx", extra="onnx", purpose="to inspect ONNX files")
    model = onnx.load(str(path), load_external_data=False)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    return {"ir_version": model.ir_version, "opsets": opsets}, Counter(node.op_type for node in model.graph.node)


def read_tflite(path: Path) -> tuple[dict[str, Any], Counter[str]]:
    require("ai_edge_litert", extra="tflite", purpose="to inspect TFLite files")
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(path))
    names = [flatbuffer_utils.opcode_to_name(model, index) for index in range(len(model.operatorCodes))]
    operators = Counter(names[op.opcodeIndex] for graph in model.subgraphs for op in graph.operators)
    details = {"schema_version": model.version, "flex_operators": sum(n.startswith("Flex") for n in operators)}
    return details, operators


def read_coreml(path: Path) -> tuple[dict[str, Any], Counter[str]]:
    ct = require("coremltools", extra="coreml", purpose="to inspect Core ML packages")
    spec = ct.utils.load_spec(str(path))
    blocks = [
        block for function in spec.mlProgram.functions.values() for block in function.block_specializations.values()
    ]
    operators = Counter(op.type for block in blocks for op in block.operations if op.type != "const")
    details = {"specification_version": spec.specificationVersion, "functions": sorted(spec.mlProgram.functions)}
    return details, operators


READERS: Mapping[str, Callable[[Path], tuple[dict[str, Any], Counter[str]]]] = {
    "coreml": read_coreml,
    "onnx": read_onnx,
    "tflite": read_tflite,
}


def describe(report: Mapping[str, Any]) -> Iterator[str]:
    """The record in lines for people."""
    model = report["model"]
    trained = {True: "trained", False: "UNTRAINED", None: "weights from the model's factory"}[report["trained"]]
    yield f"{report['path']}"
    yield f"  model       {model['name']}, {model['params']:,} parameters, {model['macs'] / 1e6:.1f}M MACs, {trained}"
    details = ", ".join(f"{key} {value}" for key, value in report["details"].items())
    yield f"  file        {report['format']} {report['precision']}, {report['bytes'] / 1e6:.2f} MB, {details}"
    for kind in ("inputs", "outputs"):
        for spec in report[kind]:
            shapes = spec.get("enumerated", [spec["shape"]])
            text = " or ".join("x".join("any" if side is None else str(side) for side in shape) for shape in shapes)
            yield f"  {kind[:-1]:<11} {spec['name']}  {text}  {spec['dtype']}  {spec['layout']}".rstrip()
    if report["preprocessing"]:
        p = report["preprocessing"]
        yield f"  pixels      {p['channel_order']}, (x / 255 - {p['mean']}) / {p['std']}, from: {p['source']}"
    counts = ", ".join(f"{count} {name}" for name, count in report["operators"].items())
    yield f"  operators   {report['operator_count']}: {counts}"
