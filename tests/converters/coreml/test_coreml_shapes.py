"""Several image sizes in one Core ML package: every one is right, any other is refused, a frozen branch is found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LABELS, TINY, Finished
from helpers import randomize
from tiny import tiny

from mvit_export import export, load_model, mil, save_weights, verify
from mvit_export.artifact import load_golden, read_artifact
from mvit_export.converters.coreml import convert as convert_coreml
from mvit_export.data.preprocessing import FAMILY_PREPROCESSING
from mvit_export.errors import ConversionError, UsageError
from mvit_export.families.mobilevit import network
from mvit_export.families.mobilevit.forms import flexible
from mvit_export.families.mobilevit.forms.flexible import (
    FlexibleBlock,
    Resize,
    interpolation,
    make_flexible,
    map_sizes,
    round_up,
)
from mvit_export.families.mobilevit.network import create_mobilevit
from mvit_export.formats.targets import check_size_count, plan_targets

pytestmark = pytest.mark.slow

# The tiny network's last maps are 2x2, 3x3 (resized to 4x4), 5x3 (to 6x4) and 2x2; 144x96 and 60x52 also resize an
# earlier map, 9x6 and 8x7.
SIZES = ("64", "80", "144x96", "60x52")
SHAPES = ((1, 3, 64, 64), (1, 3, 80, 80), (1, 3, 144, 96), (1, 3, 60, 52))
TRAINED_AT = ("160", "192", "256", "288", "320")  # the sizes of MobileViT's own training
PSNR_DB = {"fp32": 100, "fp16": 50}


# The network without branches


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_resize_is_the_references(patch: int) -> None:
    """Every side from 1 to 40, up to whole patches and back, rows and columns of different sizes."""
    sides = range(1, 41)
    pairs = {n: (n, round_up(n, patch)) for n in sides}
    up, down = Resize(pairs), Resize({n: (m, n) for n, (_, m) in pairs.items()})
    generator = torch.Generator().manual_seed(patch)
    for h, w in zip(sides, reversed(sides), strict=True):
        whole = (round_up(h, patch), round_up(w, patch))
        for resize, old, new in ((up, (h, w), whole), (down, whole, (h, w))):
            x = torch.randn(2, 3, *old, generator=generator)
            expected = F.interpolate(x.double(), size=new, mode="bilinear", align_corners=False)
            torch.testing.assert_close(resize(x, (h, w), old, new).double(), expected, rtol=0, atol=2e-6)


def test_interpolation_is_the_docstrings_formula() -> None:
    """Clamped at both borders; the identity where nothing changes; every row a weighted mean."""
    for n in range(1, 41):
        assert torch.equal(interpolation(n, n), torch.eye(n, dtype=torch.float64))
        for m in (1, 2, n + 1, n + 3, 2 * n, max(n - 1, 1)):
            source = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
            expected = np.maximum(0, 1 - np.abs(source[:, None] - np.arange(n)))
            np.testing.assert_allclose(interpolation(n, m).numpy(), expected, atol=1e-13)
            np.testing.assert_allclose(expected.sum(axis=1), 1)


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_patches_are_the_references(patch: int, batch: int) -> None:
    x = torch.randn(batch, 5, 3 * patch, 7 * patch)
    tokens = flexible.unfold_patches(x, patch, 7 * patch)
    assert torch.equal(tokens, network.unfold_patches(x, patch))
    assert torch.equal(flexible.fold_patches(tokens, patch, batch, 7 * patch), x)


@torch.no_grad()
def test_one_trace_follows_every_size() -> None:
    """PyTorch's own trace, which says so if it freezes a number, agrees with the reference at each size."""
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(make_flexible(model, SHAPES), torch.rand(SHAPES[0]))
    for shape in SHAPES:
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=2e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, FlexibleBlock) for module in model.modules())


def test_only_blocks_that_need_it_resize() -> None:
    shapes = tuple((1, 3, side, side) for side in (160, 192, 256, 288, 320))
    model = tiny()
    assert map_sizes(model, shapes)["stages.4.1"] == {(n, n) for n in (5, 6, 8, 9, 10)}
    blocks = [module for module in make_flexible(model, shapes).modules() if isinstance(module, FlexibleBlock)]
    assert [block.whole for block in blocks] == [True, True, False]
    assert all(block.square for block in blocks)
    assert not model._forward_pre_hooks and not any(module._forward_pre_hooks for module in model.modules())


