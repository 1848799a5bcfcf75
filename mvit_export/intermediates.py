"""What a saved file computes on its way: every tensor of one run, with the op and the PyTorch module that made it.

Each format keeps the module in its own way: ONNX as metadata of the node, TFLite in the tensor's name, Core ML in the
package's metadata. A file that another program wrote may have no modules; its tensors are read all the same.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.artifact import Artifact
from mvit_export.errors import ArtifactError, MvitExportError, first_line, require
from mvit_export.runtimes import litert_runtime

NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # torch's exporter writes it: a node's modules, outermost first
WRAPPER = "model"  # the attribute of the exported wrapper that holds the network

Chains = Mapping[str, tuple[str, ...]]  # module path -> the attributes of the modules that were called on the way to it


@dataclass(frozen=True)
class Intermediate:
    """One floating tensor. `modules` are paths in the network, "" being the network itself: none if the file does not
    say, several if a converter fused them."""

    op: str
    op_type: str
    modules: tuple[str, ...]
    tensor: np.ndarray


def read_intermediates(artifact: Artifact, array: np.ndarray, chains: Chains) -> list[Intermediate]:
    """Run the file on one input and give all floating tensors in the order of their making."""
    reader = READERS[artifact.manifest.format]
    try:
        return [item for item in reader(artifact.model_path, array, chains) if item.tensor.dtype.kind == "f"]
    except MvitExportError:
        raise
    except Exception as error:  # the runtimes' errors have no common type
        reason = first_line(error)
        raise ArtifactError(f"{artifact.model_path} does not give its intermediate tensors: {reason}") from error


def read_onnx(path: Path, array: np.ndarray, chains: Chains) -> Iterator[Intermediate]:
    """Every node's outputs become outputs of a copy of the graph, which runs as written, not optimised."""
    onnx = require("onnx", extra="onnx", purpose="to read the layers of ONNX files")
    ort = require("onnxruntime", extra="onnx", purpose="to run ONNX files")
    model = onnx.load(str(path))
    nodes = {name: node for node in model.graph.node for name in node.output if name}
    declared = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in nodes if name not in declared)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    tensors = session.run(list(nodes), {session.get_inputs()[0].name: array})
    for (name, node), tensor in zip(nodes.items(), tensors, strict=True):
        if isinstance(tensor, np.ndarray):  # sequences are no layer's output
            yield Intermediate(node.name or name, node.op_type, onnx_modules(node), tensor)


def onnx_modules(node: Any) -> tuple[str, ...]:
    """The innermost module of a node: its scopes end with the node's own name."""
    for entry in node.metadata_props:
        if entry.key == NAME_SCOPES:
            scopes = ast.literal_eval(entry.value)[:-1]
            wrapper, _, module = (scopes[-1] if scopes else "").partition(".")
            return (module,) if wrapper == WRAPPER else ()
    return ()


def read_tflite(path: Path, array: np.ndarray, chains: Chains) -> Iterator[Intermediate]:
    """The interpreter's own kernels with all tensors kept: XNNPACK would swallow those inside of its partitions."""
    _, _, interpreter_class = litert_runtime()
    resolvers = sys.modules[interpreter_class.__module__].OpResolverType
    interpreter = interpreter_class(
        model_path=str(path),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], array)
    interpreter.invoke()
    names = {tensor["index"]: tensor["name"] for tensor in interpreter.get_tensor_details()}
    for op in interpreter._get_ops_details():
        for index in op["outputs"]:
            modules = tflite_modules(names[index], chains)
            yield Intermediate(f"#{op['index']}", op["op_name"], modules, interpreter.get_tensor(index))


def tflite_modules(name: str, chains: Chains) -> tuple[str, ...]:
    """The modules in a tensor's name, "package.Exportable/package.Net_model/package.Conv2d_conv;2".

    A part is a called module's class and attribute; containers that are only looped over are left out, so a path is
    found again by its chain of calls. Several places are joined by ";;" where ops were fused.
    """
    found: dict[str, None] = {}
    for place in name.split(";;"):
        parts = place.partition(";")[0].split("/")
        if len(parts) >= 2 and parts[1].endswith(f"_{WRAPPER}"):
            fits = [path for path, chain in chains.items() if is_chain(parts[2:], chain)]
            # "Linear_to_out" ends like an attribute "out" as well: the longest fits best.
            longest = max((len("".join(chains[path])) for path in fits), default=0)
            found.update(dict.fromkeys(path for path in fits if len("".join(chains[path])) == longest))
    return tuple(found)


def is_chain(parts: list[str], chain: tuple[str, ...]) -> bool:
    return len(parts) == len(chain) and all(p.endswith(f"_{attribute}") for p, attribute in zip(parts, chain))  # noqa: B905


def read_coreml(path: Path, array: np.ndarray, chains: Chains) -> Iterator[Intermediate]:
    """The reference executor, on macOS too: Core ML does not show what happens inside of a model."""
    from mvit_export import mil

    program = mil.load(path)
    (input_name,) = program.inputs
    for op, name, tensor in program.intermediates(**{input_name: array}):
        modules = () if op.module is None else (op.module,)
        yield Intermediate(name, op.type, modules, tensor.numpy().copy())


READERS: Mapping[str, Callable[[Path, np.ndarray, Chains], Iterator[Intermediate]]] = {
    "coreml": read_coreml,
    "onnx": read_onnx,
    "tflite": read_tflite,
}
