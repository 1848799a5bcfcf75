"""Labelled pictures on disk, one folder per class, and a split that anyone can reproduce.

Only numpy is needed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from mvit_export.errors import UsageError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class ImageFolder:
    """The pictures below `folder`, ordered by class name and then by their own."""

    folder: Path
    classes: tuple[str, ...]  # names of the sub-folders, sorted; a label is an index into it
    files: tuple[Path, ...]
    labels: np.ndarray  # (len(files),) int64


def read_image_folder(folder: str | Path) -> ImageFolder:
    """List FOLDER/CLASS/**/PICTURE, skipping hidden names and files that are not pictures. Raises UsageError."""
    folder = Path(folder)
    try:
        places = sorted((path for path in folder.iterdir() if is_class(path)), key=lambda path: path.name)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror or error}, expected a folder of class folders") from error
    if not places:
        raise UsageError(f"{folder}: no class folders in it, expected {folder}/CLASS/PICTURE.png for every class")
    found = [list_pictures(place) for place in places]
    for place, files in zip(places, found, strict=True):
        if not files:
            names = ", ".join(sorted(SUFFIXES))
            raise UsageError(f"{place}: no pictures in it, expected some ({names}) in every class folder")
    labels = np.repeat(np.arange(len(places)), [len(files) for files in found])
    return ImageFolder(folder, tuple(place.name for place in places), tuple(chain.from_iterable(found)), labels)


def is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def list_pictures(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def hold_out(names: Sequence[str], labels: np.ndarray, *, seed: int = 0, share: float = 0.25) -> np.ndarray:
    """Which examples are held out: a boolean mask, by a rule that needs no random number generator.

    Within each class, examples are sorted by sha256("SEED NAME"), and the first ceil(share * count) are held out.
    `names` are unique and identify the example (a file's path in its folder, an index), so that every machine
    and every version finds the same split.
    """
    rank = [hashlib.sha256(f"{seed} {name}".encode()).digest() for name in names]
    mask = np.zeros(len(names), bool)
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label), key=lambda index: rank[index])
        mask[members[: math.ceil(share * len(members))]] = True
    return mask
