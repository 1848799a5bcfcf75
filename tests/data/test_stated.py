"""How pictures become numbers, as a user states it, and what is said where nobody does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Finished

from mvit_export import load_model
from mvit_export.data.preprocessing import UNSTATED, Preprocessing, Stated, to_tensor
from mvit_export.errors import UsageError

NETWORK = "from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten(), nn.Linear(2, 3))\n"
KNOWN = Preprocessing("RGB", crop=(8, 8), source=UNSTATED)
PICTURE = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)


@pytest.fixture
def network(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NETWORK)
    return f"{tmp_path / 'net.py'}:net"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (Stated(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)), lambda x: (x / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]),
        (Stated(scale=1.0, mean=(104.0, 117.0, 123.0), channels="bgr"), lambda x: x[..., ::-1] - [104, 117, 123]),
        (Stated(scale=1 / 128, mean=(1.0, 1.0, 1.0)), lambda x: x / 128 - 1),
        (Stated(scale=1.0), lambda x: x),
        (Stated(std=(0.5, 0.5, 0.5)), lambda x: x / 127.5),
    ],
)
def test_numbers_are_what_was_stated(said: Stated, expected: Callable[[np.ndarray], np.ndarray]) -> None:
    found = to_tensor(PICTURE, said.on(KNOWN)).transpose(0, 2, 3, 1)  # (1, 8, 8, 3)
    np.testing.assert_allclose(found, expected(PICTURE.astype(np.float64)), rtol=1e-5, atol=1e-5)


def test_resize_is_in_pixels_or_none_at_all() -> None:
    assert Stated(resize=12).on(KNOWN).resize_ratio == 1.5
    assert Stated(resize="squash").on(KNOWN).resize_ratio is None
    assert Stated(channels="RGB").on(KNOWN).resize_ratio == KNOWN.resize_ratio


def test_manifest_says_who_stated_it(network: str) -> None:
    silent = load_model(model=network, image_size=8)
    assert silent.preprocessing is not None
    assert silent.preprocessing.source == UNSTATED
    said = load_model(model=network, image_size=8, preprocessing=Stated(mean=(0.5,) * 3, resize=9))
    assert said.preprocessing is not None
    assert said.preprocessing.source == "stated: mean, resize; the rest: taken for granted"
    whole = load_model(model=network, image_size=8, preprocessing=Preprocessing("BGR", source="my training script"))
    assert whole.preprocessing == Preprocessing("BGR", crop=(8, 8), source="my training script")


@pytest.mark.slow
def test_what_is_taken_for_granted_is_said_where_pictures_count(
    cli: Callable[..., Finished], network: str, tmp_path: Path
) -> None:
    arguments = ("export", "--to", "onnx", "--model", network, "--image-size", "8", "--overwrite", "--json")

    def notes(*more: str) -> str:
        return " ".join(cli(*arguments, "--out", tmp_path / "out", *more).json["notes"])

    assert "nobody stated the preprocessing: RGB, pixels / 255" in notes("--input", "image")
    assert "nobody stated" not in notes()  # tensors are what the caller makes of pictures
    assert "nobody stated" not in notes("--input", "image", "--mean", "0.5", "--std", "0.5,0.5,0.5")
    np.savez(tmp_path / "data.npz", images=PICTURE.repeat(9, 0), labels=np.arange(9) % 3)
    done = cli("eval", tmp_path / "out/net/onnx-fp32", "--data", tmp_path / "data.npz", "--json")
    assert not any("nobody stated" in warning for warning in done.json["results"][0]["warnings"])
    notes("--input", "image")
    done = cli("eval", tmp_path / "out/net/onnx-fp32", "--data", tmp_path / "data.npz", "--json")
    assert any("nobody stated" in warning for warning in done.json["results"][0]["warnings"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mean", "a,b"), "--mean is 'a,b', expected one number or three"),
        (("--std", "0"), "std above 0"),
        (("--scale", "2"), "--scale is 2.0, expected what a pixel is multiplied by"),
        (("--scale", "1/0"), "--scale is '1/0', expected a number or a fraction"),
        (("--channels", "GBR"), "channel order is 'GBR', expected one of RGB, BGR"),
        (("--resize", "big"), "--resize is 'big', expected pixels of the short side, or squash"),
        (("--resize", "0"), "the resize ratio is 0"),
    ],
)
def test_nonsense_is_one_line(
    options: tuple[str, str], message: str, cli: Callable[..., Finished], network: str, tmp_path: Path
) -> None:
    done = cli("export", "--to", "onnx", "--model", network, "--image-size", "8", "--out", tmp_path / "out", *options)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_network_without_pictures_has_no_preprocessing(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef net(): return nn.Linear(4, 3)\n")
    with pytest.raises(UsageError, match="are for a model that takes RGB pictures"):
        load_model(model=f"{tmp_path / 'net.py'}:net", input_shape=(1, 4), preprocessing=Stated(channels="RGB"))
