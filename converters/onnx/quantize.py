"""Fewer bits in an ONNX graph, with standard operators only, each in the form that ONNX Runtime runs best.

weight    the integers, Cast and Mul by the scales: computed once at load, so that the file runs like the float one.
          A DequantizeLinear would stay in every run and prevent the blocked convolutions (measured: 1.25 to 1.31 times
          the latency of float for all weights in 8 bits, 1.31 in 4 bits; with Cast and Mul 1.00).
dynamic   DynamicQuantizeLinear and MatMulInteger, which run as one DynamicQuantizeMatMul.
static    QuantizeLinear and DequantizeLinear around the float operator, which run as one QLinear operator.

Activations are unsigned, weights signed with a scale for each output channel: the pair that the x86 kernels are
written for. Of these, the ones for AVX2 and AVX-512 without VNNI add pairs of products in 16 bits and saturate, unless
the session option session.x64quantprecision is 1, as in the runner's sessions there. Tensors keep their names, and a
new node that computes one of them carries the PyTorch module of the old one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mvit_export.converters.capture import Conversion
from mvit_export.converters.onnx.calibrate import calibrate
from mvit_export.converters.onnx.parts import Part, choose_uses, find_parts, float_tensors
from mvit_export.converters.quantization.integers import (
    BIAS_LIMIT,
    COLOURS,
    pack_int4,
    split_blocks,
    to_bias,
    to_int4,
    to_int8,
    to_uint8,
)
from mvit_export.converters.quantization.ranges import Range
from mvit_export.errors import require
from mvit_export.formats.recipes import Recipe, Rule, everything

# Precisions with one recipe each.
RECIPES = {
    "int8-weight": everything("weight", name="int8-weight"),
    "int8-dynamic": Recipe("int8-dynamic", (Rule("dynamic", ("linear",)), Rule("weight"))),
    "int4-weight": everything("weight", name="int4-weight"),
}
FLOAT = 1  # onnx.TensorProto.FLOAT


def quantize(model: Any, conversion: Conversion) -> None:
    """Rewrite the graph of `model` by the conversion's recipe, or by its precision's own if there is no choice.

    Raises UsageError for a use that ONNX does not have for a kind, and ConversionError where a node does not allow it.
    """
    precision = conversion.target.precision
    parts, floats = find_parts(model), float_tensors(model)
    uses = choose_uses(parts, conversion.recipe or RECIPES[precision])
    static = {name for part in parts if uses[part.output] == "static" for name in (*part.inputs(floats), part.output)}
    ranges = calibrate(model, sorted(static), conversion) if static else {}
    bits = 4 if precision == "int4-weight" else 8
    writer = Writer(model, ranges, {name for name, use in uses.items() if use == "static"}, bits)
    known = {part.output: part for part in parts}
    for node in list(model.graph.node):
        part = known.get(node.output[0])
        writer.write(node, part, "float" if part is None else uses[part.output])
    writer.finish()


def bears_4_bits(part: Part, weights: np.ndarray) -> bool:
    """All but layers with few weights. MobileViT-XXS trained on digits, worst of nine inputs: 24 dB with these; 10 dB
    with the 1x1 convolutions, which save only 3 % of the bytes; 0 dB and 8 points of top-1 with the first layer too.
    """
    return part.kind == "linear" or (part.kind == "conv" and weights.shape[1] > COLOURS)


@dataclass
class Writer:
    """The new graph as it grows, in the order of the old one."""

    model: Any
    ranges: Mapping[str, Range]  # of the tensors that static parts read or make
    static: set[str]  # those that static parts make: every reader gets the integers' values
    bits: int  # of `weight`
    nodes: list[Any] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # new initializers
    narrow: set[str] = field(default_factory=set)  # those of 4 bits
    made: set[str] = field(default_factory=set)  # outputs of the new nodes so far

    def __post_init__(self) -> None:
        self.onnx = require("onnx", extra="onnx", purpose="to write ONNX files")
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def write(self, node: Any, part: Part | None, use: str) -> None:
        if part is not None and use == "static":
            self.write_static(part)
        elif part is not None and use == "dynamic":
            self.write_dynamic(part)
        else:
            if part is not None and use == "weight" and part.weight is not None:
                node.input[1] = self.restored_weights(part.weight, part)
            self.nodes.append(node)

    def restored_weights(self, name: str, part: Part) -> str:
        """Integers that become floats again at load."""
        weights = self.array(name)
        blocks = split_blocks(weights, part.axis) if self.bits == 4 and bears_4_bits(part, weights) else None
        integers, scale = to_int8(weights, part.axis) if blocks is None else to_int4(*blocks)
        stored = self.constant(f"{name}_int{8 if blocks is None else 4}", integers, narrow=blocks is not None)
        cast = self.add("Cast", [stored], [f"{stored}_cast"], to=FLOAT)
        restored = self.add("Mul", [cast, self.constant(f"{stored}_scale", scale)], [f"{stored}_restored"])
        if blocks is None:
            return restored
        shape = self.constant(f"{name}_shape", np.array(weights.shape, np.int64))
        return self.add("Reshape", [restored, shape], [f"{stored}_whole"])

    def write_dynamic(self, part: Part) -> None:
        """A linear layer in int8 that finds the range of its input on each run."""
        node, (x, _, *bias), y, weight = part.node, part.node.input, part.output, part.plain_weight()
        weights = self.array(weight)
        integers, scale = to_int8(weights if part.axis == 1 else weights.T, 1)  # (in, out), (1, out)
        stored = self.constant(f"{weight}_int8", integers)
        dynamic = [f"{x}_dynamic", f"{x}_dynamic_scale", f"{x}_dynamic_zero"]
        self.add("DynamicQuantizeLinear", [x], dynamic)
        sums = self.add("MatMulInteger", [dynamic[0], stored, dynamic[2]], [f"{y}_int32"])
        cast = self.add("Cast", [sums], [f"{y}_cast"], to=FLOAT)
        unit = self.add("Mul", [dynamic[1], self.constant(f"{stored}_scales", scale[0])], [f"{y}_unit"])
        product = self.add("Mul", [cast, unit], [f"{y}_product" if bias else y], like=None if bias else node)
        if bias:
            self.add("Add", [product, *bias], [y], like=node)

    def write_static(self, part: Part) -> None:
        """QuantizeLinear and DequantizeLinear around the float operator."""
        node, y = part.node, part.output
        if part.weight is not None:
            self.quantize_weights(part)
        for index, name in enumerate(node.input):
            if name in self.ranges and name not in self.static:
                node.input[index] = self.surround(name, name, f"{name}_static")
        node.output[0] = f"{y}_float"
        self.nodes.append(node)
        self.surround(node.output[0], y, y, like=node)

    def surround(self, source: str, ranged: str, result: str, *, like: Any = None) -> str:
        """`source` as unsigned integers in the range of `ranged`, and as floats again: `result`."""
        scale, zero = to_uint8(*self.ranges[ranged])
        form = [self.constant(f"{ranged}_static_scale", scale), self.constant(f"{ranged}_static_zero", zero)]
        integers = self.add("QuantizeLinear", [source, *form], [f"{ranged}_static_uint8"])
        return self.add("DequantizeLinear", [integers, *form], [result], like=like)

    def quantize_weights(self, part: Part) -> None:
        """int8 weights, and a bias in int32 in units of the input's scale times the weights', as the kernels expect.

        A channel with weights near zero gets a larger scale than they need, so that its bias fits.
        """
        node, weight = part.node, part.plain_weight()
        weights, unit = self.array(weight), to_uint8(*self.ranges[node.input[0]])[0]
        bias = self.array(node.input[2]) if len(node.input) > 2 else np.zeros(weights.shape[part.axis], np.float32)
        least = np.abs(bias) / (unit * BIAS_LIMIT)
        broadcast = [-1 if axis == part.axis else 1 for axis in range(weights.ndim)]
        integers, scale = to_int8(weights, part.axis, least=least.reshape(broadcast))
        node.input[1] = self.dequantized(f"{part.output}_weight", integers, scale.ravel(), part.axis)
        if len(node.input) > 2:
            units = unit * scale.ravel()
            node.input[2] = self.dequantized(f"{part.output}_bias", to_bias(bias, units), units, 0)

    def dequantized(self, name: str, integers: np.ndarray, scale: np.ndarray, axis: int) -> str:
        stored = [self.constant(name, integers), self.constant(f"{name}_scale", scale)]
        if integers.dtype == np.int8:  # or x64quantprecision makes one zero point for all channels, which is refused
            stored.append(self.constant(f"{name}_zero", np.zeros(scale.shape, np.int8)))
        return self.add("DequantizeLinear", stored, [f"{name}_float"], axis=axis)

    def array(self, name: str) -> np.ndarray:
        return self.onnx.numpy_helper.to_array(self.initializers[name])

    def constant(self, name: str, array: np.ndarray, *, narrow: bool = False) -> str:
        """A new initializer. Layers that share weights share it, unless they quantize them differently."""
        while name in self.arrays and not np.array_equal(self.arrays[name], array):
            name += "_"
        self.arrays[name] = array
        if narrow:
            self.narrow.add(name)
        return name

    def add(
        self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], *, like: Any = None, **attributes: int
    ) -> str:
        """Add a node unless it exists; returns its first output. It belongs to the module of `like`."""
        if outputs[0] not in self.made:
            node = self.onnx.helper.make_node(op_type, inputs, outputs, name=f"{op_type}_{outputs[0]}", **attributes)
            node.metadata_props.extend(like.metadata_props if like is not None else ())
            self.nodes.append(node)
            self.made.add(outputs[0])
        return outputs[0]

    def finish(self) -> None:
        """Put the new nodes and initializers into the graph; drop what nothing reads, and the inferred shapes."""
        graph, read = self.model.graph, {name for node in self.nodes for name in node.input}
        new = [self.tensor(name, array) for name, array in self.arrays.items()]
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        for entries, entry in ((graph.node, self.nodes), (graph.initializer, [*kept, *new]), (graph.value_info, [])):
            copies = [type(item).FromString(item.SerializeToString()) for item in entry]  # the originals die with `del`
            del entries[:]
            entries.extend(copies)

    def tensor(self, name: str, array: np.ndarray) -> Any:
        if name not in self.narrow:
            return self.onnx.numpy_helper.from_array(array, name)
        form = self.onnx.TensorProto.INT4
        return self.onnx.helper.make_tensor(name, form, array.shape, pack_int4(array), raw=True)
