"""Fewer bits for a Core ML program: weights in int8, int4 or palettes, and int8 activations, as a recipe says.

The program is rewritten in fp16 form: a weight becomes a `constexpr_` op, which Core ML unfolds when it loads or runs;
the input of an op in int8 goes through `quantize` and `dequantize`. Where weight and input are both int8, Core ML may
multiply in int8 (Apple's guide on activation quantization; which devices do can only be seen on a device).

The rewriting is a pass of the conversion itself: coremltools' own compression starts from a saved model and fails on a
classifier with a second output, such as logits. Ranges of activations are measured by running the fp16 program in our
executor: coremltools' data path runs on macOS only, and its torch path traces with torch.fx, which fails on a network
that looks at shapes, as MobileViT does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.converters.capture import Conversion
from mvit_export.converters.quantization.integers import COLOURS, SMALLEST_SCALE, fit_int4, to_int8
from mvit_export.converters.quantization.ranges import learn_ranges
from mvit_export.errors import ConversionError, UsageError
from mvit_export.formats.coreml import COREML
from mvit_export.formats.recipes import KINDS, WITH_WEIGHTS, Recipe, everything
from mvit_export.mil import load

POSSIBLE = {"float": tuple(KINDS), "weight": WITH_WEIGHTS, "dynamic": (), "static": (*WITH_WEIGHTS, "attention")}
ACTIVATIONS = (
    "clamped_relu", "elu", "gelu", "leaky_relu", "prelu", "relu", "relu6", "sigmoid", "sigmoid_hard", "silu",
    "softplus", "softsign", "tanh",
)  # fmt: skip
NORMS = ("batch_norm", "instance_norm", "l2_norm", "layer_norm", "local_response_norm")
BLOCK, LEAST_BLOCK = 32, 8  # input channels that share an int4 scale, if such blocks divide them evenly
SMALL = 64  # elements, at most, of a constant that is not a weight


# Which ops, and how


@dataclass(frozen=True)
class Constant:
    """A constexpr op to create; an argument may be another one."""

    type: str
    arguments: Mapping[str, Any]

    def build(self, mb: Any, op: Any, name: str) -> Any:
        """Create it before `op` and return its variable."""
        made = {
            key: value.build(mb, op, f"{name}_{key}") if isinstance(value, Constant) else value
            for key, value in self.arguments.items()
        }
        return getattr(mb, self.type)(**made, before_op=op, name=name)


@dataclass(frozen=True)
class Work:
    """An op of the program that can lose bits. `operands` are its inputs, by parameter, that are not constants."""

    name: str
    kind: str
    use: str
    operands: Mapping[str, str]  # parameter -> value
    weight: str | None  # the parameter that holds a constant
    axis: int = 0  # of the weight: its output channels
    inner: int = 1  # of the weight: its input channels


@dataclass(frozen=True)
class Plan:
    """What the pass does: ops by name, what replaces their weights, and the int8 scales of values."""

    works: Mapping[str, Work]
    weights: Mapping[str, Constant]
    scales: Mapping[str, np.float16]
    names: frozenset[str]  # of every op that had a module before


def plan_bits(mlmodel: Any, modules: Mapping[str, str], conversion: Conversion) -> Plan:
    """Decide from the freshly converted fp16 model what a second conversion will rewrite.

    Raises UsageError if a recipe asks for what Core ML cannot do, ConversionError if nothing would change.
    """
    recipe = conversion.recipe or everything("weight", name="weights")
    check_recipe(recipe)
    program = mlmodel._mil_program
    works = {work.name: work for work in find_work(program, modules, recipe) if work.use != "float"}
    if not works:
        raise ConversionError(f"recipe {recipe.name} asks for no part that this model has: nothing would lose bits")
    static = {value for work in works.values() if work.use == "static" for value in work.operands.values()}
    scales = measure_scales(mlmodel, conversion, static) if static else {}
    weights = shrink_weights(program, works, SHRINK[conversion.target.precision])
    return Plan(works, weights, scales, frozenset(modules))


def check_recipe(recipe: Recipe) -> None:
    """A rule that names kinds must be possible for each; one that names none applies to all that can."""
    for rule in () if recipe in COREML.recipes.values() else recipe.rules:
        kinds = () if rule.kinds == tuple(KINDS) else rule.kinds
        wrong = [kind for kind in kinds if kind not in POSSIBLE[rule.use]]
        if wrong or not POSSIBLE[rule.use]:
            able = ", ".join(use for use in POSSIBLE if not wrong or wrong[0] in POSSIBLE[use] if POSSIBLE[use])
            what = f"{rule.use} {wrong[0]}" if wrong else rule.use
            raise UsageError(f"recipe {recipe.name}: Core ML has no {what}, expected one of {able}")


def find_work(program: Any, modules: Mapping[str, str], recipe: Recipe) -> Iterator[Work]:
    for function in program.functions.values():
        for op in function.operations:
            if (kind := kind_of(op)) is not None:
                module = modules.get(op.outputs[0].name, "")
                use = recipe.use(kind, module)
                yield describe(op, kind, use if kind in POSSIBLE[use] else "float")


def kind_of(op: Any) -> str | None:
    """One of recipes.KINDS, None for ops that only move numbers."""
    if op.op_type in ("conv", "conv_transpose"):
        groups, width = op.groups.val, op.x.shape[1]
        if groups > 1 and groups == width:
            return "depthwise"
        return "conv1x1" if set(op.weight.shape[2:]) == {1} else "conv"
    if op.op_type == "matmul":
        return "linear" if is_constant(op.y) else None if is_constant(op.x) else "attention"
    if op.op_type in ("add", "sub", "mul", "concat"):
        return "elementwise"
    named = dict.fromkeys(ACTIVATIONS, "activation") | dict.fromkeys(NORMS, "norm")
    return (named | {"linear": "linear", "softmax": "softmax"}).get(op.op_type)


def is_constant(variable: Any) -> bool:
    return variable.op is not None and variable.op.op_type == "const"


def describe(op: Any, kind: str, use: str) -> Work:
    work = Work(op.outputs[0].name, kind, use, {}, None)
    if kind == "attention":
        return replace(work, operands={"x": op.x.name, "y": op.y.name})
    if kind not in WITH_WEIGHTS:
        return work
    work = replace(work, operands={"x": op.x.name}, weight="weight")
    if op.op_type == "matmul":
        last, inner = (-2, -1) if op.transpose_y.val else (-1, -2)
        return replace(work, weight="y", axis=last, inner=inner)
    if not is_constant(op.weight):
        return replace(work, weight=None)
    return replace(work, axis=1, inner=0) if op.op_type == "conv_transpose" else work


# Weights

Shrink = Callable[[np.ndarray, Work, bool], Constant | None]


def shrink_weights(program: Any, works: Mapping[str, Work], shrink: Shrink) -> dict[str, Constant]:
    """What replaces the weight of each op; those that would not become smaller are left out."""
    found = {}
    for function in program.functions.values():
        newer = function.opset_version.value >= ios18()
        for op in function.operations:
            work = works.get(op.outputs[0].name) if op.outputs else None
            if work and work.weight and (constant := shrink(weight_of(op, work), work, newer)):
                found[work.name] = constant
    return found


def weight_of(op: Any, work: Work) -> np.ndarray:
    value: np.ndarray = op.inputs[work.weight].val
    if not np.isfinite(value).all():
        raise ConversionError(f"the weight of {work.name} holds NaN or Inf in fp16 and cannot lose bits; use fp32")
    return value


def ios18() -> int:
    import coremltools as ct

    return int(ct.target.iOS18.value)


def keeps_8_bits(weight: np.ndarray, work: Work) -> bool:
    """Weights that are few and that everything passes through: 1x1, depthwise, and the first convolution."""
    return work.kind in ("conv1x1", "depthwise") or weight.shape[work.inner % weight.ndim] <= COLOURS


def shrink_int8(weight: np.ndarray, work: Work, newer: bool) -> Constant:
    """Symmetric, one scale for each output channel."""
    axis = work.axis % weight.ndim
    values, scale = to_int8(weight.astype(np.float32), axis, least=SMALLEST_SCALE)
    scale = scale.astype(weight.dtype)
    if newer:
        return Constant("constexpr_blockwise_shift_scale", {"data": values, "scale": scale})
    arguments = {"quantized_data": values, "scale": scale.reshape(-1), "zero_point": np.int8(0), "axis": np.int32(axis)}
    return Constant("constexpr_affine_dequantize", arguments)


def shrink_int4(weight: np.ndarray, work: Work, newer: bool) -> Constant:
    """Symmetric, one scale for each block of input channels; int8 where `keeps_8_bits`.

    Measured on a trained MobileViT-XXS: 26 dB this way; 14 dB with the first convolution in 4 bits too, 11 dB with all.
    """
    inner = work.inner % weight.ndim
    count = weight.shape[inner]
    if keeps_8_bits(weight, work):
        return shrink_int8(weight, work, newer)
    block = next((size for size in range(BLOCK, LEAST_BLOCK - 1, -1) if count % size == 0), count)
    blocks = weight.reshape(*weight.shape[:inner], count // block, block, *weight.shape[inner + 1 :])
    axis = work.axis % weight.ndim
    kept = {inner, axis + (axis > inner)}  # the block's number, and the output channel
    values, scale = fit_int4(blocks, tuple(i for i in range(blocks.ndim) if i not in kept))
    data = values.reshape(weight.shape).astype(types().nptype_from_builtin(types().int4))
    return Constant("constexpr_blockwise_shift_scale", {"data": data, "scale": scale.squeeze(inner + 1)})


def palettize(bits: int) -> Shrink:
    """A table of 2**bits values for each weight, and a scale for each output channel, without which channels of small
    weights would use few of the values.

    Measured on a trained MobileViT-XXS: 6 bits reach 24 dB with scales and 13 dB without. Channels are scaled to equal
    maxima, or to equal deviations for 4 bits, whose 16 values are better spent where most weights are.
    """

    def shrink(weight: np.ndarray, work: Work, newer: bool) -> Constant | None:
        if bits < 8 and keeps_8_bits(weight, work):
            return palettize(8)(weight, work, newer)
        entries, wide = 2**bits, weight.astype(np.float32)
        axes = tuple(i for i in range(weight.ndim) if i != work.axis % weight.ndim)
        size = wide.std(axis=axes, keepdims=True) if bits == 4 else np.abs(wide).max(axis=axes, keepdims=True)
        size = np.maximum(size, SMALLEST_SCALE)
        if weight.size * bits / 8 + entries + size.size * weight.itemsize >= weight.nbytes:
            return None  # table and scales outweigh what they save
        table, indices = cluster(wide / size, entries)
        step = np.abs(table).max() / 127
        unsigned = types().nptype_from_builtin(types().string_to_builtin(f"uint{bits}"))
        lut = np.round(table / step).astype(np.int8).reshape(*[1] * weight.ndim, entries, 1)
        dense = Constant("constexpr_lut_to_dense", {"indices": indices.astype(unsigned), "lut": lut})
        scale = np.maximum(size * step, SMALLEST_SCALE).astype(weight.dtype)
        return Constant("constexpr_blockwise_shift_scale", {"data": dense, "scale": scale})

    return shrink


def types() -> Any:
    """coremltools' types, some of which numpy lacks."""
    from coremltools.converters.mil.mil import types

    return types


