"""The flat picture on which a network's norms see the least: where a wrong eps shows.

A norm divides by sqrt(var + eps). On photographs the variance is far above eps, so that a tenth of it changes a trained
MobileViT by less than 1e-5 of the scale; on a flat picture of the right colour by twice that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mvit_export.data.preprocessing import Preprocessing, to_tensor

if TYPE_CHECKING:
    from torch import Tensor, nn

Colour = tuple[int, int, int]
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
COLOURS: tuple[Colour, ...] = tuple(itertools.product((0, 128, 255), (0, 128, 255), (0, 128, 255)))
PREFIX = "flat-#"
LEAST_OF_EPS = 1e-3  # below this part of eps a variance counts as none: nothing passes through the norm
SMALL = 64  # pixels: what a norm sees of a flat picture hardly depends on the size


def name_of(colour: Colour) -> str:
    return PREFIX + "".join(f"{value:02x}" for value in colour)


def picture_of(name: str, size: tuple[int, int]) -> np.ndarray:
    """`flat-#008000` -> uint8 RGB (H, W, 3)."""
    return np.full((*size, 3), [*bytes.fromhex(name.removeprefix(PREFIX))], np.uint8)


def weakest_colour(module: nn.Module, preprocessing: Preprocessing, batch: int) -> Colour | None:
    """The colour with the smallest variance before any norm; None if the network has no such norm."""
    small = preprocessing.with_size((min(SMALL, preprocessing.crop[0]), min(SMALL, preprocessing.crop[1])))
    try:
        return weakest_in(module, small, batch)
    except Exception:  # a network of one size: by its own
        return weakest_in(module, preprocessing, batch)


def weakest_in(module: nn.Module, size: Preprocessing, batch: int) -> Colour | None:
    found = {colour: least_variance(module, to_tensor(picture(colour, size, batch), size)) for colour in COLOURS}
    best = min(found, key=lambda colour: found[colour])
    return best if found[best] < math.inf else None


def picture(colour: Colour, preprocessing: Preprocessing, batch: int) -> np.ndarray:
    return picture_of(name_of(colour), preprocessing.crop)[None].repeat(batch, axis=0)


def least_variance(module: nn.Module, array: np.ndarray) -> float:
    """The smallest variance over eps that a norm of the network gets, among those that are not none."""
    import torch

    with torch.no_grad(), watched(module) as seen:
        module(torch.from_numpy(array))
    return min((ratio for ratio in seen if ratio > LEAST_OF_EPS), default=math.inf)


@contextmanager
def watched(module: nn.Module) -> Iterator[list[float]]:
    """A list that gets the smallest variance over eps at every call of a norm."""
    from torch import nn

    seen: list[float] = []

    def note(norm: Any, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = args[0] if args else named["input"]
        axes = [-1] if isinstance(norm, nn.GroupNorm) else [*range(-len(norm.normalized_shape), 0)]
        rows = x.reshape(x.shape[0], norm.num_groups, -1) if isinstance(norm, nn.GroupNorm) else x
        seen.append(float(rows.var(axes, unbiased=False).min()) / norm.eps)

    norms = [part for part in module.modules() if type(part) in (nn.LayerNorm, nn.GroupNorm) and part.eps]
    hooks = [norm.register_forward_pre_hook(note, with_kwargs=True) for norm in norms]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
