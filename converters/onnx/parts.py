"""What recipes refer to, found in an ONNX graph: the kind of work of each node, and its PyTorch module."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from mvit_export.errors import ConversionError, UsageError, require
from mvit_export.formats.recipes import WITH_WEIGHTS, Recipe
from mvit_export.readers.onnx import onnx_modules

SIGMOIDS = ("Sigmoid", "HardSigmoid")
KIND_OF_OP = {
    "Softmax": "softmax",
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"), "norm"),
    **dict.fromkeys((*SIGMOIDS, "Relu", "LeakyRelu", "Elu", "Tanh", "Gelu", "HardSwish", "Swish"), "activation"),
    **dict.fromkeys(("Add", "Mul", "Concat"), "elementwise"),
}
# What each kind can be besides float. `weight` finds nothing to do where there are no weights.
TAKES = {
    **dict.fromkeys(("conv", "conv1x1", "depthwise"), ("weight", "static")),
    "linear": ("weight", "dynamic", "static"),
    **dict.fromkeys(("attention", "softmax", "activation", "elementwise"), ("weight", "static")),
    "norm": ("weight",),
}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Part:
    """A node that a recipe can refer to. `weight` is its initializer, `axis` is its axis of output channels."""

    node: Any
    kind: str
    module: str
    weight: str | None = None
    axis: int = 0

    @property
    def output(self) -> str:
        return str(self.node.output[0])

    def inputs(self, computed: Container[str]) -> list[str]:
        """The `computed` tensors that it reads."""
        return [name for name in self.node.input if name in computed]

    def plain_weight(self) -> str:
        """`weight` of a node that only multiplies by it and adds a bias. Raises ConversionError for any other."""
        plain = {"transA": 0, "alpha": 1.0, "beta": 1.0}
        odd = [name for name, value in plain.items() if attribute(self.node, name, value) != value]
        if self.weight is None or odd:
            raise ConversionError(f"{self.node.name} ({self.module}) has {', '.join(odd)} and cannot be int8")
        return self.weight


def find_parts(model: Any) -> list[Part]:
    """The parts of a model in the order of its nodes."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    floats, parts = float_tensors(model), []
    for node in model.graph.node:
        kind, modules = kind_of(node, shapes, makers), onnx_modules(node)
        if kind in WITH_WEIGHTS:
            parts.append(Part(node, kind, modules[0] if modules else "", node.input[1], output_axis(node)))
        elif kind and modules and node.output[0] in floats:  # without a module: preprocessing, which stays float
            parts.append(Part(node, kind, modules[0]))
    return parts


def kind_of(node: Any, shapes: Shapes, makers: Mapping[str, Any]) -> str | None:
    """One of recipes.KINDS; None for what recipes do not cover, such as the addition of a bias."""
    if node.op_type == "Conv":
        return kind_of_conv(node, shapes)
    constants = [name in shapes for name in node.input]
    if node.op_type in ("MatMul", "Gemm") and not constants[0]:
        flat = constants[1] and len(shapes[node.input[1]]) == 2
        return "linear" if flat else "attention" if not any(constants) else None
    kind = KIND_OF_OP.get(node.op_type)
    if kind == "elementwise":
        if any(name in makers and makers[name].op_type in SIGMOIDS for name in node.input) and node.op_type == "Mul":
            return "activation"  # x * sigmoid(x), SiLU
        return None if any(constants) else kind
    return kind


def kind_of_conv(node: Any, shapes: Shapes) -> str | None:
    if node.input[1] not in shapes:
        return None
    _, inputs, *kernel = shapes[node.input[1]]
    if inputs == 1 and attribute(node, "group", 1) > 1:
        return "depthwise"
    return "conv1x1" if set(kernel) == {1} else "conv"


def output_axis(node: Any) -> int:
    """Convolutions hold (out, in / groups, ...), linears (in, out) unless transposed."""
    return 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1


def attribute(node: Any, name: str, default: Any) -> Any:
    """A number among a node's attributes."""
    onnx = require("onnx", extra="onnx", purpose="to write ONNX files")
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def float_tensors(model: Any) -> set[str]:
    """Names of all float32 tensors except initializers: shapes are computed by additions and products too."""
    onnx = require("onnx", extra="onnx", purpose="to write ONNX files")
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}


def choose_uses(parts: list[Part], recipe: Recipe) -> dict[str, str]:
    """The recipe's use for each part, by the part's first output. Raises UsageError for one that ONNX does not have."""
    chosen = {part.output: recipe.use(part.kind, part.module) for part in parts}
    for part in parts:
        use, takes = chosen[part.output], ("float", *TAKES[part.kind])
        if use not in takes:
            raise UsageError(
                f"recipe {recipe.name} asks for {use} {part.kind} in {part.module or 'the network'}; "
                f"in ONNX {part.kind} can be {', '.join(takes)}"
            )
    return chosen
