"""Pictures to calibrate and to evaluate on, streamed: a folder, one folder per class, or a .npz file.

A picture that cannot be read is left out and named; anything else that is wrong with the data is an error. Needs
numpy, and Pillow for folders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from mvit_export.data.folders import list_pictures, read_image_folder
from mvit_export.data.preprocessing import Preprocessing, to_picture
from mvit_export.errors import UsageError, first_line, printable
from mvit_export.system.reading import ARRAYS, PICTURE, Unreadable, check_zip, open_regular, sha256_file

FEW = 8  # pictures; with fewer, calibration warns


class Pictures(Protocol):
    """Pictures that can be read repeatedly, in the same order."""

    @property
    def source(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, index: int, preprocessing: Preprocessing) -> np.ndarray:
        """uint8 RGB (H, W, 3) with (H, W) = `preprocessing.crop`. Raises UnreadablePicture."""
        ...

    def take(self, indices: Sequence[int]) -> Pictures:
        """Some of them, to be read in another process."""
        ...

    def digest(self, index: int) -> bytes:
        """SHA-256 of a picture as stored."""
        ...


class UnreadablePicture(UsageError):
    """A file among others that is not a picture, or is cut short."""


@dataclass(frozen=True)
class FolderPictures:
    """Files in a folder, at any depth; read when asked for."""

    source: str
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, preprocessing: Preprocessing) -> np.ndarray:
        from PIL import Image

        try:
            with open_regular(self.files[index], PICTURE) as file, Image.open(file) as image:
                return to_picture(image, preprocessing)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of them
            raise UnreadablePicture(f"{self.files[index]}: {first_line(error)}") from error

    def take(self, indices: Sequence[int]) -> FolderPictures:
        return FolderPictures(self.source, tuple(self.files[index] for index in indices))

    def digest(self, index: int) -> bytes:
        return bytes.fromhex(sha256_file(self.files[index], PICTURE))


@dataclass(frozen=True)
class ArrayPictures:
    """uint8 (N, H, W, 3) RGB of a .npz file; resized like a photograph if the size differs."""

    source: str
    images: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, preprocessing: Preprocessing) -> np.ndarray:
        picture = self.images[index]
        if picture.shape[:2] == preprocessing.crop:
            return picture
        from PIL import Image

        try:
            return to_picture(Image.fromarray(picture), preprocessing)
        except ValueError as error:
            raise UnreadablePicture(f"{self.source}: image {index}: {first_line(error)}") from error

    def take(self, indices: Sequence[int]) -> ArrayPictures:
        return ArrayPictures(self.source, self.images[list(indices)])

    def digest(self, index: int) -> bytes:
        return hashlib.sha256(self.images[index].tobytes()).digest()


@dataclass(frozen=True)
class Labelled:
    """Pictures with the index of each one's class, and the classes' names if the data has them."""

    pictures: Pictures
    labels: np.ndarray  # (N,) int64
    classes: tuple[str, ...] | None


def open_pictures(path: str | Path) -> Pictures:
    """Pictures without labels: any folder, or a .npz with `images`. Raises UsageError if there are none."""
    path = Path(path)
    if path.suffix == ".npz":
        return ArrayPictures(str(path), read_npz(path)["images"])
    if not path.is_dir():
        raise UsageError(f"{path} is neither a folder nor a .npz file, expected pictures in one of the two")
    files = tuple(list_pictures(path))
    if not files:
        raise UsageError(f"{path} holds no pictures, expected .png, .jpg or the like at any depth")
    return FolderPictures(str(path), files)


def open_labelled(path: str | Path) -> Labelled:
    """Pictures with labels: ImageFolder's layout (FOLDER/CLASS/PICTURE), or a .npz with `images` and `labels`."""
    path = Path(path)
    if path.suffix != ".npz":
        found = read_image_folder(path)
        return Labelled(FolderPictures(str(path), found.files), found.labels, found.classes)
    data = read_npz(path)
    if "labels" not in data:
        raise UsageError(f"{path} has no array `labels`, expected one class index for each of its images")
    labels, count = data["labels"], len(data["images"])
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or (labels < 0).any() or (labels > MOST_CLASSES).any():
        found_text = f"{labels.dtype} of shape {labels.shape}"
        raise UsageError(f"{path}: labels are {found_text}, expected {count} class indices from 0, one for each image")
    classes = tuple(map(str, data["classes"])) if "classes" in data else None
    return Labelled(ArrayPictures(str(path), data["images"]), labels.astype(np.int64), classes)


MOST_CLASSES = 10**6
NPZ_ARRAYS = ("images", "labels", "classes")  # others stay packed


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file whose `images` are uint8 (N, H, W, 3), N at least 1. Raises UsageError."""
    try:
        check_zip(path, ARRAYS, entries=tuple(f"{name}.npy" for name in NPZ_ARRAYS))
        with open_regular(path, ARRAYS) as opened, np.load(opened, allow_pickle=False) as file:
            data = {name: file[name] for name in NPZ_ARRAYS if name in file.files}
            others = [name for name in file.files if name not in NPZ_ARRAYS]
    except Unreadable as error:
        raise UsageError(f"{path} {error.strerror}; a folder of pictures may be larger") from error
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as .npz: {first_line(error)}") from error
    except Exception as error:  # zipfile and zlib have errors of their own
        raise UsageError(f"{path} is a damaged .npz: {first_line(error)}") from error
    images = data.get("images")
    if images is None:
        found = printable(", ".join([*data, *others]), 200) or "none"
        raise UsageError(f"{path} has arrays {found}, expected `images`, uint8 (N, H, W, 3) RGB")
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        raise UsageError(f"{path}: images are {images.dtype} {images.shape}, expected uint8 (N, H, W, 3) RGB, N from 1")
    return data


@dataclass
class Reading:
    """Pictures of one size, streamed; what could not be read is counted and named in `skipped`."""

    pictures: Pictures
    preprocessing: Preprocessing
    limit: int | None = None
    skipped: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """(index, uint8 RGB (H, W, 3)) of each readable picture, at most `limit` of them."""
        self.skipped.clear()
        given = 0
        for index in spread(len(self.pictures), self.limit):
            try:
                picture = self.pictures.read(index, self.preprocessing)
            except UnreadablePicture as error:
                self.skipped.append(str(error))
                continue
            given += 1
            yield index, picture
        if not given:
            first = f", the first: {self.skipped[0]}" if self.skipped else ""
            raise UsageError(f"{self.pictures.source}: none of {len(self.pictures)} pictures can be read{first}")

    @property
    def warning(self) -> str | None:
        """A sentence on what was left out."""
        if not self.skipped:
            return None
        return f"{len(self.skipped)} unreadable pictures were left out, the first: {self.skipped[0]}"


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` indices spread evenly over all `count`, so that a folder sorted by class yields every class."""
    if limit is None or limit >= count:
        return list(range(count))
    return [index * count // limit for index in range(limit)]
