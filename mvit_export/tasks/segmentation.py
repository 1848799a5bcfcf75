"""Semantic segmentation: scores of every class at every pixel, (B, K, H, W), or the best class of each, (B, H, W).

A map of labels has no scores of its own to compare. Its labels are looked up in the reference's scores: where a file
chooses another class, what counts is by how much less the reference scores it. That is 0 where both agree, and within
rounding where two classes are as good as equal, so that the bounds of scores hold for labels too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mvit_export.formats.base import Tolerance
from mvit_export.tasks.base import Figure, Shapes, Task

TILES = 8  # a side; each is judged by itself, so that a fault in a corner does not drown in the whole
WORST_TILE = 10.0  # dB that a tile may be below the whole picture's bound: noise is not spread evenly


def count_classes(shapes: Shapes) -> int | None:
    shape, *others = shapes.values()
    return shape[1] if not others and len(shape) == 4 else None


def compare(reference: np.ndarray, output: np.ndarray) -> dict[str, float]:
    """The figures of scores (B, K, H, W), float64; none for another shape.

    `tie_margin` is the largest distance, of the scale, between the reference's two best classes at a pixel where the
    file chooses another: errors of half of that explain it.
    """
    if reference.ndim != 4 or reference.shape[1] < 2:
        return {}
    best = reference.argmax(axis=1)  # (B, H, W)
    differs = output.argmax(axis=1) != best
    found = {"pixel_agreement": float(1 - differs.mean()), "worst_tile_psnr_db": worst_tile(reference, output)}
    scale = float(np.abs(reference).max())
    return found | {"tie_margin": float((margins(reference)[differs] / (scale or 1)).max(initial=0.0))}


def margins(scores: np.ndarray) -> np.ndarray:
    """The distance between the two best classes, (B, K, H, W) -> (B, H, W)."""
    second, first = np.partition(scores, (-2, -1), axis=1)[:, -2:].swapaxes(0, 1)
    margin: np.ndarray = first - second
    return margin


def worst_tile(reference: np.ndarray, output: np.ndarray) -> float:
    """The lowest PSNR of any tile, in dB, by the scale of the whole; at most float64's own."""
    peak, least = float(np.abs(reference).max()), 2.0**-53
    squares = ((reference - output) ** 2).mean(axis=1)  # (B, H, W)
    noise = max(float(tile.mean()) for tile in tiles(squares))
    return float(-20 * np.log10(max(np.sqrt(noise) / peak, least))) if peak else 0.0


def tiles(maps: np.ndarray) -> Iterator[np.ndarray]:
    """(B, H, W) in up to `TILES` x `TILES` parts."""
    for rows in np.array_split(maps, min(TILES, maps.shape[1]), axis=1):
        yield from np.array_split(rows, min(TILES, maps.shape[2]), axis=2)


def agree_labels(best: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """The figures of a map of labels, from `look_up`."""
    return {"pixel_agreement": float((chosen >= best).mean())}


def look_up(reference: np.ndarray, output: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reference's scores (B, K, H, W) of its own best class and of the chosen one, both (B, H, W).

    `output` is a map of labels, or scores of which the best is taken. A label that is no class counts as one that
    scores nothing the reference has.
    """
    labels = output.argmax(axis=1) if output.ndim == reference.ndim else output.astype(np.int64)
    best, count = reference.max(axis=1), reference.shape[1]
    chosen = np.take_along_axis(reference, labels.clip(0, count - 1)[:, None], axis=1)[:, 0]
    outside = (labels < 0) | (labels >= count)
    return best, np.where(outside, best - 2 * np.abs(reference).max(), chosen)


def choose(scores: np.ndarray) -> np.ndarray:
    """What a file returns where the reference has these scores."""
    return scores.argmax(axis=1).astype(np.int32)


def palette(count: int) -> list[str]:
    """A colour for each class, "#rrggbb": the map of PASCAL VOC, in which masks are stored as PNG.

    Bits 0, 1 and 2 of a class's index, then bits 3, 4 and 5, and so on, are the highest bits of red, green and blue
    that are not set yet.
    """
    return ["#" + "".join(f"{channel:02x}" for channel in colour(index)) for index in range(count)]


def colour(index: int) -> tuple[int, int, int]:
    red, green, blue = (sum(((index >> (3 * step + bit)) & 1) << (7 - step) for step in range(8)) for bit in range(3))
    return red, green, blue


def tile_bound(tolerance: Tolerance) -> float:
    return tolerance.psnr_db - WORST_TILE


FIGURES = (
    Figure("pixel_agreement", min),  # share of pixels with the reference's class; the worst input's
    Figure(
        "tie_margin", max, "the class differs where the two best are apart by", ".1e",
        lambda tolerance: 2 * tolerance.max_rel,
    ),
    Figure("worst_tile_psnr_db", min, "PSNR of the worst tile", ".1f", tile_bound, at_least=True),
)  # fmt: skip
SEGMENTATION = Task(
    name="image-segmentation",
    output_names=("scores",),
    fits=lambda shapes: False,  # maps may mean anything: depth, flow, key points; a network must say so
    count_classes=count_classes,
    figures=FIGURES,
    compare=compare,
)
OF_LABELS = replace(
    SEGMENTATION,
    output_names=("labels",),
    count_classes=lambda shapes: None,
    figures=FIGURES[:1],
    compare=agree_labels,
    integers=True,
    scored=lambda module: module.scored(),
    view=look_up,
    answer=choose,
)
