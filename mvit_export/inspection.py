"""What is inside an exported file, read from the file itself: operators, opset or specification, sizes, lint."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mvit_export.artifact import MANIFEST, Artifact, TensorSpec, find_artifacts, read_artifact
from mvit_export.errors import first_line, require
from mvit_export.formats import ORT_SUFFIX

PACKAGE_SUFFIX = ".mlpackage"


def inspect_path(path: str | Path) -> list[dict[str, Any]]:
    """Records of the artifacts meant by `path`, or of one Core ML package that lies outside of any artifact."""
    path = Path(path)
    if path.suffix == PACKAGE_SUFFIX and path.exists() and MANIFEST not in os.listdir(path.parent):
        return [inspect_package(path)]
    return [inspect_artifact(read_artifact(place)) for place in find_artifacts(path)]


def inspect_package(path: Path) -> dict[str, Any]:
    """The record of a Core ML package of any origin: what an artifact's manifest would add is missing."""
    contents = read_coreml(path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"path": str(path), "format": "coreml", "bytes": size, **contents}


def inspect_artifact(artifact: Artifact) -> dict[str, Any]:
    """The JSON record of `mvit-export inspect`. Raises MissingDependencyError without the format's package."""
    manifest = artifact.manifest
    contents = READERS[manifest.format](artifact.model_path)
    return {
        "path": str(artifact.path),
        "model": manifest.to_json()["model"] | {"labels": len(manifest.model.labels or ())},
        "format": manifest.format,
        "precision": manifest.precision,
        "form": manifest.form,
        "bytes": artifact.model_bytes,
        "created": manifest.created,
        "trained": manifest.weights.trained,
        "preprocessing": manifest.preprocessing.to_json() if manifest.preprocessing else None,
        "inputs": [_spec(spec) for spec in manifest.inputs],
        "outputs": [_spec(spec) for spec in manifest.outputs],
        **contents,
        "tools": dict(manifest.tools),
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    record = {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype, "layout": spec.layout}
    return record | ({"enumerated": [list(shape) for shape in spec.enumerated]} if spec.enumerated else {})


def _contents(details: dict[str, Any], operators: Counter[str]) -> dict[str, Any]:
    count, by_type = sum(operators.values()), dict(operators.most_common())
    return {"details": details, "operator_count": count, "operators": by_type}


def read_ort(path: Path) -> dict[str, Any]:
    """ONNX Runtime's own file, by the reader that comes with it."""
    require("onnxruntime", extra="onnx", purpose="to inspect .ort files")
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    session = InferenceSession.GetRootAs(path.read_bytes(), 0)
    graph = session.Model().Graph()
    operators = Counter(graph.Nodes(index).OpType().decode() for index in range(graph.NodesLength()))
    contents = _contents({"ort_format_version": session.OrtVersion().decode()}, operators)
    return contents | {"phones": {"reason": "the graph is optimized for CPUs; inspect a file exported without --ort"}}


def read_onnx(path: Path) -> dict[str, Any]:
    if path.suffix == ORT_SUFFIX:
        return read_ort(path)
    onnx = require("onnx", extra="onnx", purpose="to inspect ONNX files")
    model = onnx.load(str(path), load_external_data=False)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    contents = _contents(
        {"ir_version": model.ir_version, "opsets": opsets}, Counter(node.op_type for node in model.graph.node)
    )
    return contents | {"phones": phone_partitions(onnx, model)}


def phone_partitions(onnx: Any, model: Any) -> dict[str, Any]:
    """How much of an ONNX graph a phone's accelerators take, by ONNX Runtime's own usability checker.

    Each partition is a stretch of nodes that an accelerator runs by itself; between them data goes back to the CPU.
    They take fixed shapes alone, so a batch of any size counts as 1, which an app can set.
    """
    try:
        from onnxruntime.tools.mobile_helpers import usability_checker as checker
    except ImportError as error:
        return {"reason": f"onnxruntime's mobile usability checker cannot be imported: {first_line(error)}"}
    for dimension in (d for tensor in model.graph.input for d in tensor.type.tensor_type.shape.dim):
        if dimension.dim_param:
            dimension.dim_value = 1  # which also unsets the name
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model)
    found = {
        "NNAPI": checker.check_nnapi_partitions(model, True),
        "Core ML": checker.check_coreml_partitions(model, True, "coreml_supported_mlprogram_ops.md"),
    }
    return {
        name: {
            "nodes": info.num_nodes, "supported": info.num_supported_nodes, "partitions": info.num_partitions,
            "unsupported": sorted(info.unsupported_ops),
        }
        for name, info in found.items()
    }  # fmt: skip


def read_tflite(path: Path) -> dict[str, Any]:
    require("ai_edge_litert", extra="tflite", purpose="to inspect TFLite files")
    from ai_edge_litert.tools import flatbuffer_utils

    from mvit_export.tflite_graph import count_uses, read_graph

    model = flatbuffer_utils.read_model(str(path))
    names = [flatbuffer_utils.opcode_to_name(model, index) for index in range(len(model.operatorCodes))]
    operators = Counter(names[op.opcodeIndex] for graph in model.subgraphs for op in graph.operators)
    details = {"schema_version": model.version, "flex_operators": sum(n.startswith("Flex") for n in operators)}
    uses = {f"{use}_operators": count for use, count in count_uses(read_graph(path)).items()}
    return _contents(details | uses, operators)


