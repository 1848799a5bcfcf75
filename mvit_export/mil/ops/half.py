"""The pessimistic case: products and sums rounded to fp16 one by one, in the order of the elements.

These replace the ops of the same name when a program is loaded with `accumulate="fp16"`, for outputs of type fp16.
They emulate a unit that multiplies fp16 by fp16, rounds, adds to an fp16 sum and rounds again, with no blocking and no
wider accumulator. Real fp16 accumulation, in blocks or trees, loses less: what passes here passes there. Slow.

Every other op, e.g. norms, softmax, pooling and transposed convolution, still computes in fp32 inside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mvit_export.mil.ops.convolution import PadType, pad_spatial, padding


def accumulate(shape: Iterable[int], products: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of products with fp16 rounding after each product and each addition; factors broadcast to `shape`."""
    total = torch.zeros(tuple(shape), dtype=torch.float16)
    for a, b in products:
        total += a.half() * b.half()
    return total.float()


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: PadType = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """Like `convolution.conv`, looped over kernel positions, then input channels."""
    nd = x.dim() - 2
    strides, dilations = strides or [1] * nd, dilations or [1] * nd
    span = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    x = pad_spatial(x, padding(pad_type, pad, tuple(x.shape[2:]), span, strides))
    out = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], span, strides, strict=True)]
    x = x.reshape(x.shape[0], groups, 1, -1, *x.shape[2:])  # (n, g, 1, C_in/g, *d)
    w = weight.reshape(groups, -1, *weight.shape[1:])  # (g, C_out/g, C_in/g, *k)

    def products() -> Iterable[tuple[Tensor, Tensor]]:
        for at in itertools.product(*map(range, weight.shape[2:])):
            cut = [
                slice(i * d, i * d + (o - 1) * s + 1, s) for i, d, o, s in zip(at, dilations, out, strides, strict=True)
            ]
            for c in range(weight.shape[1]):
                window: tuple[Any, ...] = (..., c, *cut)
                factor: tuple[Any, ...] = (..., c, *at)
                yield x[window], w[factor].reshape(groups, -1, *[1] * nd)

    y = accumulate((x.shape[0], groups, w.shape[1], *out), products()).flatten(1, 2)
    return y if bias is None else y + bias.reshape(-1, *[1] * nd)


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    x = x.transpose(-1, -2) if transpose_x and x.dim() > 1 else x
    y = y.transpose(-1, -2) if transpose_y and y.dim() > 1 else y
    left, right = x.dim() == 1, y.dim() == 1
    x, y = (x[None] if left else x), (y[:, None] if right else y)
    if x.shape[-1] != y.shape[-2]:
        raise ValueError(f"cannot multiply {tuple(x.shape)} by {tuple(y.shape)}")
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    products = ((x[..., :, k, None], y[..., None, k, :]) for k in range(x.shape[-1]))
    z = accumulate((*batch, x.shape[-2], y.shape[-1]), products)
    z = z.squeeze(-2) if left else z
    return z.squeeze(-1) if right else z


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = matmul(x, weight, transpose_y=True)
    return y if bias is None else y + bias


def einsum(values: list[Tensor], equation: str) -> Tensor:
    """MIL's einsum contracts one axis: the last of the first operand, the third from the end of the second."""
    x, y = values
    return matmul(x.movedim(-2, -3), y.movedim(-2, -3)).movedim(-3, -2)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Scores and weights are rounded too, as separate values."""
    scores = matmul(query, key, transpose_y=True) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return matmul(scores.half().float().softmax(-1), value)


def reduce_sum(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    dims = sorted({axis % x.dim() for axis in (range(x.dim()) if axes is None else axes)})
    kept = [n for axis, n in enumerate(x.shape) if axis not in dims]
    flat = x.movedim(dims, list(range(-len(dims), 0))).reshape(*kept, -1)
    total = accumulate(kept, ((column, torch.ones(())) for column in flat.unbind(-1)))
    return total.reshape([1 if axis in dims else n for axis, n in enumerate(x.shape)]) if keep_dims else total


def reduce_mean(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    total = reduce_sum(x, axes, keep_dims)
    return total / (x.numel() / max(total.numel(), 1))


OPS: dict[str, Callable[..., Any]] = {
    "conv": conv,
    "einsum": einsum,
    "linear": linear,
    "matmul": matmul,
    "reduce_mean": reduce_mean,
    "reduce_sum": reduce_sum,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
