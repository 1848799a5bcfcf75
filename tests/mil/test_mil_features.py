"""Images, classifiers, flexible shapes and several functions: what a model's description promises."""

from __future__ import annotations

import tempfile
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from mil_models import capture, convert, mobilevit, photo, psnr, reference, saved
from torch import nn

from mvit_export.errors import UsageError
from mvit_export.mil import load

SCALE, BIAS = 1 / 127.5, [-1.0, -0.9, -0.8]
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


class Mean(nn.Module):
    """Small, and different for every channel and place."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, 5, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu().mean((2, 3))


def image_package(model: nn.Module, folder: Path, layout: str, precision: str = "fp32", **options: object) -> Path:
    channels = 3 if layout in ("RGB", "BGR") else 1
    bias = BIAS if channels == 3 else BIAS[0]
    image = ct.ImageType("image", (1, channels, 16, 24), scale=SCALE, bias=bias, color_layout=layout)
    x = torch.rand(1, channels, 16, 24)
    return saved(convert(capture(model, x, "trace"), precision, **({"inputs": [image]} | options)), folder)


def prepared(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (1, 3, H, W), scaled."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() * SCALE
    return (x + torch.tensor(BIAS[: x.shape[0]]).reshape(-1, 1, 1))[None]


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_image(layout: str, precision: str, tmp_path: Path) -> None:
    model = Mean().eval()
    program = load(image_package(model, tmp_path, layout, precision))
    expected = reference(model, prepared(PIXELS if layout == "RGB" else PIXELS[..., ::-1]))
    other = reference(model, prepared(PIXELS[..., ::-1] if layout == "RGB" else PIXELS))
    least = 100 if precision == "fp32" else 50
    assert psnr(expected, program(image=PIXELS)["logits"]) > least > 40 > psnr(other, expected)
    assert psnr(expected, program(image=PIXELS[None])["logits"]) > least
    image = pytest.importorskip("PIL.Image", reason="Pillow is optional").fromarray(PIXELS)
    assert psnr(expected, program(image=image)["logits"]) > least


def test_image_errors(tmp_path: Path) -> None:
    program = load(image_package(Mean().eval(), tmp_path, "RGB"))
    for image, message in (
        (PIXELS.astype(np.float32), "has dtype float32, expected uint8 pixels in RGB"),
        (PIXELS[..., 0], r"has shape \[16, 24\], expected \(H, W, 3\) or \(B, H, W, 3\)"),
        (PIXELS[:8], r"has shape \[1, 3, 8, 24\], expected \[1, 3, 16, 24\]"),
        (np.stack([PIXELS, PIXELS]), r"has shape \[2, 3, 16, 24\], expected \[1, 3, 16, 24\]"),
        (PIXELS.transpose(2, 0, 1), r"expected \(H, W, 3\)"),
    ):
        with pytest.raises(UsageError, match=message):
            program(image=image)


@pytest.mark.parametrize("layout", ["G", "G_FLOAT16"])
def test_grayscale(layout: str, tmp_path: Path) -> None:
    model, gray = Mean(1).eval(), PIXELS[..., 0]
    layout = getattr(ct.colorlayout, {"G": "GRAYSCALE", "G_FLOAT16": "GRAYSCALE_FLOAT16"}[layout])
    precision = "fp16" if layout == ct.colorlayout.GRAYSCALE_FLOAT16 else "fp32"
    program = load(image_package(model, tmp_path, layout, precision))
    expected = reference(model, prepared(gray[..., None]))
    given = gray.astype(np.float16) if precision == "fp16" else gray
    assert psnr(expected, program(image=given)["logits"]) > 50


@pytest.mark.parametrize("labels", [["a", "b", "c", "d", "e"], [10, 11, 12, 13, 14]])
def test_classifier(labels: list, tmp_path: Path) -> None:
    model, x = nn.Sequential(Mean(), nn.Softmax(-1)).eval(), torch.rand(1, 3, 16, 24)
    options = dict(classifier_config=ct.ClassifierConfig(labels), outputs=None)
    outputs = load(saved(convert(capture(model, x, "trace"), **options), tmp_path))(image=x.numpy())
    expected = reference(model, x)[0]
    assert outputs["classLabel"] == labels[int(expected.argmax())]
    (probabilities,) = (value for value in outputs.values() if isinstance(value, dict))
    assert list(probabilities) == labels
    np.testing.assert_allclose(list(probabilities.values()), expected, rtol=1e-5)


def test_enumerated_shapes(tmp_path: Path) -> None:
    """One program for several sizes: each is right, others are refused."""
    model, x = Mean().eval(), torch.rand(1, 3, 16, 24)
    shapes = [(1, 3, 16, 24), (1, 3, 32, 32), (1, 3, 20, 28)]
    inputs = [ct.TensorType("image", ct.EnumeratedShapes(shapes, default=shapes[0]))]
    program = load(saved(convert(capture(model, x, "trace"), inputs=inputs), tmp_path))
    for shape in shapes:
        x = torch.rand(shape)
        assert psnr(reference(model, x), program(image=x.numpy())["logits"]) > 100
    with pytest.raises(UsageError, match=r"expected \[1, 3, 16, 24\] or \[1, 3, .*\] or"):
        program(image=np.zeros((1, 3, 16, 16), np.float32))


def test_enumerated_image_sizes(tmp_path: Path) -> None:
    model = Mean().eval()
    shapes = ct.EnumeratedShapes([(1, 3, 16, 24), (1, 3, 32, 48)], default=(1, 3, 16, 24))
    inputs = [ct.ImageType("image", shapes, scale=SCALE, bias=BIAS)]
    program = load(image_package(model, tmp_path, "RGB", inputs=inputs))
    twice = PIXELS.repeat(2, 0).repeat(2, 1)
    assert psnr(reference(model, prepared(twice)), program(image=twice)["logits"]) > 100
    with pytest.raises(UsageError, match="expected"):
        program(image=PIXELS[:8])


def test_range_of_shapes(tmp_path: Path) -> None:
    model, x = Mean().eval(), torch.rand(2, 3, 16, 24)
    size = ct.RangeDim(8, 64, default=16)
    inputs = [ct.TensorType("image", (ct.RangeDim(1, 4, default=2), 3, size, 24))]
    program = load(saved(convert(capture(model, x, "trace"), inputs=inputs), tmp_path))
    for shape in ((1, 3, 8, 24), (4, 3, 64, 24)):
        x = torch.rand(shape)
        assert psnr(reference(model, x), program(image=x.numpy())["logits"]) > 100
    with pytest.raises(UsageError, match=r"has shape \[5, 3, 16, 24\], expected \[1\.\.4, 3, 8\.\.64, 24\]"):
        program(image=np.zeros((5, 3, 16, 24), np.float32))


@pytest.mark.slow
def test_several_functions(tmp_path: Path) -> None:
    """Two networks that share a file: weights are stored once, each function runs on its own."""
    torch.manual_seed(0)
    small, large = mobilevit("xxs"), Mean().eval()
    description = ct.utils.MultiFunctionDescriptor()
    for name, model, size in (("main", small, 64), ("other", large, 32)):
        target = ct.target.iOS18
        package = saved(convert(capture(model, photo(size)), minimum_deployment_target=target), tmp_path, name)
        description.add_function(str(package), src_function_name="main", target_function_name=name)
    description.default_function_name = "other"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "both.mlpackage"
        ct.utils.save_multifunction(description, str(path))
        x = photo(64)
        assert psnr(reference(small, x), load(path, "main")(image=x.numpy())["logits"]) > 100
        x = photo(32)
        assert load(path).function == "other"
        assert psnr(reference(large, x), load(path)(image=x.numpy())["logits"]) > 100


def test_types_of_inputs(tmp_path: Path) -> None:
    model, x = Mean().eval(), torch.rand(1, 3, 16, 24)
    program = load(saved(convert(capture(model, x, "trace")), tmp_path))
    expected = program(image=x.numpy())["logits"]
    np.testing.assert_array_equal(program(image=x)["logits"], expected)
    np.testing.assert_array_equal(program(image=x.double().numpy())["logits"], expected)
    with pytest.raises(UsageError, match="has dtype int64, expected float32"):
        program(image=np.zeros((1, 3, 16, 24), np.int64))
