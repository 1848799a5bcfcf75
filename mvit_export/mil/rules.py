"""What keeps an op off the Neural Engine, or makes it slow there, as far as a file shows it.

Apple publishes no static list of what the Neural Engine accepts; that varies by device, system version and size, and
Core ML decides on each anew. So these rules, collected from published observations, make a lint: an op that breaks
none of the blocking ones is eligible, and only a device can show where it is computed.

Not in the table, since it depends on data: activations above 1e2 or below 1e-4 lose precision. `Program.trace` measures
those shares on an input (`share_large` and `share_small` of `report.TensorStats`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mvit_export.mil.blob import PACKINGS
from mvit_export.mil.listing import Operand, Operation

MAX_RANK = 5
MAX_SIZE = 16384
MAX_CONV_KERNEL = 16
MAX_POOL_KERNEL = 13
MAX_POOL_STRIDE = 2
MAX_UPSAMPLE = 2
LAST_AXIS_BYTES = 64
DTYPES = frozenset({"FLOAT16", "INT8", "UINT8", "INT16"})

CONVS = frozenset({"conv", "conv_transpose"})
POOLS = frozenset({"avg_pool", "l2_pool", "max_pool"})
INDEXED = ("gather", "scatter")  # including all variants
RESIZES = ("upsample_", "resize")
SAME_ORDER = frozenset({"expand_dims", "flatten2d", "reshape", "reshape_like", "squeeze"})  # elements stay in order


def rank(op: Operation) -> bool:
    return any(len(x.shape) > MAX_RANK for x in (*op.activations, *op.weights))


def dtype(op: Operation) -> bool:
    return any(x.dtype not in DTYPES for x in (*op.activations, *op.weights))


def dynamic_shape(op: Operation) -> bool:
    return any(None in x.shape for x in op.activations)


def size(op: Operation) -> bool:
    return any(n is not None and n > MAX_SIZE for x in (*op.activations, *op.weights) for n in x.shape)


def conv_kernel(op: Operation) -> bool:
    weight = op.input("weight")
    return (
        op.type in CONVS and weight is not None and any(n is not None and n > MAX_CONV_KERNEL for n in weight.shape[2:])
    )


def pool_kernel(op: Operation) -> bool:
    return op.type in POOLS and max(op.constant("kernel_sizes", [1]), default=1) > MAX_POOL_KERNEL


def pool_stride(op: Operation) -> bool:
    return op.type in POOLS and max(op.constant("strides", [1]), default=1) > MAX_POOL_STRIDE


def upsample(op: Operation) -> bool:
    x = op.input("x")
    if not op.type.startswith(RESIZES) or x is None or not op.outputs:
        return False
    pairs = zip(x.shape[-2:], op.outputs[0].shape[-2:], strict=False)
    return any(before and after and after > MAX_UPSAMPLE * before for before, after in pairs)


def indexed(op: Operation) -> bool:
    return op.type.startswith(INDEXED)


def last_bytes(x: Operand) -> int | None:
    """Bytes of the last axis; None for a scalar, an open size and anything but a tensor."""
    if not x.shape or x.shape[-1] is None or x.dtype not in PACKINGS:
        return None
    return x.shape[-1] * PACKINGS[x.dtype].bits // 8


def singleton(op: Operation) -> bool:
    return any(x.shape and x.shape[-1] == 1 for x in op.activations)


def narrow(op: Operation) -> bool:
    """A last axis of 1 belongs to `singleton`, the worse case."""
    sizes = [last_bytes(x) for x in op.activations if x.shape[-1:] != (1,)]
    return any(n is not None and n < LAST_AXIS_BYTES for n in sizes)


def linear(op: Operation) -> bool:
    by_weight = op.type in ("matmul", "einsum") and bool(op.weights)
    return op.type == "linear" or by_weight


def innermost(op: Operation) -> bool:
    x = op.input("x")
    if x is None or not x.shape or not op.outputs:
        return False
    if op.type == "transpose":
        return (op.constant("perm", None) or [-1])[-1] % len(x.shape) != len(x.shape) - 1
    return op.type in SAME_ORDER and op.outputs[0].shape[-1:] != x.shape[-1:]


def made_by(x: Operand | None, *types: str) -> Operation | None:
    """The op that makes a value, if it is one of these."""
    return x.maker if x is not None and x.maker is not None and x.maker.type in types else None


def written_out_norm(op: Operation) -> bool:
    """1 / sqrt(mean((x - mean(x)) ** 2) + eps): recognised by its root, which may be rsqrt, sqrt or pow."""
    if op.type not in ("rsqrt", "sqrt", "pow"):
        return False
    root = op.input("x")
    shifted = made_by(root, "add")  # + eps, on either side
    variance = next((x for x in map(shifted.input, "xy") if x and not x.fixed), None) if shifted else root
    mean = made_by(variance, "reduce_mean")
    squared = made_by(mean.input("x"), "square", "mul", "pow") if mean else None
    centred = made_by(squared.input("x"), "sub") if squared else None
    return centred is not None and made_by(centred.input("y"), "reduce_mean") is not None


def softmax_axis(op: Operation) -> bool:
    if op.type == "scaled_dot_product_attention":
        return True
    x = op.input("x")
    return op.type == "softmax" and x is not None and bool(x.shape) and op.constant("axis", -1) % len(x.shape) != 1


def dilated(op: Operation) -> bool:
    return op.type in CONVS and max(op.constant("dilations", [1]), default=1) > 1


def tiled(op: Operation) -> bool:
    return op.type == "tile"


@dataclass(frozen=True)
class Rule:
    """`blocks`: an op that breaks it is not eligible; `slows`: it is eligible, at a price."""

    id: str
    severity: Literal["blocks", "slows"]
    text: str
    source: str
    broken: Callable[[Operation], bool]


APPLE = "apple/coreai-models, neural_engine_rules.md"
IRONMILL = "jafreck/ironmill, docs/design/ane-constraints.md"
HOLLANCE = "hollance/neural-engine"

# fmt: off
RULES = (  # worst first
    Rule("dtype", "blocks", "fp16, int8 or int16 only; fp32 falls back to GPU or CPU",
         f"{APPLE}: programming constraints", dtype),
    Rule("rank", "blocks", f"tensors of rank {MAX_RANK} at most",
         f"{APPLE}: programming constraints", rank),
    Rule("dynamic-shape", "blocks", "static shapes only; export one file per size",
         f"{APPLE}: programming constraints; apple/coremltools#2370", dynamic_shape),
    Rule("dimension", "blocks", f"no dimension above {MAX_SIZE}",
         f"{IRONMILL}: tensor constraints", size),
    Rule("gather-scatter", "blocks", "no gather and no scatter",
         f"{HOLLANCE}, docs/unsupported-layers.md; jafreck/ironmill, docs/design/ane-op-support-matrix.md", indexed),
    Rule("conv-kernel", "blocks", f"convolution kernels of {MAX_CONV_KERNEL} at most",
         f"{IRONMILL}: tensor constraints", conv_kernel),
    Rule("pool-kernel", "blocks", f"pooling kernels of {MAX_POOL_KERNEL} at most; reduce_mean has no such limit",
         f"{HOLLANCE}#2 (system log)", pool_kernel),
    Rule("pool-stride", "blocks", f"pooling strides of {MAX_POOL_STRIDE} at most",
         f"{HOLLANCE}#2 (system log)", pool_stride),
    Rule("upsample", "blocks", f"upsampling by {MAX_UPSAMPLE} at most; chain several",
         f"{HOLLANCE}#2 (system log)", upsample),
    Rule("singleton-last-axis", "slows", f"a last axis of 1 is padded to {LAST_AXIS_BYTES} bytes: 32 times fp16's",
         f"{APPLE}: tensor memory alignment; apple/ml-ane-transformers, principle 1", singleton),
    Rule("narrow-last-axis", "slows", f"a last axis below {LAST_AXIS_BYTES} bytes (32 numbers in fp16) is padded",
         f"{APPLE}: tensor memory alignment; apple/ml-ane-transformers, principle 1", narrow),
    Rule("linear", "slows", "a 1x1 convolution rather than linear, or a product with a constant matrix",
         f"{APPLE}: Conv2d instead of Linear; apple/ml-ane-transformers, principle 1", linear),
    Rule("innermost-axis", "slows", "a reshape or transpose that changes the innermost axis rewrites all memory",
         f"{APPLE}: unnecessary memory copies; apple/ml-ane-transformers, principle 3", innermost),
    Rule("split-norm", "slows", "layer_norm kept whole, not written out as mean, difference, square and root",
         f"{APPLE}: prefer high-level ops", written_out_norm),
    Rule("softmax-axis", "slows", "softmax over channels (axis 1), not a spatial or last axis; attention ops hide one",
         f"{APPLE}: softmax placement", softmax_axis),
    Rule("dilation", "slows", "no dilated convolution; hollance lists it as not supported, Apple as expensive",
         f"{APPLE}: dilated convolution factorization; {HOLLANCE}, docs/unsupported-layers.md", dilated),
    Rule("tile", "slows", "no tile: it copies; let an op broadcast",
         f"{APPLE}: unnecessary memory copies; roboflow/rf-detr#1495 (compute plan)", tiled),
)
# fmt: on
