"""Scikit-learn's handwritten digits as 64x64 RGB pictures, and the split that our trained checkpoint uses.

    python examples/digits.py held_out.npz             # the 454 held-out pictures and their labels in one file
    python examples/digits.py digits/val               # the same as PNGs, digits/val/CLASS/INDEX.png
    python examples/digits.py --part train digits/train

The split, by `mvit_export.data.folders.hold_out`: example i of `load_digits` is named str(i); within each digit,
examples are sorted by sha256("0 i"), and the first quarter (rounded up) is held out. Needs scikit-learn, but not torch.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np

from mvit_export.data.folders import hold_out
from mvit_export.errors import require
from mvit_export.system.files import write_whole

CLASSES = tuple("0123456789")
SIDE = 64  # pixels; the source has 8
LEVELS = 16  # the source's brightest value


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """The 454 pictures that no training has seen: uint8 (454, 64, 64, 3), and their labels, int64 (454,)."""
    return load("val")


def training() -> tuple[np.ndarray, np.ndarray]:
    """The other 1343."""
    return load("train")


def load(part: str) -> tuple[np.ndarray, np.ndarray]:
    """`part` is "train" or "val"; pictures come in the order of their indices."""
    small, labels, chosen = source(part)
    return upscale(small[chosen]), labels[chosen]


def source(part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All 1797 pictures (1797, 8, 8) of 0 to 16, their labels, and which indices belong to `part`."""
    datasets = require("sklearn.datasets", extra="examples", purpose="for its handwritten digits")
    digits = datasets.load_digits()
    labels = digits.target.astype(np.int64)
    mask = hold_out([str(index) for index in range(len(labels))], labels)
    return digits.images.astype(np.int64), labels, np.flatnonzero(mask if part == "val" else ~mask)


def upscale(small: np.ndarray) -> np.ndarray:
    """(N, 8, 8) of 0 to 16 -> uint8 (N, 64, 64, 3), bilinear with half-pixel centres, grey in all three channels.

    In integers, so that every machine gets the same bytes: weights are sixteenths, since the factor is 8.
    """
    position = 2 * np.arange(SIDE) - 7  # centre of each new pixel in sixteenths of an old one
    left, right = position // 16, position % 16
    weights = np.zeros((SIDE, 8), np.int64)
    np.add.at(weights, (np.arange(SIDE), np.clip(left, 0, 7)), 16 - right)
    np.add.at(weights, (np.arange(SIDE), np.clip(left + 1, 0, 7)), right)
    whole = 16 * 16 * LEVELS
    grey = (weights @ small @ weights.T * 255 + whole // 2) // whole  # (N, 64, 64)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


def write_npz(path: str | Path, part: str = "val") -> None:
    """`images` (N, 64, 64, 3), `labels` (N,) and `classes` (10,) in one file."""
    images, labels = load(part)
    content = io.BytesIO()
    np.savez_compressed(content, images=images, labels=labels, classes=np.array(CLASSES))
    write_whole(Path(path), content.getvalue())


def write_image_folder(folder: str | Path, part: str = "val") -> None:
    """FOLDER/CLASS/INDEX.png, where INDEX is the place in `load_digits`."""
    from PIL import Image

    small, labels, chosen = source(part)
    for index, picture in zip(chosen, upscale(small[chosen]), strict=True):
        file = Path(folder) / CLASSES[labels[index]] / f"{index:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the handwritten digits as files.")
    parser.add_argument("out", type=Path, help="FILE.npz, or a folder for PNGs in one folder per class")
    parser.add_argument("--part", choices=("train", "val"), default="val", help="val: the held-out ones (default)")
    arguments = parser.parse_args()
    write = write_npz if arguments.out.suffix == ".npz" else write_image_folder
    write(arguments.out, arguments.part)


if __name__ == "__main__":
    main()