# The package


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`sized("fp16", "image")` -> the artifact of the tiny network at SIZES; made once, so do not change it."""
    model, made = load_model(model=TINY, image_size=SIZES, labels=LABELS), {}

    def make(precision: str, input: str = "tensor") -> Path:
        if (precision, input) not in made:
            out = tmp_path_factory.mktemp("sized")
            (result,) = export(model, to="coreml", precision=precision, input=input, out=out, verify=False)
            made[precision, input] = result.artifact.path
        return made[precision, input]

    return make


def mil_verdict(path: Path) -> Any:
    (verdict,) = [verdict for verdict in verify(path) if verdict.runtime == "mil-reference"]
    return verdict


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("input", ["tensor", "image"])
def test_every_size_passes(sized: Callable[..., Path], precision: str, input: str) -> None:
    verdict = mil_verdict(sized(precision, input))
    assert verdict.status == "pass", verdict.reason
    assert verdict.metrics.psnr_db >= PSNR_DB[precision]
    assert verdict.inputs == 9 * len(SIZES)


@torch.no_grad()
def test_every_size_by_hand(sized: Callable[..., Path]) -> None:
    """Without this package's parity: the saved file against the network, and nothing but the declared sizes."""
    program, model = mil.load(sized("fp32") / "tiny.mlpackage"), tiny()
    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(torch.from_numpy(program(image=x.numpy())["logits"]), model(x), rtol=1e-5, atol=1e-5)
    for shape in ((1, 3, 64, 80), (1, 3, 80, 64), (1, 3, 96, 144), (1, 3, 72, 72), (2, 3, 64, 64)):
        with pytest.raises(UsageError) as caught:
            program(image=np.zeros(shape, np.float32))
        assert f"has shape {list(shape)}, expected [1, 3, 64, 64] or [1, 3, " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_wrong_picture_size_is_refused(sized: Callable[..., Path]) -> None:
    program = mil.load(sized("fp16", "image") / "tiny.mlpackage")
    with pytest.raises(UsageError, match=r"expected \[1, 3, 64, 64\] or \[1, 3, "):
        program(image=np.zeros((64, 80, 3), np.uint8))


def test_what_xcode_shows(sized: Callable[..., Path]) -> None:
    import coremltools as ct

    description = ct.utils.load_spec(str(sized("fp16", "image") / "tiny.mlpackage")).description
    image = description.input[0]
    sizes = {(size.height, size.width) for size in image.type.imageType.enumeratedSizes.sizes}
    assert sizes == {shape[2:] for shape in SHAPES}
    assert (image.type.imageType.height, image.type.imageType.width) == (64, 64)
    assert image.shortDescription == "BGR image, 64x64 or 80x80 or 144x96 or 60x52"
    assert {output.name: output.shortDescription for output in description.output} == {
        "logits": "class scores before softmax",
        "classLabel": "label of the most probable class",
        "classLabel_probs": "probability of each label, the softmax of the class scores",
    }
    assert description.metadata.userDefined["com.apple.coreml.model.preview.type"] == "imageClassifier"
    array = ct.utils.load_spec(str(sized("fp32") / "tiny.mlpackage")).description.input[0]
    assert [tuple(shape.shape) for shape in array.type.multiArrayType.enumeratedShapes.shapes] == list(SHAPES)
    assert tuple(array.type.multiArrayType.shape) == SHAPES[0]


@pytest.mark.parametrize(
    ("input", "text"),
    [
        ("tensor", "BGR image as (x / 255 - [0.4, 0.45, 0.5]) / [0.2, 0.25, 0.3], NCHW 1x3x64x64"),
        ("image", "BGR image, 64x64"),
    ],
)
def test_one_size_is_described_too(tiny_artifact: Callable[..., Path], input: str, text: str) -> None:
    import coremltools as ct

    artifact = read_artifact(tiny_artifact("coreml", "fp16", input))
    description = ct.utils.load_spec(str(artifact.model_path)).description
    assert description.input[0].shortDescription == text
    assert [output.shortDescription for output in description.output] == ["class scores before softmax"]
    assert (artifact.manifest.capture, artifact.manifest.inputs[0].enumerated) == ("torch.export", ())


