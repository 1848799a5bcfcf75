"""Weights and ranges as integers with scales. Needs only numpy."""

from __future__ import annotations

import math

import numpy as np

BLOCK = 32  # weights that share a scale in 4 bits, at most
LEAST_BLOCK = 16  # with fewer weights the scales would take as much as the bits save
SHRINKS = np.linspace(0.7, 1.0, 16)  # of the scale that reaches a block's largest weight; the best one is used
CUTS = np.linspace(1.0, 0.5, 26)  # shares of the largest weight that 4 bits may be made to hold
SMALLEST_SCALE = 2.0**-24  # that fp16 can hold
COLOURS = 4  # channels of a picture, at most: a convolution with no more is the network's first
BIAS_LIMIT = 2**30  # half of what int32 holds: the other half is for the sum of products


def to_int8(weights: np.ndarray, axis: int, *, least: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with a scale for each index of `axis`, at least `least`: (integers, scales that broadcast)."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    scale = np.maximum(np.abs(weights).max(axis=others, keepdims=True) / 127, least)
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    return np.clip(np.rint(weights / scale), -127, 127).astype(np.int8), scale


def to_uint8(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero point (uint8) for values from `low` to `high`; zero itself is always exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    return np.array(scale), np.array(np.clip(round(-low / float(scale)), 0, 255), np.uint8)


def split_blocks(weights: np.ndarray, axis: int) -> tuple[np.ndarray, int] | None:
    """Weights in equal blocks along what is summed over, and the axis within a block; None if that is too short.

    `axis` holds the output channels and is the first or the last.
    """
    channels = weights.shape[axis]
    length = weights.size // channels
    block = max(size for size in range(1, BLOCK + 1) if length % size == 0)
    if block < LEAST_BLOCK:
        return None
    if axis == 0:
        return weights.reshape(channels, length // block, block), 2
    return weights.reshape(length // block, block, channels), 1


def to_int4(weights: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers from -8 to 7 with one scale along `axis`, the one with the least squared error among SHRINKS.

    The scale has the sign that puts the largest weight at -8, the side with one more value.
    """
    extreme = np.take_along_axis(weights, np.abs(weights).argmax(axis, keepdims=True), axis) / -8
    extreme = np.where(extreme != 0, extreme, 1.0)
    best, least = extreme, np.full(extreme.shape, math.inf)
    for shrink in SHRINKS:
        scale = extreme * shrink
        error = ((np.clip(np.rint(weights / scale), -8, 7) * scale - weights) ** 2).sum(axis, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    scale = best.astype(np.float32)
    return np.clip(np.rint(weights / scale), -8, 7).astype(np.int8), scale


def fit_int4(weight: np.ndarray, shared: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(integers from -8 to 7, scales shared along the axes `shared`), for the cut in CUTS of least squared error."""
    wide = weight.astype(np.float32)
    largest = np.abs(wide).max(axis=shared, keepdims=True)
    values, scale, least = np.zeros_like(wide), np.ones_like(largest), np.full_like(largest, np.inf)
    for cut in CUTS:
        tried = np.maximum(cut * largest / 7, SMALLEST_SCALE).astype(weight.dtype).astype(np.float32)
        found = np.clip(np.round(wide / tried), -8, 7)
        error = ((wide - found * tried) ** 2).sum(axis=shared, keepdims=True)
        better = error < least
        values, scale = np.where(better, found, values), np.where(better, tried, scale)
        least = np.minimum(least, error)
    return values, scale.astype(weight.dtype)


def to_bias(bias: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """int32 in units of `unit` (float32), one for each channel."""
    return np.rint(bias.astype(np.float64) / unit).astype(np.int32)


def pack_int4(integers: np.ndarray) -> bytes:
    """Two to a byte, the first in the lower half, as ONNX stores them."""
    nibbles = np.pad(integers.ravel().view(np.uint8) & 0xF, (0, integers.size % 2))
    return bytes(nibbles[::2] | nibbles[1::2] << 4)