def cluster(weight: np.ndarray, count: int, *, rounds: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """(`count` values, the index of the nearest for each weight): Lloyd's k-means on a line.

    It starts at even quantiles, so that equal weights always give equal palettes.
    """
    values, inverse, counts = np.unique(weight.astype(np.float64), return_inverse=True, return_counts=True)
    centres = np.quantile(np.repeat(values, counts), (np.arange(count) + 0.5) / count)
    for _ in range(rounds):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
        size = np.bincount(nearest, counts, count)
        moved = np.where(size > 0, np.bincount(nearest, counts * values, count) / np.maximum(size, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = np.sort(moved)
    nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
    return centres, nearest[inverse].reshape(weight.shape)


SHRINK: Mapping[str, Shrink] = {
    "int8-weight": shrink_int8,
    "int8": shrink_int8,
    "int4-weight": shrink_int4,
    "palette8": palettize(8),
    "palette6": palettize(6),
    "palette4": palettize(4),
}


# Activations


def measure_scales(mlmodel: Any, conversion: Conversion, values: set[str]) -> dict[str, np.float16]:
    """The int8 scale of each value, from its range on the calibration's inputs."""
    assert conversion.calibration is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.mlpackage"
        mlmodel.save(str(path))
        program = load(path)
    (feature,) = program.inputs.values()
    batch = feature.shapes[0][0]

    def passes() -> Iterator[dict[str, np.ndarray]]:
        for array in conversion.calibration_inputs():
            inputs = {feature.name: np.repeat(array, batch, axis=0)}
            yield {name: t.numpy() for _, name, t in program.intermediates(**inputs) if name in values}

    ranges = learn_ranges(passes, conversion.calibration.method)
    limits = {name: max(-low, high) for name, (low, high) in ranges.items()}
    if missing := sorted(values - limits.keys()):
        raise ConversionError(f"{missing[0]} is not an op's result, so its range cannot be measured; keep it float")
    return {name: np.float16(max(limit / 127, SMALLEST_SCALE)) for name, limit in limits.items()}


# The program


def add_pass(pipeline: Any, plan: Plan) -> None:
    """Append the rewriting to a pipeline of coremltools' passes."""
    from coremltools.converters.mil.mil import Builder
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.helper import block_context_manager
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

    name = "mvit_export::lose_bits"
    if name not in PASS_REGISTRY.passes:

        @register_pass(namespace="mvit_export")
        class lose_bits(AbstractGraphPass):  # noqa: N801 (the registry takes the pass's name from it)
            plan: Plan | None = None  # set as an option of the pipeline

            def apply(self, program: Any) -> None:
                assert self.plan is not None
                for function in program.functions.values():
                    block_context_manager(rewrite)(function, Builder, self.plan)

    pipeline.append_pass("mil_backend::sanitize_name_strings")  # names as in a saved model and in the plan
    pipeline.append_pass(name)
    pipeline.set_options(name, {"plan": plan})


def rewrite(block: Any, mb: Any, plan: Plan) -> None:
    """Constexpr ops in place of weights, and pairs of quantize and dequantize before ops in int8."""
    pairs: dict[str, Any] = {}
    for op in list(block.operations):
        work = plan.works.get(op.outputs[0].name) if op.outputs else None
        if work is None:
            continue
        if work.name in plan.weights and work.weight is not None:
            replace_input(op, op.inputs[work.weight], plan.weights[work.name].build(mb, op, f"{work.name}_w"))
        for parameter in work.operands if work.use == "static" else ():
            old = op.inputs[parameter]
            pairs[old.name] = pairs.get(old.name) or make_pair(mb, op, old, plan.scales[work.operands[parameter]])
            replace_input(op, old, pairs[old.name])
    share_constants(block)


def share_constants(block: Any) -> None:
    """Merge small constants of equal type and value, such as axes and types: hundreds of them take a tenth of a small
    network in int8. coremltools' own pass skips strings, and treats nearly equal numbers as equal.
    """
    first: dict[Any, Any] = {}
    for op in list(block.operations):
        if op.op_type != "const" or op.outputs[0] in block.outputs:
            continue
        value = np.asarray(op.val.val)
        if value.size > SMALL:
            continue
        variable = op.outputs[0]
        known = first.setdefault((str(variable.dtype), value.shape, value.tobytes()), variable)
        if known is not variable:
            block.replace_uses_of_var_after_op(anchor_op=op, old_var=variable, new_var=known, no_check_var_types=True)
            block.remove_ops([op])


def make_pair(mb: Any, op: Any, value: Any, scale: np.float16) -> Any:
    shared = mb.const(val=scale, before_op=op, name=f"{value.name}_scale")
    small = mb.quantize(input=value, scale=shared, output_dtype="int8", before_op=op, name=f"{value.name}_q")
    return mb.dequantize(input=small, scale=shared, before_op=op, name=f"{value.name}_dq")


def replace_input(op: Any, old: Any, new: Any) -> None:
    """In this op only."""
    operations = list(op.enclosing_block.operations)
    before = operations[operations.index(op) - 1]
    op.enclosing_block.replace_uses_of_var_after_op(
        anchor_op=before, end_op=op, old_var=old, new_var=new, no_check_var_types=True
    )


def check_done(mlmodel: Any, plan: Plan) -> None:
    """Raises ConversionError if anything that was to lose bits stayed as it was."""
    functions = mlmodel._mil_program.functions.values()
    found = {op.outputs[0].name: op for function in functions for op in function.operations if op.outputs}
    for work in plan.works.values():
        inputs = found[work.name].inputs if work.name in found else {}
        if work.name in plan.weights and not maker_of(inputs.get(work.weight)).startswith("constexpr_"):
            raise ConversionError(f"coremltools left the weight of {work.name} as it was")
        if work.use == "static" and any(maker_of(inputs.get(name)) != "dequantize" for name in work.operands):
            raise ConversionError(f"coremltools left the input of {work.name} as it was")


def maker_of(value: Any) -> str:
    op = getattr(value, "op", None)
    return op.op_type if op is not None else ""
