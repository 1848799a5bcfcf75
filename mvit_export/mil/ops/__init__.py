"""The table of MIL ops: type -> function on torch tensors.

A function's parameters have the names that the op uses in the program, with MIL's defaults. Its annotations tell the
loader what to pass: `Tensor` a tensor, `list[Tensor]` several, `State` a state, everything else a Python value, read
once if it is constant; `Literal` lists the supported values; `ios` is the opset's iOS version. Parameters without an
annotation are tensors. fp16 values arrive as float32 tensors that hold fp16 numbers, so arithmetic inside an op runs in
fp32; the executor rounds the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mvit_export.mil.ops import compression, control, convolution, elementwise, gather, half, reduction, resize, shape

OPS: dict[str, Callable[..., Any]] = {
    **compression.OPS,
    **control.OPS,
    **convolution.OPS,
    **elementwise.OPS,
    **gather.OPS,
    **reduction.OPS,
    **resize.OPS,
    **shape.OPS,
}

HALF_ACCUMULATION: dict[str, Callable[..., Any]] = half.OPS

# Ops whose outputs are values they were given, so that fp16 stays fp16 and nothing needs rounding.
EXACT = frozenset(shape.OPS) | {
    "abs", "band_part", "gather", "gather_along_axis", "gather_nd", "identity", "max_pool", "maximum", "minimum",
    "read_state", "reduce_max", "reduce_min", "relu", "resize_nearest_neighbor", "select", "sign", "topk",
    "upsample_nearest_neighbor",
}  # fmt: skip
