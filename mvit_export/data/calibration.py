"""What static quantization learns ranges from: a user's pictures through the checkpoint's own preprocessing, or noise.

Noise is only for untrained networks: the ranges of a trained one on noise are not those it meets in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.data.pictures import FEW, Reading, open_pictures
from mvit_export.data.preprocessing import Preprocessing, Size, to_tensor
from mvit_export.data.synthetic import noise
from mvit_export.errors import UsageError
from mvit_export.formats.choices import choose

METHODS = ("minmax", "percentile", "entropy")
LIMIT = 128  # pictures
NOISE_PICTURES = 16


@dataclass
class Calibration:
    """Pictures for one model, streamed again on every pass; after the first, `warnings` says what was wrong."""

    source: str
    method: str
    reading: Reading | None  # None: seeded noise
    preprocessing: Preprocessing
    warnings: list[str] = field(default_factory=list)
    count: int = 0  # readable pictures, known after `check`

    def pictures(self) -> Iterator[np.ndarray]:
        """uint8 RGB (1, H, W, 3), the input of a file with `--input image`."""
        if self.reading is None:
            for seed in range(NOISE_PICTURES):
                yield noise(self.preprocessing.crop, seed + 1000)[None]
        else:
            for _, picture in self.reading:
                yield picture[None]

    def tensors(self) -> Iterator[np.ndarray]:
        """float32 (1, 3, H, W), the network's input."""
        for picture in self.pictures():
            yield to_tensor(picture, self.preprocessing)

    def check(self) -> int:
        """Read everything once and return the number of pictures. Raises UsageError if they are of no use."""
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

    Raises UsageError if a trained model has none, or the model does not take pictures.
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