def test_inputs_that_are_no_images_are_described(tmp_path: Path) -> None:
    import coremltools as ct

    source = tmp_path / "net.py"
    source.write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2)))\n"
    )
    (result,) = export(load_model(model=f"{source}:net", input_shape=(1, 6)), to="coreml", out=tmp_path, verify=False)
    description = ct.utils.load_spec(str(result.artifact.model_path)).description
    texts = (description.input[0].shortDescription, description.output[0].shortDescription)
    assert texts == ("float32, 1x6", "output_0 of net")


def test_manifest_and_golden_vectors(sized: Callable[..., Path]) -> None:
    artifact = read_artifact(sized("fp32", "image"))
    (spec,), (logits,) = artifact.manifest.inputs, artifact.manifest.outputs
    assert spec.shape == (1, 64, 64, 3)
    assert spec.enumerated == tuple((1, *shape[2:], 3) for shape in SHAPES)
    assert (logits.shape, logits.enumerated) == ((1, 10), ())
    names = {f"{case}@{h}x{w}" for case in ("noise-0", "photo-chelsea") for _, _, h, w in SHAPES}
    assert {*load_golden(artifact)} == names
    verdicts = verify(artifact.path, against="golden")
    assert {(verdict.status, verdict.inputs) for verdict in verdicts} == {("pass", len(names))}


def test_modules_are_named(sized: Callable[..., Path]) -> None:
    program = mil.load(sized("fp32") / "tiny.mlpackage")
    known = {name for name, _ in tiny().named_modules()}
    modules = [op.module for op in program.ops if op.type in ("conv", "linear", "layer_norm", "softmax", "silu")]
    assert sum(module in known for module in modules) > 0.95 * len(modules)
    assert {"stages.3.1.encoders.1.attention", "stages.2.1.to_tokens", "classifier"} <= {*modules}


def test_inspect_shows_the_sizes(sized: Callable[..., Path], cli: Callable[..., Finished]) -> None:
    done = cli("inspect", sized("fp32"), "--json")
    assert done.code == 0, done.err
    assert "image  1x3x64x64 or 1x3x80x80 or 1x3x144x96 or 1x3x60x52  float32  NCHW" in done.err
    (report,) = done.json["artifacts"]
    assert report["inputs"][0]["enumerated"] == [list(shape) for shape in SHAPES]
    assert "enumerated" not in report["outputs"][0]


@pytest.mark.parametrize("target", ["iOS15", "iOS18"])
def test_other_deployment_targets(target: str, tmp_path: Path) -> None:
    model = load_model(model=TINY, image_size=["80", "64x96"])  # the first one resizes
    (result,) = export(model, to="coreml", precision="fp16", deployment_target=target, out=tmp_path, verify=False)
    verdict = mil_verdict(result.artifact.path)
    assert verdict.status == "pass", verdict.reason


def test_patch_configuration_b(tmp_path: Path) -> None:
    """Patches of 8, 4 and 2 pixels: every block resizes, and a map can be smaller than its patch."""
    weights = tmp_path / "weights.safetensors"
    model = randomize(create_mobilevit("xxs", num_classes=7, patch_config="B"), seed=3)
    save_weights(model, weights, preprocessing=FAMILY_PREPROCESSING["timm"])  # type: ignore[arg-type]
    loaded = load_model("xxs", weights=weights, image_size=["32", "112x80"])
    (result,) = export(loaded, to="coreml", precision="fp32", out=tmp_path, verify=False)
    verdict = mil_verdict(result.artifact.path)
    assert verdict.status == "pass", verdict.reason


# Faults that parity must find


def frozen_verdict(model: Any, out: Path) -> Any:
    (result,) = export(model, to="coreml", precision="fp32", out=out, verify=False)
    return mil_verdict(result.artifact.path)


def test_frozen_resize_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The reference network as it is, traced at one size, which the other one leaves as a failed check."""
    monkeypatch.setattr(convert_coreml, "make_flexible", lambda module, shapes: module)
    verdict = frozen_verdict(load_model(model=TINY, image_size=["64", "80"]), tmp_path)
    assert verdict.status == "fail"
    assert "noise-0@80x80: the runtime failed: reshape" in verdict.reason
    with pytest.raises(ConversionError):  # traced where it resizes, coremltools does not take it
        frozen_verdict(load_model(model=TINY, image_size=["80", "64"]), tmp_path / "second")


def test_border_without_clamping_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unclamped(n: int, m: int) -> torch.Tensor:
        source = (torch.arange(m) + 0.5) * n / m - 0.5
        return (1 - (source[:, None] - torch.arange(n)).abs()).clamp(min=0)

    monkeypatch.setattr(flexible, "interpolation", unclamped)
    verdict = frozen_verdict(load_model(model=TINY, image_size=SIZES[:2]), tmp_path)
    assert verdict.status == "fail"
    assert "PSNR" in verdict.reason


MODELS = """
from torch import nn

