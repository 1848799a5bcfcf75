"""Convolution, pooling, linear and matrix products. Semantics: coremltools' `ops/defs/iOS15/{conv,pool,linear}.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PadType = Literal["valid", "custom", "same", "same_lower"]
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOLS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def padding(
    pad_type: str, pad: list[int] | None, size: tuple[int, ...], kernel: list[int], strides: list[int]
) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis. "same" puts the odd element after, "same_lower" before."""
    if pad_type == "valid":
        return [(0, 0)] * len(kernel)
    if pad_type == "custom":
        pad = pad or [0] * (2 * len(kernel))
        return list(zip(pad[::2], pad[1::2], strict=True))
    pairs = []
    for n, k, s in zip(size, kernel, strides, strict=True):
        total = max(0, (math.ceil(n / s) - 1) * s + k - n)
        less, more = total // 2, total - total // 2
        pairs.append((less, more) if pad_type == "same" else (more, less))
    return pairs


def pad_spatial(x: Tensor, pairs: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pad the last axes by (before, after); negative numbers crop."""
    if not any(before or after for before, after in pairs):
        return x
    return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=value)


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
    """x (n, C_in, *d), weight (C_out, C_in / groups, *k) -> (n, C_out, *d_out), 1 to 3 spatial axes."""
    nd = x.dim() - 2
    strides, dilations = strides or [1] * nd, dilations or [1] * nd
    kernel = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    pairs = padding(pad_type, pad, tuple(x.shape[2:]), kernel, strides)
    if all(before == after for before, after in pairs):
        return CONVS[nd](x, weight, bias, strides, [before for before, _ in pairs], dilations, groups)
    return CONVS[nd](pad_spatial(x, pairs), weight, bias, strides, 0, dilations, groups)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: Literal["valid", "custom", "same"] = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """x (n, C_in, *d), weight (C_in, C_out / groups, *k) -> (n, C_out, *d_out): the whole result, then cropped."""
    nd = x.dim() - 2
    strides, dilations = strides or [1] * nd, dilations or [1] * nd
    whole = TRANSPOSED[nd](x, weight, None, strides, 0, 0, groups, dilations)
    crop = pad if pad_type == "custom" and pad else [0] * (2 * nd)
    pairs = []
    for axis in range(nd):
        full, before, after = whole.shape[axis + 2], crop[2 * axis], crop[2 * axis + 1]
        size = full - before - after
        if output_shape is not None:
            size = output_shape[axis + 2]
        elif pad_type == "same":
            size = x.shape[axis + 2] * strides[axis]
        if pad_type == "same":
            before = max(full - size, 0) // 2
        pairs.append((-before, size - (full - before)))
    y = pad_spatial(whole, pairs)
    return y if bias is None else y + bias.reshape(1, -1, *[1] * nd)


def max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None = None,
    pad_type: PadType = "valid",
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Largest value of each window; padding never wins."""
    strides = strides or [1] * len(kernel_sizes)
    pairs = padding(pad_type, pad, tuple(x.shape[2:]), kernel_sizes, strides)
    pool = MAX_POOLS[len(kernel_sizes)]
    if torch_pads(pairs, kernel_sizes):
        return pool(x, kernel_sizes, strides, [before for before, _ in pairs], ceil_mode=ceil_mode)
    return pool(pad_spatial(x, pairs, -math.inf), kernel_sizes, strides, ceil_mode=ceil_mode)


def avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None = None,
    pad_type: PadType = "valid",
    pad: list[int] | None = None,
    ceil_mode: bool = False,
    exclude_padding_from_average: bool = False,
) -> Tensor:
    """Mean of each window; padded zeros count unless `exclude_padding_from_average`."""
    strides = strides or [1] * len(kernel_sizes)
    pairs = padding(pad_type, pad, tuple(x.shape[2:]), kernel_sizes, strides)
    pool, counted = AVG_POOLS[len(kernel_sizes)], not exclude_padding_from_average
    if torch_pads(pairs, kernel_sizes):
        return pool(x, kernel_sizes, strides, [before for before, _ in pairs], ceil_mode, counted)
    mean = pool(pad_spatial(x, pairs), kernel_sizes, strides, 0, ceil_mode)
    if counted:
        return mean
    share = pool(pad_spatial(torch.ones_like(x[:1, :1]), pairs), kernel_sizes, strides, 0, ceil_mode)
    return mean / share


def l2_pool(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None = None,
    pad_type: PadType = "valid",
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Square root of the sum of squares of each window."""
    strides = strides or [1] * len(kernel_sizes)
    pairs = padding(pad_type, pad, tuple(x.shape[2:]), kernel_sizes, strides)
    if ceil_mode:  # a window that overhangs the edge would be divided by fewer elements than it is multiplied by
        pairs = [(b, a + s - 1) for (b, a), s in zip(pairs, strides, strict=True)]
    mean = AVG_POOLS[len(kernel_sizes)](pad_spatial(x * x, pairs), kernel_sizes, strides)
    return (mean * math.prod(kernel_sizes)).sqrt()


def torch_pads(pairs: list[tuple[int, int]], kernel: list[int]) -> bool:
    """Whether torch's own pooling can pad this way: symmetric, and by at most half of the window."""
    return all(before == after <= k // 2 for (before, after), k in zip(pairs, kernel, strict=True))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D_in), weight (D_out, D_in) -> (..., D_out)."""
    return F.linear(x, weight, bias)


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """Batched product as in numpy, of transposed operands if requested; 1-D operands are never transposed."""
    x = x.transpose(-1, -2) if transpose_x and x.dim() > 1 else x
    y = y.transpose(-1, -2) if transpose_y and y.dim() > 1 else y
    return torch.matmul(x, y)


def einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(E) + mask) V over (B, *, L, E); a boolean mask says which keys take part."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


OPS: dict[str, Callable[..., Any]] = {
    "avg_pool": avg_pool,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "einsum": einsum,
    "l2_pool": l2_pool,
    "linear": linear,
    "matmul": matmul,
    "max_pool": max_pool,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
