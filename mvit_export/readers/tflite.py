"""TFLite files: opened in LiteRT, their layers, their contents, and the product that shows the runtime's peak."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.artifact import Artifact
from mvit_export.errors import ArtifactError, require
from mvit_export.readers.session import (
    Chains,
    Intermediate,
    Opener,
    Session,
    labels_of,
    make_contents,
    open_in,
    refusals,
)
from mvit_export.runner.run_litert import find_litert, packed_labels
from mvit_export.system.reading import MODEL, check_regular

WRAPPER = "model"  # the attribute of the exported wrapper that holds the network


def openers() -> tuple[Opener, ...]:
    """The runtimes that check such a file here."""
    return (open_tflite,)


def open_tflite(artifact: Artifact) -> Session:
    """LiteRT on its CPU kernels (XNNPACK): ai-edge-litert, else its predecessor tflite-runtime."""
    runtime, opened = open_in("litert", artifact)
    return Session(f"{runtime.name} {runtime.version} CPU", opened.call, labels_of(opened))


def stored_labels(artifact: Artifact) -> tuple[str, ...] | None:
    """The labels that are packed into the file, for runtimes that do not read them."""
    try:
        labels = packed_labels(str(artifact.model_path))
    except ValueError as error:
        raise ArtifactError(f"{artifact.model_path}: {error}; export again") from error
    return None if labels is None else tuple(labels)


def litert_runtime() -> tuple[str, str, Any]:
    """(distribution, version, Interpreter class) of whichever TFLite runtime is installed, the successor first."""
    with refusals():
        distribution, version, module = find_litert()
    return distribution, version, module.Interpreter


def read_layers(path: Path, array: np.ndarray, chains: Chains) -> Iterator[Intermediate]:
    """Run the interpreter's own kernels and keep all tensors: XNNPACK would hide those inside its partitions."""
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
    found by its chain of calls. If ops were fused, several places are joined by ";;".
    """
    found: dict[str, None] = {}
    for place in name.split(";;"):
        parts = place.partition(";")[0].split("/")
        if len(parts) >= 2 and parts[1].endswith(f"_{WRAPPER}"):
            fits = [path for path, chain in chains.items() if is_chain(parts[2:], chain)]
            # "Linear_to_out" also ends like an attribute "out": the longest match is the best.
            longest = max((len("".join(chains[path])) for path in fits), default=0)
            found.update(dict.fromkeys(path for path in fits if len("".join(chains[path])) == longest))
    return tuple(found)


def is_chain(parts: list[str], chain: tuple[str, ...]) -> bool:
    return len(parts) == len(chain) and all(p.endswith(f"_{attribute}") for p, attribute in zip(parts, chain))  # noqa: B905


def read_contents(path: Path) -> dict[str, Any]:
    require("ai_edge_litert", extra="tflite", purpose="to inspect TFLite files")
    from ai_edge_litert.tools import flatbuffer_utils

    from mvit_export.readers.tflite_graph import count_uses, read_graph

    check_regular(path, MODEL)
    model = flatbuffer_utils.read_model(str(path))
    names = [flatbuffer_utils.opcode_to_name(model, index) for index in range(len(model.operatorCodes))]
    operators = Counter(names[op.opcodeIndex] for graph in model.subgraphs for op in graph.operators)
    details = {"schema_version": model.version, "flex_operators": sum(n.startswith("Flex") for n in operators)}
    uses = {f"{use}_operators": count for use, count in count_uses(read_graph(path)).items()}
    return make_contents(details | uses, operators)


def write_product(path: Path, weights: np.ndarray) -> None:
    """One FULLY_CONNECTED with constant weights, with a signature."""
    require("ai_edge_litert", extra="tflite", purpose="to measure LiteRT's peak")
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    def record(kind: type, **fields: Any) -> Any:
        made = kind()
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    def tensor(name: str, buffer: int) -> Any:
        return record(
            schema.TensorT, name=name, shape=list(weights.shape), type=schema.TensorType.FLOAT32, buffer=buffer
        )

    builtin = schema.BuiltinOperator.FULLY_CONNECTED
    code = record(schema.OperatorCodeT, builtinCode=builtin, deprecatedBuiltinCode=builtin)
    operator = record(
        schema.OperatorT, opcodeIndex=0, inputs=[0, 1, -1], outputs=[2],
        builtinOptionsType=schema.BuiltinOptions.FullyConnectedOptions, builtinOptions=schema.FullyConnectedOptionsT(),
    )  # fmt: skip
    tensors = [tensor("x", 0), tensor("w", 1), tensor("y", 0)]
    graph = record(schema.SubGraphT, tensors=tensors, inputs=[0], outputs=[2], operators=[operator], name="main")
    x, y = ([record(schema.TensorMapT, name=name, tensorIndex=index)] for name, index in (("x", 0), ("y", 2)))
    signature = record(schema.SignatureDefT, signatureKey="serving_default", inputs=x, outputs=y, subgraphIndex=0)
    buffers = [schema.BufferT(), record(schema.BufferT, data=weights.view(np.uint8).ravel())]
    model = record(
        schema.ModelT, version=3, operatorCodes=[code], subgraphs=[graph], buffers=buffers, signatureDefs=[signature]
    )
    flatbuffer_utils.write_model(model, str(path))