class Branch(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x).mean((2, 3))
        return y * 2 if x.shape[-1] > 64 else y

class Flat(nn.Linear):
    def forward(self, x):
        return super().forward(x.mean(1).reshape(-1, int(x.shape[2]) * int(x.shape[3]))[:, :64])

def branch(): return Branch(3, 4, 1)
def flat(): return Flat(64, 4)
def plain(): return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 5, 1))
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(MODELS)
    return tmp_path / "net.py"


def test_any_model_without_branches_passes(models: Path, tmp_path: Path) -> None:
    """No MobileViT: converted as it is. Its output follows the input's size, and the manifest says so."""
    model = load_model(model=f"{models}:plain", image_size=["32", "48x33"])
    (result,) = export(model, to="coreml", precision="fp32", out=tmp_path, verify=False)
    verdict = mil_verdict(result.artifact.path)
    assert verdict.status == "pass", verdict.reason
    (output,) = result.artifact.manifest.outputs
    assert output.enumerated == ((1, 5, 15, 15), (1, 5, 23, 16))


def test_any_model_with_a_frozen_branch_fails(models: Path, cli: Callable[..., Finished], tmp_path: Path) -> None:
    done = cli(
        "--to", "coreml", "--model", f"{models}:branch", "--image-size", "64", "--image-size", "96", "--out", tmp_path
    )
    assert done.code == 1, done.err
    assert "PSNR" in done.out


def test_any_model_that_stops_at_a_size_fails(models: Path, tmp_path: Path) -> None:
    """A run that breaks is a failed check of the file, no error of the user's."""
    verdict = frozen_verdict(load_model(model=f"{models}:flat", image_size=["16", "24"]), tmp_path)
    assert verdict.status == "fail", verdict.reason


# Formats with one size


def test_formats_with_one_size_refuse_before_any_work(cli: Callable[..., Finished], tmp_path: Path) -> None:
    sizes = ("--image-size", "64", "--image-size", "80")
    done = cli("--to", "all", "--model", "/nowhere/net.py:net", *sizes, "--out", tmp_path)
    assert done.code == 2
    assert done.err == "mvit-export: error: ONNX takes one --image-size, 2 given; coreml takes several\n"
    model = load_model(model=TINY, image_size=["64", "80"])
    with pytest.raises(UsageError, match="TFLite takes one --image-size, 2 given; coreml takes several"):
        export(model, to=["coreml", "tflite"], out=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_repeated_size_is_one(cli: Callable[..., Finished], tmp_path: Path) -> None:
    done = cli("--to", "onnx", "--model", TINY, "--image-size", "64", "--image-size", "64x64", "--out", tmp_path)
    assert done.code == 0, done.err


def test_core_ml_has_a_limit() -> None:
    targets = plan_targets("coreml")
    check_size_count(targets, 128)
    with pytest.raises(UsageError, match="Core ML takes at most 128 image sizes, 129 given"):
        check_size_count(targets, 129)


# The real network


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """XXS with random statistics and biases, so that nothing that is dropped goes unnoticed."""
    path = tmp_path_factory.mktemp("weights") / "xxs.safetensors"
    model = randomize(create_mobilevit("xxs"), seed=1)
    save_weights(model, path, preprocessing=FAMILY_PREPROCESSING["hf"])  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(  # the tiny network's files have every pair of precision and input, above
    ("sizes", "precision", "input"),
    [(TRAINED_AT, "fp16", "image"), (("240x272", "224", "256", "250x333"), "fp32", "tensor")],
    ids=["trained", "others"],
)
def test_xxs_passes_at_every_size(
    sizes: tuple[str, ...], precision: str, input: str, weights: Path, tmp_path: Path
) -> None:
    model = load_model("xxs", weights=weights, image_size=sizes)
    (result,) = export(model, to="coreml", precision=precision, input=input, out=tmp_path, verify=False)
    verdict = mil_verdict(result.artifact.path)
    assert verdict.status == "pass", verdict.reason
    assert verdict.metrics.psnr_db >= PSNR_DB[precision]
    flat = precision == "fp32"  # the flat picture, in the first size
    assert verdict.inputs == 9 * len(sizes) + flat
