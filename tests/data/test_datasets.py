"""Labelled picture folders, the split by hash, and the digits that our trained checkpoint knows."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import digits
from mvit_export.data.folders import hold_out, read_image_folder
from mvit_export.errors import UsageError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


# Folders


def test_classes_are_the_sub_folders_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "dog/b.png", "dog/a.JPG", "cat/deep/er/c.webp", "readme.txt", "cat/labels.csv")
    found = read_image_folder(tmp_path)
    assert found.classes == ("cat", "dog")
    assert [file.relative_to(tmp_path).as_posix() for file in found.files] == [
        "cat/deep/er/c.webp",
        "dog/a.JPG",
        "dog/b.png",
    ]
    assert found.labels.tolist() == [0, 1, 1]


def test_hidden_names_are_no_classes_and_no_pictures(tmp_path: Path) -> None:
    touch(tmp_path, ".cache/x.png", "cat/.x.png", "cat/.thumbs/x.png", "cat/y.png")
    found = read_image_folder(tmp_path)
    assert (found.classes, [file.name for file in found.files]) == (("cat",), ["y.png"])


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda folder: folder.rmdir(), "No such file or directory, expected a folder of class folders"),
        (lambda folder: (folder.rmdir(), folder.touch()), "Not a directory, expected a folder of class folders"),
        (lambda folder: None, "no class folders in it, expected "),
        (lambda folder: touch(folder, "a.png", "b.png"), "no class folders in it, expected "),
        (lambda folder: touch(folder, "cat/a.png", "dog/a.txt"), "/dog: no pictures in it, expected some (.bmp, "),
    ],
)
def test_unusable_folders(fill: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    fill(folder)
    with pytest.raises(UsageError) as caught:
        read_image_folder(folder)
    assert str(caught.value).startswith(str(folder))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# The split


def test_split_takes_a_share_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [1, 4, 9])
    names = [f"{i}.png" for i in range(len(labels))]
    held = hold_out(names, labels)
    assert [int(held[labels == label].sum()) for label in range(3)] == [1, 1, 3], "a quarter, rounded up"
    assert hold_out(names, labels, share=0.5).sum() == 1 + 2 + 5


def test_split_follows_names_not_places() -> None:
    labels = np.arange(40) % 2
    names = [f"{i}.png" for i in range(40)]
    held = dict(zip(names, hold_out(names, labels), strict=True))
    order = np.random.default_rng(0).permutation(40)
    again = hold_out([names[i] for i in order], labels[order])
    assert {names[i]: mask for i, mask in zip(order, again, strict=True)} == held
    assert (hold_out(names, labels, seed=1) != hold_out(names, labels)).any()


def test_split_rule_is_the_one_stated() -> None:
    """By hand: the smallest hash of the class is held out."""
    names = ["a", "b", "c", "d"]
    first = min(names, key=lambda name: hashlib.sha256(f"0 {name}".encode()).hexdigest())
    assert [name for name, held in zip(names, hold_out(names, np.zeros(4)), strict=True) if held] == [first]


# Digits


def test_digits_are_the_same_bytes_everywhere() -> None:
    """The numbers in the model card are about these pictures and no others."""
    images, labels = digits.held_out()
    assert (images.shape, images.dtype, labels.dtype) == ((454, 64, 64, 3), np.uint8, np.int64)
    assert np.bincount(labels).tolist() == [45, 46, 45, 46, 46, 46, 46, 45, 44, 45]
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() == (
        "d4b9f0a3b695881b3c4302ed8f50bc3414cea45a9d8df0f139272ca3c40f5a8e"
    )


def test_no_picture_is_in_both_parts() -> None:
    _, _, train = digits.source("train")
    _, _, val = digits.source("val")
    assert sorted([*train, *val]) == list(range(1797))
    assert len(digits.training()[0]) == len(train) == 1343


def test_upscaling_is_pillow_s_bilinear() -> None:
    small, _, _ = digits.source("val")
    grey = np.round(small[:20] * 255 / 16).astype(np.uint8)
    pillow = [np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BILINEAR)) for picture in grey]
    ours = digits.upscale(small[:20])
    assert np.abs(np.stack(pillow).astype(int) - ours[..., 0]).max() <= 1, "which rounds in between"
    assert (ours == ours[..., :1]).all()


@pytest.mark.slow
def test_written_files_hold_the_held_out_part(tmp_path: Path) -> None:
    images, labels = digits.held_out()
    digits.write_npz(tmp_path / "digits.npz")
    with np.load(tmp_path / "digits.npz", allow_pickle=False) as saved:
        assert (saved["images"] == images).all() and (saved["labels"] == labels).all()
        assert tuple(saved["classes"]) == digits.CLASSES
    digits.write_image_folder(tmp_path / "val")
    found = read_image_folder(tmp_path / "val")
    assert found.classes == digits.CLASSES
    _, all_labels, chosen = digits.source("val")
    where = {int(index): place for place, index in enumerate(chosen)}
    for file, label in list(zip(found.files, found.labels, strict=True))[::50]:
        assert all_labels[int(file.stem)] == label
        assert (np.asarray(Image.open(file)) == images[where[int(file.stem)]]).all()
    assert len(found.files) == 454


@pytest.mark.slow
@pytest.mark.parametrize(("out", "part", "count"), [("out.npz", "val", 454), ("out", "train", 1343)])
def test_command_writes_either_part_without_torch(out: str, part: str, count: int, tmp_path: Path) -> None:
    command = f"""if True:
        import sys, digits
        sys.argv = ["digits.py", r"{tmp_path / out}", "--part", "{part}"]
        digits.main()
        print("torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT / "examples", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    if out.endswith(".npz"):
        with np.load(tmp_path / out) as saved:
            assert len(saved["labels"]) == count
    else:
        assert len(read_image_folder(tmp_path / out).files) == count