def read_coreml(path: Path) -> dict[str, Any]:
    require("coremltools", extra="coreml", purpose="to inspect Core ML packages")
    require("torch", extra="coreml", purpose="to inspect Core ML packages")
    from mvit_export.mil.lint import lint
    from mvit_export.mil.listing import list_operations
    from mvit_export.mil.package import read_package

    package = read_package(path)
    operations, spec = list_operations(package), package.spec
    details = {"specification_version": spec.specificationVersion, "functions": sorted(spec.mlProgram.functions)}
    return _contents(details, Counter(op.type for op in operations)) | {"lint": lint(operations).to_json()}


READERS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "coreml": read_coreml,
    "onnx": read_onnx,
    "tflite": read_tflite,
}


def describe(report: Mapping[str, Any], *, verbose: bool = False) -> Iterator[str]:
    """The record in lines for people; `verbose` lists every op of a lint."""
    yield f"{report['path']}"
    if "model" in report:
        yield describe_model(report["model"], report["trained"])
    details = ", ".join(f"{key} {value}" for key, value in report["details"].items())
    kind = " ".join(report[key] for key in ("format", "precision") if key in report)
    kind += f", form {report['form']}" if "form" in report else ""
    yield f"  file        {kind}, {report['bytes'] / 1e6:.2f} MB, {details}"
    yield from describe_interface(report)
    counts = ", ".join(f"{count} {name}" for name, count in report["operators"].items())
    yield f"  operators   {report['operator_count']}: {counts}"
    yield from describe_phones(report.get("phones", {}))
    if "lint" in report:
        yield from describe_lint(report["lint"], verbose=verbose)


def describe_model(model: Mapping[str, Any], trained: bool | None) -> str:
    weights = {True: "trained", False: "UNTRAINED", None: "weights from the model's factory"}[trained]
    return f"  model       {model['name']}, {model['params']:,} parameters, {model['macs'] / 1e6:.1f}M MACs, {weights}"


def describe_interface(report: Mapping[str, Any]) -> Iterator[str]:
    """Inputs, outputs and preprocessing, which a package without manifest does not tell."""
    for kind in ("inputs", "outputs"):
        for spec in report.get(kind, ()):
            shapes = spec.get("enumerated", [spec["shape"]])
            text = " or ".join("x".join("any" if side is None else str(side) for side in shape) for shape in shapes)
            yield f"  {kind[:-1]:<11} {spec['name']}  {text}  {spec['dtype']}  {spec['layout']}".rstrip()
    if p := report.get("preprocessing"):
        yield f"  pixels      {p['channel_order']}, (x / 255 - {p['mean']}) / {p['std']}, from: {p['source']}"


def describe_phones(phones: Mapping[str, Any]) -> Iterator[str]:
    if "reason" in phones:
        yield f"  phones      NOT-RUN: {phones['reason']}"
        return
    for name, part in phones.items():
        unknown = f", not {', '.join(part['unsupported'])}" if part["unsupported"] else ""
        counts = f"{part['supported']} of {part['nodes']} nodes in {part['partitions']} partitions"
        yield f"  phones      {name}: {counts}{unknown} (onnxruntime's usability checker; a device decides)"


def describe_lint(lint: Mapping[str, Any], *, verbose: bool) -> Iterator[str]:
    """The eligible share, broken rules with an example each, worst first, and with `verbose` every op."""
    share, macs = lint["eligible_mac_share"], lint["macs"]
    known = "unknown, sizes are flexible" if macs is None else "no MACs"
    amount = f"{100 * share:.1f} % of {macs / 1e6:.1f}M MACs" if share is not None else known
    yield f"  eligible    {amount} (Neural Engine lint; device, system and size decide)"
    for rule in lint["rules"]:
        example = max((op for op in lint["ops"] if rule["id"] in op["broken"]), key=lambda op: op["macs"] or 0)
        ops = f"{rule['count']} op{'s' if rule['count'] > 1 else ''}"
        reason = f"{rule['text']} [{rule['source']}]"
        yield f"  {rule['severity']:<11} {rule['id']}, {ops}, e.g. {name_op(example)}: {reason}"
    for op in lint["ops"] if verbose else ():
        count = "MACs unknown" if op["macs"] is None else f"{op['macs']:,} MACs"
        verdict = "eligible" if op["eligible"] else "not eligible"
        yield f"  op          {name_op(op)}, {count}, {verdict}" + (
            f": {', '.join(op['broken'])}" if op["broken"] else ""
        )


def name_op(op: Mapping[str, Any]) -> str:
    return f"{op['type']} {op['op']}" + (f" ({op['module']})" if op["module"] else "")
