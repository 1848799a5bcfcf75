"""Int8, int16 and int4 in a .tflite file through litert-quantizer, op by op as a recipe says.

Inputs and outputs stay float (or pictures). What XNNPACK, LiteRT's kernels for CPUs, makes of it:

- It runs every op of a MobileViT with static convolutions, linear layers, SiLU and sums; it leaves static softmax,
  attention products and norms to slower kernels, and each breaks the graph into two more parts. With everything static
  the model is three times slower than fp32.
- It has dynamic convolutions and linear layers, but no dynamic depthwise ones.
- With 4-bit weights it has only linear layers, in dynamic int8 arithmetic. So int4-weight means those in blocks of 32
  (one scale per row where the width is not a multiple of 32), and 8-bit weights for the convolutions.
- It has no int16: those files are for accelerators, and slow on a CPU.

The predecessor, tflite-runtime 2.14, miscomputes linear layers with a scale for each row if they are dynamic or int16,
and crashes on 4 bits. The quantizer leaves their version number as it was; we raise it to the one that stands for such
layers, so that an old runtime refuses the file.

Moves of data (reshapes, slices, padding) follow the static op beside them, which changes no value. A static layer
whose output is the network's uses dynamic ranges: its output is float, and a score beyond every calibrated one would
be clipped.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvit_export.converters.capture import Conversion
from mvit_export.converters.quantization.ranges import Range, learn_ranges
from mvit_export.converters.tflite.parts import MOVES, kinds_of
from mvit_export.errors import ConversionError, UsageError, require
from mvit_export.formats.recipes import KINDS, WITH_WEIGHTS, Recipe, Rule, everything
from mvit_export.readers.tflite_graph import Graph, Op, read_graph

# The recipes of precisions that have only one.
RECIPES = {
    "int8-weight": everything("weight", name="int8-weight"),
    "int8-dynamic": Recipe("int8-dynamic", (Rule("dynamic", ("conv", "conv1x1", "linear")), Rule("weight"))),
    "int16": Recipe("int16", (Rule("float", ("norm",)), Rule("static"))),
    "int4-weight": Recipe("int4-weight", (Rule("dynamic", ("linear",)), Rule("weight"))),
}
BLOCK = 32
PER_ROW = 12  # the version of FULLY_CONNECTED whose kernels know a scale for each row
NAMES = {"TRANSPOSE_CONV": "CONV_2D_TRANSPOSE"}  # where the quantizer has another name for an op

Uses = Mapping[int, str]  # op: how it is to work; other ops stay float


def quantize(path: Path, conversion: Conversion) -> None:
    """Quantize the fp32 file `path` in place, as the conversion's precision and recipe say.

    Raises ConversionError if the quantizer left out what the recipe asks for.
    """
    precision = conversion.target.precision
    shorten_names(path)
    graph = read_graph(path)
    recipe = conversion.recipe or RECIPES[precision]
    kinds = kinds_of(graph, conversion.module, torch.zeros(conversion.model.input_shapes[0]))
    uses = plan(graph, kinds, recipe)
    ranges = calibrate(graph, path, uses, conversion) if "static" in uses.values() else None
    apply(graph, path, uses, precision, ranges)
    check_done(graph, read_graph(path), uses)
    if any(graph.ops[index].type == "FULLY_CONNECTED" and use != "weight" for index, use in uses.items()):
        raise_version(path, "FULLY_CONNECTED", PER_ROW)


def check_recipe(recipe: Recipe) -> None:
    """Refuse a rule that gives a kind a use it cannot have here. A rule for all kinds means those that can."""
    for rule in recipe.rules:
        for kind in rule.kinds if rule.kinds != tuple(KINDS) else ():
            can = ("float", "weight", "dynamic", "static") if kind in WITH_WEIGHTS else ("float", "static")
            if rule.use not in can:
                raise UsageError(
                    f"recipe {recipe.name!r}: {kind} cannot be {rule.use!r} in TFLite, expected one of {', '.join(can)}"
                )


def plan(graph: Graph, kinds: Mapping[int, tuple[str, str]], recipe: Recipe) -> dict[int, str]:
    """How every op is to work; those left out stay float."""
    uses = {}
    for index, (kind, module) in kinds.items():
        use = recipe.use(kind, module)
        if use == "static" and kind in WITH_WEIGHTS and set(graph.ops[index].outputs) & set(graph.outputs):
            use = "dynamic"
        if use == "static" or (use != "float" and kind in WITH_WEIGHTS):
            uses[index] = use
    return follow(graph, uses)


def follow(graph: Graph, uses: Mapping[int, str]) -> dict[int, str]:
    """`uses` with the moves of data between static ops, or beside one."""
    static = {index for index, use in uses.items() if use == "static"}
    for forward, ops in ((True, graph.ops), (False, graph.ops[::-1])):
        for op in ops:
            taken = graph.activations(op)
            if op.type not in MOVES or any(graph.tensors[t].type != "FLOAT32" for t in taken):
                continue
            makers = [graph.makers.get(t) for t in taken]
            takers = [taker for t in op.outputs for taker in graph.takers.get(t, ())]
            beside = makers if forward else takers
            if beside and all(other is not None and other.index in static for other in beside):
                static.add(op.index)
    return {**uses, **dict.fromkeys(static, "static")}


def calibrate(graph: Graph, path: Path, uses: Uses, conversion: Conversion) -> dict[str, dict[str, np.ndarray]]:
    """The quantizer's record of ranges, for every tensor that a static op reads or writes.

    Its own calibration has only one method, a moving average, and holds all inputs in memory.
    """
    static = [op for op in graph.ops if uses.get(op.index) == "static"]
    tensors = sorted({t for op in static for t in (*graph.activations(op), *op.outputs)})
    assert conversion.calibration is not None
    passes = partial(run_calibration, path, tensors, conversion)
    ranges = share_ranges(static, graph, learn_ranges(passes, conversion.calibration.method))
    found = {}
    for t, (low, high) in ranges.items():
        shape = (1,) * len(graph.tensors[t].shape)
        found[graph.tensors[t].name] = {"min": np.full(shape, low, np.float32), "max": np.full(shape, high, np.float32)}
    return found


def run_calibration(path: Path, tensors: Iterable[int], conversion: Conversion) -> Iterator[dict[int, np.ndarray]]:
    """The values of these tensors for one calibration input after another."""
    from ai_edge_litert import interpreter as litert

    interpreter = litert.Interpreter(
        model_path=str(path),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    (details,) = interpreter.get_input_details()
    for array in conversion.calibration_inputs():
        interpreter.set_tensor(details["index"], np.repeat(array, details["shape"][0], axis=0))
        interpreter.invoke()
        yield {t: interpreter.get_tensor(t) for t in tensors}


def share_ranges(static: Iterable[Op], graph: Graph, ranges: Mapping[int, Range]) -> dict[int, Range]:
    """One range for all tensors that a move or a concatenation joins.

    Those ops cannot change a scale: with several, a conversion from int8 to int8 would be put before them, which
    rounds once more and which XNNPACK does not always support.
    """
    groups = {t: {t} for t in ranges}
    for op in static:
        if op.type in (*MOVES, "CONCATENATION"):
            joined = set().union(*(groups[t] for t in (*graph.activations(op), *op.outputs)))
            groups.update(dict.fromkeys(joined, joined))
    return {t: (min(ranges[o][0] for o in group), max(ranges[o][1] for o in group)) for t, group in groups.items()}


def apply(graph: Graph, path: Path, uses: Uses, precision: str, ranges: Mapping[str, Any] | None) -> None:
    """Let the quantizer rewrite the file. Ops are identified by the full names of their outputs."""
    quantizer = require("litert_quantizer", extra="tflite", purpose="to quantize TFLite files")
    work = quantizer.Quantizer(str(path))
    settings: dict[tuple[str, Any], list[str]] = defaultdict(list)
    for index, use in uses.items():
        op = graph.ops[index]
        scope = "".join(f"{graph.tensors[t].name};" for t in op.outputs)
        settings[NAMES.get(op.type, op.type), op_config(quantizer.qtyping, graph, op, use, precision)].append(scope)
    for (name, config), scopes in settings.items():
        regex = f"^(?:{'|'.join(map(re.escape, scopes))})$"
        work.update_quantization_recipe(regex, quantizer.qtyping.TFLOperationName(name), config)
    result = work.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    path.write_bytes(result.quantized_model)


def op_config(q: Any, graph: Graph, op: Op, use: str, precision: str) -> Any:
    """The quantizer's words for a use: bits and granularity of weights and activations."""
    weight = graph.weight(op)
    four = precision == "int4-weight" and use == "dynamic"
    blocks = four and weight is not None and weight.shape[-1] % BLOCK == 0
    granularity = q.QuantGranularity.BLOCKWISE_32 if blocks else q.QuantGranularity.CHANNELWISE
    wide = precision == "int16"
    return q.OpQuantizationConfig(
        # The kernels need int16 without a zero point, int8 with one.
        activation_tensor_config=q.TensorQuantizationConfig(16 if wide else 8, wide) if use == "static" else None,
        weight_tensor_config=q.TensorQuantizationConfig(4 if four else 8, True, granularity),
        compute_precision=q.ComputePrecision.FLOAT if use == "weight" else q.ComputePrecision.INTEGER,
        explicit_dequantize=use == "weight",
    )


