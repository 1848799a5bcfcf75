"""ONNX files: opened in ONNX Runtime, their layers, their contents, and the product that shows the runtime's peak."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.artifact import Artifact
from mvit_export.errors import first_line, require
from mvit_export.formats.onnx import ORT_SUFFIX
from mvit_export.readers.session import Chains, Intermediate, Opener, Session, labels_of, make_contents, open_in
from mvit_export.runner.run_onnxruntime import session_options
from mvit_export.system.reading import MODEL, check_regular, read_bytes

NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # torch's exporter writes it: a node's modules, outermost first
WRAPPER = "model"  # the attribute of the exported wrapper that holds the network


def openers() -> tuple[Opener, ...]:
    """The runtimes that check such a file here."""
    return (open_onnx,)


def open_onnx(artifact: Artifact) -> Session:
    """ONNX Runtime on its CPU provider."""
    runtime, opened = open_in("onnxruntime", artifact, known_as="ONNX Runtime")
    return Session(f"{runtime.name} {runtime.version} CPU", opened.call, labels_of(opened))


def read_layers(path: Path, array: np.ndarray, chains: Chains) -> Iterator[Intermediate]:
    """Run a copy of the graph, not optimised, in which every node's outputs are outputs of the graph."""
    onnx = require("onnx", extra="onnx", purpose="to read the layers of ONNX files")
    ort = require("onnxruntime", extra="onnx", purpose="to run ONNX files")
    check_regular(path, MODEL)
    model = onnx.load(str(path))
    prevent_saturation(onnx, model.graph)
    nodes = {name: node for node in model.graph.node for name in node.output if name}
    declared = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in nodes if name not in declared)
    options = session_options(ort, threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    tensors = session.run(list(nodes), {session.get_inputs()[0].name: array})
    for (name, node), tensor in zip(nodes.items(), tensors, strict=True):
        if isinstance(tensor, np.ndarray):  # a sequence is not a layer's output
            yield Intermediate(node.name or name, node.op_type, onnx_modules(node), tensor)


def prevent_saturation(onnx: Any, graph: Any) -> None:
    """Shift int8 weights of MatMulInteger and their zero point to uint8, which every x86 kernel multiplies exactly.

    The session option that does so in an optimised graph (run_onnxruntime.py) has no effect without optimization.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    signed = {node.input[1] for node in graph.node if node.op_type == "MatMulInteger" and len(node.input) < 4}
    signed &= {name for name, tensor in tensors.items() if tensor.data_type == onnx.TensorProto.INT8}
    for name in signed:
        shifted = (onnx.numpy_helper.to_array(tensors[name]).astype(np.int16) + 128).astype(np.uint8)
        graph.initializer.append(onnx.numpy_helper.from_array(shifted, f"{name}_unsigned"))
    for node in graph.node:
        if node.op_type == "MatMulInteger" and node.input[1] in signed and len(node.input) < 4:
            node.input[1] += "_unsigned"
            node.input.extend([*[""] * (3 - len(node.input)), "unsigned_zero"])
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(128, np.uint8), "unsigned_zero"))


def onnx_modules(node: Any) -> tuple[str, ...]:
    """A node's innermost module: its scopes end with the node's own name."""
    for entry in node.metadata_props:
        if entry.key == NAME_SCOPES:
            scopes = ast.literal_eval(entry.value)[:-1]
            wrapper, _, module = (scopes[-1] if scopes else "").partition(".")
            return (module,) if wrapper == WRAPPER else ()
    return ()


def read_contents(path: Path) -> dict[str, Any]:
    if path.suffix == ORT_SUFFIX:
        return read_ort(path)
    onnx = require("onnx", extra="onnx", purpose="to inspect ONNX files")
    check_regular(path, MODEL)
    model = onnx.load(str(path), load_external_data=False)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    contents = make_contents(
        {"ir_version": model.ir_version, "opsets": opsets}, Counter(node.op_type for node in model.graph.node)
    )
    return contents | {"phones": phone_partitions(onnx, model)}


def read_ort(path: Path) -> dict[str, Any]:
    """ONNX Runtime's own format, by the reader that comes with it."""
    require("onnxruntime", extra="onnx", purpose="to inspect .ort files")
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    session = InferenceSession.GetRootAs(read_bytes(path, MODEL), 0)
    graph = session.Model().Graph()
    operators = Counter(graph.Nodes(index).OpType().decode() for index in range(graph.NodesLength()))
    contents = make_contents({"ort_format_version": session.OrtVersion().decode()}, operators)
    return contents | {"phones": {"reason": "the graph is optimized for CPUs; inspect a file exported without --ort"}}


def phone_partitions(onnx: Any, model: Any) -> dict[str, Any]:
    """How much of an ONNX graph a phone's accelerators accept, by ONNX Runtime's own usability checker.

    Each partition is a stretch of nodes that an accelerator runs by itself; between them data goes back to the CPU.
    They accept only fixed shapes, so a batch of any size counts as 1, which an app can set.
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


def write_product(path: Path, weights: np.ndarray) -> None:
    """Y = X W with a constant W, as an exported Linear is."""
    onnx = require("onnx", extra="onnx", purpose="to measure ONNX Runtime's peak")
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [tensor("x", onnx.TensorProto.FLOAT, list(weights.shape))],
        [tensor("y", onnx.TensorProto.FLOAT, list(weights.shape))],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, str(path))
