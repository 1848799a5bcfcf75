"""Pictures of every depth: scaled to 8 bits where their range is known, left out by name where it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvit_export.data.pictures import Reading, open_pictures
from mvit_export.data.preprocessing import Preprocessing

PLAIN = Preprocessing("RGB", crop=(32, 32), resize_ratio=None, interpolation="nearest")
RAMP = np.arange(32 * 32, dtype=np.uint32).reshape(32, 32) * 64 + 31  # to 65503


def read(file: Path) -> np.ndarray:
    """uint8 (32, 32, 3)"""
    reading = Reading(open_pictures(file.parent), PLAIN)
    ((_, picture),) = reading
    assert reading.skipped == []
    return picture


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_16_bit_grey_is_scaled(name: str, tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / name)
    picture = read(tmp_path / name)
    assert (picture == np.rint(RAMP / 257).astype(np.uint8)[..., None]).all()
    assert (picture.min(), picture.max()) == (0, 255)


def test_16_bit_grey_of_the_other_byte_order(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (32, 32), RAMP.astype(">u2").tobytes()).save(tmp_path / "grey.tif")
    assert (read(tmp_path / "grey.tif")[..., 0] == np.rint(RAMP / 257)).all()


def test_16_bit_grey_whose_zero_is_white(tmp_path: Path) -> None:
    file = tmp_path / "negative.tif"
    Image.fromarray(RAMP.astype(np.uint16)).save(file, tiffinfo={262: 0})
    with Image.open(file) as image:
        assert image.tag_v2[262] == 0  # type: ignore[attr-defined]
    assert (read(file)[..., 0] == 255 - np.rint(RAMP / 257)).all()


def test_a_16_bit_png_that_an_older_pillow_opens_as_32_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "grey.png"
    Image.fromarray(RAMP.astype(np.uint16)).save(file)
    older = Image.fromarray(RAMP.astype(np.int32))
    older.format = "PNG"
    monkeypatch.setattr(Image, "open", lambda _: older)
    assert (read(file)[..., 0] == np.rint(RAMP / 257)).all()


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.float32, "floats"), (np.int32, "32-bit or signed integers")], ids=["float", "int"]
)
def test_an_unknown_range_is_left_out_and_named(dtype: type, kind: str, tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "a.tif")
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "b.png")
    reading = Reading(open_pictures(tmp_path), PLAIN)
    assert [index for index, _ in reading] == [1]
    assert reading.skipped == [
        f"{tmp_path / 'a.tif'}: pixels are {kind}, whose range is not stated; save it with 8 or 16 bits"
    ]


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
        ("LA", (90, 0), (90, 90, 90)),  # transparent, and still its colour
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
    ],
)
def test_few_bits_and_transparency(mode: str, pixel: object, expected: tuple[int, ...], tmp_path: Path) -> None:
    Image.new(mode, (32, 32), pixel).save(tmp_path / "picture.png")  # type: ignore[arg-type]
    assert (read(tmp_path / "picture.png") == expected).all()


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "palette.png", transparency=1)
    assert (read(tmp_path / "palette.png") == (200, 100, 50)).all()