def check_done(before: Graph, after: Graph, uses: Uses) -> None:
    """Whether every op works as planned. Raises ConversionError for the first that does not."""
    found = {after.name(op): after.use(op) for op in after.ops}
    for index, use in uses.items():
        op = before.ops[index]
        got = found.get(before.name(op), "gone")
        if got != use and op.outputs[0] not in before.outputs:
            raise ConversionError(
                f"the quantizer left {op.type} {before.name(op)!r} {got}, expected {use}: leave it out of the recipe"
            )


def raise_version(path: Path, op_type: str, version: int) -> None:
    """Let only runtimes that know at least this version of an op load the file."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(path))
    for index, code in enumerate(model.operatorCodes):
        if flatbuffer_utils.opcode_to_name(model, index) == op_type:
            code.version = max(code.version, version)
    flatbuffer_utils.write_model(model, str(path))


def shorten_names(path: Path) -> None:
    """Strip the packages from the tensors' names, "torch.nn.modules.conv.Conv2d_conv" -> "Conv2d_conv".

    In a file of int8 weights the names would be a seventh of all bytes. A name that would not be unique stays.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(path))
    tensors = [tensor for graph in model.subgraphs for tensor in graph.tensors]
    short = [re.sub(rb"(?<![^/;])(?:\w+\.)+", b"", tensor.name) for tensor in tensors]
    for tensor, name in zip(tensors, short, strict=True):
        if short.count(name) == 1:
            tensor.name = name
    flatbuffer_utils.write_model(model, str(path))
