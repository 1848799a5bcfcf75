"""The graph of a .tflite file: its ops and tensors, and the arithmetic in which each op works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvit_export.errors import require
from mvit_export.system.reading import MODEL, check_regular

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL")
CONVERSIONS = ("QUANTIZE", "DEQUANTIZE", "CAST")
WEIGHT_BITS = {"INT4": 4, "INT8": 8}
INTEGERS = ("INT8", "INT16")  # possible types of activations


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor; `data` holds the bytes of a constant."""

    name: str
    shape: tuple[int, ...]
    type: str  # such as FLOAT32
    data: Any = None
    scales: tuple[float, ...] = ()

    @property
    def constant(self) -> bool:
        return self.data is not None


@dataclass(frozen=True)
class Op:
    """One op; its tensors are indices, -1 meaning none."""

    index: int
    type: str  # such as CONV_2D
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """The main subgraph. Ops are in the order in which they run."""

    ops: tuple[Op, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    makers: Mapping[int, Op]  # tensor: the op that makes it
    takers: Mapping[int, Sequence[Op]]  # tensor: the ops that take it

    def activations(self, op: Op) -> list[int]:
        """The inputs of an op that are computed at run time."""
        return [t for t in op.inputs if t >= 0 and not self.tensors[t].constant]

    def weight(self, op: Op) -> Tensor | None:
        """The filter of a convolution or the matrix of a linear layer, also if a DEQUANTIZE unpacks it."""
        if len(op.inputs) < 2 or op.inputs[1] < 0 or op.type not in WEIGHTED:
            return None
        maker = self.makers.get(op.inputs[1])
        tensor = self.tensors[maker.inputs[0] if maker and maker.type == "DEQUANTIZE" else op.inputs[1]]
        return tensor if tensor.constant else None

    def name(self, op: Op) -> str:
        """The op's name: that of its first output."""
        return self.tensors[op.outputs[0]].name

    def use(self, op: Op) -> str:
        """One of `recipes.USES`: what the file does with this op."""
        kinds = {self.tensors[t].type for t in (*self.activations(op)[:1], op.outputs[0])}
        weight = self.weight(op)
        if op.type not in CONVERSIONS and kinds <= {*INTEGERS}:
            return "static"
        if weight is None or weight.type not in WEIGHT_BITS:
            return "float"
        return "weight" if op.inputs[1] in self.makers else "dynamic"


def read_graph(path: Path) -> Graph:
    """Read a file's main subgraph. Raises MissingDependencyError without ai-edge-litert."""
    require("ai_edge_litert", extra="tflite", purpose="to read TFLite files")
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    check_regular(path, MODEL)
    model = flatbuffer_utils.read_model(str(path))
    types = {value: name for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
    names = [flatbuffer_utils.opcode_to_name(model, index) for index in range(len(model.operatorCodes))]
    graph = model.subgraphs[0]
    ops = tuple(
        Op(index, names[op.opcodeIndex], tuple(map(int, op.inputs)), tuple(map(int, op.outputs)))
        for index, op in enumerate(graph.operators)
    )
    tensors = tuple(
        Tensor(
            tensor.name.decode(),
            () if tensor.shape is None else tuple(map(int, tensor.shape)),
            types[tensor.type],
            data if (data := model.buffers[tensor.buffer].data) is not None and len(data) else None,
            ()
            if tensor.quantization is None or tensor.quantization.scale is None
            else tuple(tensor.quantization.scale),
        )
        for tensor in graph.tensors
    )
    takers: dict[int, list[Op]] = {}
    for op in ops:
        for t in dict.fromkeys(op.inputs):
            takers.setdefault(t, []).append(op)
    makers = {t: op for op in ops for t in op.outputs}
    return Graph(ops, tensors, tuple(map(int, graph.inputs)), tuple(map(int, graph.outputs)), makers, takers)


def count_uses(graph: Graph) -> dict[str, int]:
    """How many ops use int8, by recipes' words; uses that no op has are left out."""
    found = [graph.use(op) for op in graph.ops]
    return {use: found.count(use) for use in ("weight", "dynamic", "static") if use in found}
