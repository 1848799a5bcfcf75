"""What static quantization learns ranges from: a user's pictures through the checkpoint's own preprocessing, or noise.

Noise is for untrained networks alone: the ranges of a trained one on noise are not those it meets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.cases import noise
from mvit_export.errors import UsageError
from mvit_export.formats import choose
from mvit_export.pictures import FEW, Reading, open_pictures
from mvit_export.preprocessing import Preprocessing, Size, to_tensor

METHODS = ("minmax", "percentile", "entropy")
LIMIT = 128  # pictures
NOISE_PICTURES = 16


@dataclass
class Calibration:
    """Pictures for one model, streamed anew by every pass; `warnings` tells what was wrong after the first."""

    source: str
    method: str
    reading: Reading | None  # None: seeded noise
    preprocessing: Preprocessing
    warnings: list[str] = field(default_factory=list)
    count: int = 0  # readable pictures, known after `check`

    def pictures(self) -> Iterator[np.ndarray]:
        """uint8 RGB (1, H, W, 3), what a file with `--input image` takes."""
        if self.reading is None:
            for seed in range(NOISE_PICTURES):
                yield noise(self.preprocessing.crop, seed + 1000)[None]
        else:
            for _, picture in self.reading:
                yield picture[None]

    def tensors(self) -> Iterator[np.ndarray]:
        """float32 (1, 3, H, W), what the network takes."""
        for picture in self.pictures():
            yield to_tensor(picture, self.preprocessing)

    def check(self) -> int:
        """Read everything once; how many pictures there are. Raises UsageError where they teach nothing."""
        first, count, equal = None, 0, True
        for picture in self.pictures():
            first = picture if first is None else first
            equal = equal and np.array_equal(picture, first)
            count += 1
        if equal and (count > 1 or first is None or first.min() == first.max()):
            raise UsageError(
                f"{self.source}: all {count} calibration pictures are equal, expected what the model meets"
            )
        self.warnings = [w for w in (self.reading.warning if self.reading else None,) if w]
        if count < FEW and self.reading is not None:
            self.warnings.append(f"only {count} calibration pictures: ranges may be too narrow; 100 are plenty")
        self.count = count
        return count

    def to_json(self) -> dict[str, Any]:
        count, skipped = self.check(), len(self.reading.skipped) if self.reading else 0
        return {
            "source": self.source, "method": self.method, "pictures": count, "skipped": skipped,
            "warnings": list(self.warnings),
        }  # fmt: skip


def open_calibration(
    path: str | Path | None,
    *,
    method: str = "minmax",
    preprocessing: Preprocessing | None,
    size: Size,
    trained: bool | None,
    limit: int = LIMIT,
) -> Calibration:
    """The calibration that a user named, or seeded noise for a network that is known to be untrained.

    Raises UsageError where a trained model has none, or the model takes no pictures.
    """
    method = choose(method, METHODS, what="--calibration-method")
    if preprocessing is None:
        raise UsageError("static int8 calibrates on pictures, and this model takes none; try --precision int8-dynamic")
    preprocessing = preprocessing.with_size(size)
    if path is None and trained is not False:
        raise UsageError(
            "static int8 learns the ranges of activations from pictures like those the model will meet: "
            "pass --calibration DIR or FILE.npz"
        )
    if path is None:
        return Calibration("seeded noise", method, None, preprocessing)
    pictures = open_pictures(path)
    return Calibration(pictures.source, method, Reading(pictures, preprocessing, limit), preprocessing)
