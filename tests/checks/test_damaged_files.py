"""Files that are damaged inside, or were made to be: one line that names the file, never an internal error."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Finished, rehash
from PIL import Image

Cli = Callable[..., Finished]


def refused(done: Finished) -> str:
    """The one line of an error that is not ours."""
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "internal error" not in done.err and "Traceback" not in done.err
    return done.err


@pytest.mark.parametrize("labels", ["{", "null", "5", '["a", 1]', '{"a": 1}', "[" * 100_000])
def test_labels_in_an_onnx_file(labels: str, cli: Cli, copy: Callable[..., Path]) -> None:
    place = copy("onnx")
    model = onnx.load(str(place / "tiny.onnx"))
    model.metadata_props.add(key="labels", value=labels)
    onnx.save(model, str(place / "tiny.onnx"))
    rehash(place)
    assert f"{place / 'tiny.onnx'} is rejected by ONNX Runtime: " in refused(cli("verify", place))


def append_zip(file: Path, content: bytes, *, flag: int = 0, spoil: bool = False) -> None:
    with zipfile.ZipFile(file, "a") as packed:
        packed.writestr("labels.txt", content)
    data = bytearray(file.read_bytes())
    if flag:
        data[data.rindex(b"PK\x03\x04") + 6] |= flag
        data[data.rindex(b"PK\x01\x02") + 8] |= flag
    if spoil:
        data[data.rindex(content)] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("content", "options"),
    [(b"\xff\xfe", {}), (b"digit 0\n", {"flag": 1}), (b"digit 0\n", {"spoil": True})],
    ids=["not UTF-8", "encrypted", "spoilt"],
)
def test_labels_in_a_tflite_file(content: bytes, options: dict, cli: Cli, copy: Callable[..., Path]) -> None:
    place = copy("tflite")
    append_zip(place / "tiny.tflite", content, **options)
    rehash(place)
    assert f"{place / 'tiny.tflite'} is rejected by " in refused(cli("verify", place))


def flip(file: Path, seed: int) -> None:
    data = bytearray(file.read_bytes())
    rng = np.random.default_rng(seed)
    for index in rng.integers(0, len(data), 3):
        data[index] ^= 1 << int(rng.integers(0, 8))
    for index in rng.integers(0, min(len(data), 4096), 3):  # where a graph's structure begins
        data[index] = int(rng.integers(0, 256))
    file.write_bytes(data)


@pytest.mark.parametrize("fmt", ["onnx", "tflite"])
@pytest.mark.parametrize("seed", range(6))
def test_bits_that_flipped(fmt: str, seed: int, cli: Cli, copy: Callable[..., Path]) -> None:
    """The hashes are made right again: what is left to notice them are the parsers, or the numbers."""
    place = copy(fmt)
    flip(place / f"tiny.{fmt}", seed)
    rehash(place)
    for command in ("inspect", "verify"):
        done = cli(command, place)
        assert done.code in (0, 1, 2, 3, -6, -11), done.err  # a runtime's own parser may crash: then it is said
        assert "internal error" not in done.err and "Traceback" not in done.err, done.err
        assert done.err.count("\n") == (done.code not in (0, 1, 3)), done.err


@pytest.mark.parametrize("size", [(2_000_000, 1), (1, 2_000_000)])
def test_a_picture_that_grows_without_end(
    size: tuple[int, int], cli: Cli, copy: Callable[..., Path], tmp_path: Path
) -> None:
    for number in range(10):
        (tmp_path / f"data/{number}").mkdir(parents=True)
        Image.new("RGB", (80, 80)).save(tmp_path / f"data/{number}/small.png")
    Image.new("L", size).save(tmp_path / "data/3/long.png")
    done = cli("eval", copy("onnx"), "--data", tmp_path / "data")
    assert (done.code, done.err) == (0, "")
    assert "1 unreadable pictures were left out" in done.out
    assert "which is too large" in done.out


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.array([2**64 - 1, 0], np.uint64)}, "labels are uint64 of shape (2,), expected 2 class indices"),
        ({"labels": np.array([-1, 0])}, "expected 2 class indices from 0"),
        ({"images": np.zeros((2, 0, 8, 3), np.uint8)}, "images are uint8 (2, 0, 8, 3), expected"),
        ({"images": np.zeros((2, 8, 8, 3), object)}, "cannot be read as .npz"),
    ],
)
def test_arrays_that_are_no_pictures(
    arrays: dict[str, np.ndarray], message: str, cli: Cli, copy: Callable[..., Path], tmp_path: Path
) -> None:
    right = {"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.array([0, 1])}
    np.savez(tmp_path / "data.npz", **right | arrays)
    assert message in refused(cli("eval", copy("onnx"), "--data", tmp_path / "data.npz"))


def test_names_of_arrays_are_shown_harmless(cli: Cli, copy: Callable[..., Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **{"\x1b[2Jevil": np.zeros(1)})
    assert refused(cli("eval", copy("onnx"), "--data", tmp_path / "data.npz"))[:-1].isprintable()


def test_a_golden_scalar(cli: Cli, copy: Callable[..., Path]) -> None:
    from safetensors.numpy import load_file, save_file

    place = copy("onnx")
    tensors = load_file(place / "golden.safetensors")
    cases = '["' + next(iter(tensors)).split("/")[0] + '"]'
    (name,) = {key.split("/")[0] for key in list(tensors)[:1]}
    few = {f"{name}/image": tensors[f"{name}/image"], f"{name}/logits": np.array(1.0, np.float32)}
    save_file(few, place / "golden.safetensors", metadata={"cases": cases})
    rehash(place)
    assert "'logits' of case" in refused(cli("verify", place, "--against", "golden"))


@pytest.mark.parametrize("shape", [(0,), (0, 10), ()])
def test_golden_vectors_without_numbers(shape: tuple[int, ...], cli: Cli, copy: Callable[..., Path]) -> None:
    from safetensors.numpy import load_file, save_file

    place = copy("onnx")
    tensors = load_file(place / "golden.safetensors")
    cases = json.dumps(sorted({key.split("/")[0] for key in tensors}))
    empty = {key: np.zeros(shape, np.float32) if key.endswith("/logits") else t for key, t in tensors.items()}
    save_file(empty, place / "golden.safetensors", metadata={"cases": cases})
    rehash(place)
    assert "'logits' of case" in refused(cli("verify", place, "--against", "golden"))


def test_arrays_that_grow_without_end(cli: Cli, copy: Callable[..., Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((2, 1, 60_000, 3), np.uint8), labels=np.arange(2))
    assert "none of its pictures can" in refused(cli("eval", copy("onnx"), "--data", tmp_path / "data.npz"))


@pytest.mark.parametrize("option", ["--data", "--calibration"])
def test_a_search_ends_before_it_starts(option: str, cli: Cli, copy: Callable[..., Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "sound.npz", images=np.zeros((2, 64, 64, 3), np.uint8), labels=np.arange(2))
    odd = tmp_path / "odd.npz"
    odd.symlink_to(odd)
    words = {"--data": tmp_path / "sound.npz", "--calibration": tmp_path / "sound.npz", option: odd}
    given = [word for pair in words.items() for word in pair]
    assert f"{odd} cannot be read as .npz" in refused(cli("tune", copy("onnx"), *given, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_report_to_a_link_to_itself(cli: Cli, copy: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "loop.html").symlink_to(tmp_path / "loop.html")
    done = cli("report", copy("onnx"), "-o", tmp_path / "loop.html")
    assert done.code in (0, 2) and "internal error" not in done.err
