"""From a model to files that run: variants, formats, precisions, inputs, labels, sizes, checkpoints."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, TARGETS, TINY, Finished, run_module
from helpers import randomize
from PIL import Image

from mvit_export import MvitExportError, export, load_model, save_weights, verify
from mvit_export.artifact import read_artifact
from mvit_export.data.preprocessing import FAMILY_PREPROCESSING, to_picture, to_tensor
from mvit_export.data.synthetic import open_photo
from mvit_export.families.mobilevit.network import create_mobilevit
from mvit_export.families.timm import import_timm

pytestmark = pytest.mark.slow

PSNR_DB = {"fp32": 100, "fp16": 50}


def check(result: Any, precision: str) -> None:
    """Parity as the project promises it: fp32 >= 100 dB and <= 1e-5 of the scale, fp16 >= 50 dB."""
    verdict = result.parity
    assert verdict.status == "pass", verdict.reason
    assert verdict.metrics.psnr_db >= PSNR_DB[precision]
    assert precision == "fp16" or verdict.metrics.max_rel <= 1e-5


@pytest.mark.parametrize(("fmt", "precision"), TARGETS)
@pytest.mark.parametrize("input", ["tensor", "image"])
def test_tiny_passes(tiny_artifact: Callable[..., Path], fmt: str, precision: str, input: str) -> None:
    (verdict,) = verify(tiny_artifact(fmt, precision, input))
    assert verdict.status == "pass", verdict.reason
    assert verdict.metrics is not None
    assert verdict.metrics.psnr_db >= PSNR_DB[precision]
    assert verdict.inputs == 9


@pytest.mark.parametrize(("variant", "precision"), [("xs", "fp16"), ("s", "fp32")])
def test_variants_pass_in_every_format(variant: str, precision: str, tmp_path: Path) -> None:
    """Random statistics and biases, so that nothing that is dropped goes unnoticed; saved and loaded on the way."""
    weights = tmp_path / "weights.safetensors"
    model = randomize(create_mobilevit(variant), seed=1)
    save_weights(model, weights, preprocessing=FAMILY_PREPROCESSING["hf"])  # type: ignore[arg-type]
    loaded = load_model(variant, weights=weights)
    results = export(loaded, to="all", precision=precision, out=tmp_path)
    assert [result.artifact.path.name for result in results] == [
        f"{f}-{precision}" for f in ("coreml", "onnx", "tflite")
    ]
    for result in results:
        check(result, precision)


def test_demo_command(tmp_path: Path) -> None:
    """The README's two commands, from the start."""
    made = run_module("--to", "all", "--variant", "xxs", cwd=tmp_path)
    assert made.code == 0
    checked = run_module("verify", "artifacts/mobilevit_xxs", "--json", cwd=tmp_path)
    assert checked.code == 0
    statuses = {a["format"]: (a["status"], a["runtime"].split()[0]) for a in checked.json["artifacts"]}
    assert statuses == {
        "coreml": ("pass", "mil-reference"), "onnx": ("pass", "onnxruntime"), "tflite": ("pass", "ai-edge-litert"),
    }  # fmt: skip
    assert {a["format"]: a["precision"] for a in checked.json["artifacts"]} == {
        "coreml": "fp16", "onnx": "fp32", "tflite": "fp32",
    }  # fmt: skip


def run_onnx(file: Path, array: np.ndarray) -> np.ndarray:
    """By hand, without this package."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": array})[0]


def run_tflite(file: Path, array: np.ndarray) -> np.ndarray:
    """By hand, without this package."""
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(str(file)).get_signature_runner()(image=array)["logits"]


BY_HAND = {"onnx": run_onnx, "tflite": run_tflite}


@pytest.mark.parametrize(("input", "fmt"), [("tensor", "onnx"), ("image", "tflite")])
def test_transformers_checkpoint_gives_transformers_logits(
    input: str, fmt: str, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    """Saved by transformers, exported by the command, run by hand on a photograph: transformers' own answer.

    A colourful photograph, since RGB sent to a BGR checkpoint keeps the argmax often enough to go unnoticed.
    """
    import_timm()
    transformers = importlib.import_module("transformers")
    config = transformers.MobileViTConfig(
        hidden_sizes=[64, 80, 96], neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320], expand_ratio=2.0, num_labels=12
    )
    oracle = randomize(transformers.MobileViTForImageClassification(config), seed=5)
    oracle.save_pretrained(tmp_path / "hf")
    processor = {
        "image_processor_type": "MobileViTImageProcessor", "do_resize": True, "size": {"shortest_edge": 288},
        "resample": 2, "do_center_crop": True, "crop_size": {"height": 256, "width": 256}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_flip_channel_order": True,
    }  # fmt: skip
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(processor))
    photo = open_photo("coffee")
    picture = center_crop(photo, short_side=288, crop=256)
    bgr = np.ascontiguousarray(picture[None, :, :, ::-1].transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(bgr)).logits.numpy()
    done = cli("--to", fmt, "--weights", tmp_path / "hf", "--input", input, "--out", tmp_path, "--no-verify")
    assert done.code == 0, done.err
    file = tmp_path / f"mobilevit_xxs/{fmt}-fp32/mobilevit_xxs.{fmt}"
    logits = BY_HAND[fmt](file, picture[None] if input == "image" else bgr)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def center_crop(photo: Image.Image, *, short_side: int, crop: int) -> np.ndarray:
    """transformers' resize and crop, written again: uint8 RGB (crop, crop, 3)."""
    scale = short_side / min(photo.size)
    width, height = (short_side if side == min(photo.size) else int(side * scale) for side in photo.size)
    resized = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - crop) // 2, (width - crop) // 2
    return resized[top : top + crop, left : left + crop]


def test_image_input_equals_tensor_input(tiny_model: Any, tiny_artifact: Callable[..., Path]) -> None:
    """A picture through the baked preprocessing gives what the preprocessed tensor gives."""
    picture = to_picture(open_photo("coffee"), tiny_model.preprocessing)
    tensor = to_tensor(picture[None], tiny_model.preprocessing)
    for fmt, run in BY_HAND.items():
        from_picture = run(tiny_artifact(fmt, "fp32", "image") / f"tiny.{fmt}", picture[None])
        from_tensor = run(tiny_artifact(fmt) / f"tiny.{fmt}", tensor)
        assert np.abs(from_picture - from_tensor).max() <= 1e-5 * np.abs(from_tensor).max()
        flipped = run(
            tiny_artifact(fmt, "fp32", "image") / f"tiny.{fmt}", np.ascontiguousarray(picture[None, ..., ::-1])
        )
        assert np.abs(flipped - from_tensor).max() > 1e-2 * np.abs(from_tensor).max()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("labelled")
    model = load_model(model=TINY, labels=LABELS)
    results = export(model, to="all", input="image", out=out)
    assert all(result.parity and result.parity.status != "fail" for result in results)
    return {result.artifact.manifest.format: result.artifact.model_path for result in results}


def test_onnx_metadata(labelled: dict[str, Path]) -> None:
    import onnx

    model = onnx.load(labelled["onnx"])
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["labels"]) == list(LABELS)
    assert (model.graph.name, model.producer_name) == ("tiny", "mvit-export")
    assert json.loads(metadata["preprocessing"])["channel_order"] == "BGR"
    assert {"name", "description", "license", "version", "weights_state_sha256"} <= {*metadata}
    text = labelled["onnx"].read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in text  # no stack traces with this machine's paths


def test_tflite_metadata(labelled: dict[str, Path]) -> None:
    from ai_edge_litert.tools import flatbuffer_utils

    with zipfile.ZipFile(labelled["tflite"]) as packed:  # as Android's tools read it
        assert packed.read("labels.txt").decode().splitlines() == list(LABELS)
    model = flatbuffer_utils.read_model(str(labelled["tflite"]))
    metadata = {entry.name.decode(): bytes(model.buffers[entry.buffer].data) for entry in model.metadata}
    assert metadata["name"] == b"tiny"
    assert json.loads(metadata["preprocessing"])["channel_order"] == "BGR"
    assert b"tiny, image-classification" in model.description


def test_coreml_metadata_and_classifier(labelled: dict[str, Path]) -> None:
    import coremltools as ct

    spec = ct.utils.load_spec(str(labelled["coreml"]))
    image = spec.description.input[0]
    assert (image.name, image.type.WhichOneof("Type")) == ("image", "imageType")
    assert image.type.imageType.colorSpace == ct.proto.FeatureTypes_pb2.ImageFeatureType.BGR
    outputs = {output.name: output.type.WhichOneof("Type") for output in spec.description.output}
    assert outputs == {"logits": "multiArrayType", "classLabel": "stringType", "classLabel_probs": "dictionaryType"}
    metadata = spec.description.metadata
    assert metadata.shortDescription.startswith("tiny, image-classification, fp16")
    assert metadata.userDefined["com.apple.coreml.model.preview.type"] == "imageClassifier"
    assert json.loads(metadata.userDefined["labels"]) == list(LABELS)


@pytest.mark.parametrize("target", ["iOS15", "iOS16", "iOS17", "iOS18", "iOS26"])
def test_deployment_targets(target: str, small_model: Any, tmp_path: Path) -> None:
    import coremltools as ct

    (result,) = export(small_model, to="coreml", deployment_target=target, out=tmp_path, verify=False)
    spec = ct.utils.load_spec(str(result.artifact.model_path))
    assert spec.specificationVersion == {"iOS15": 6, "iOS16": 7, "iOS17": 8, "iOS18": 9, "iOS26": 10}[target]
    types = {feature.name: feature.type for feature in (*spec.description.input, *spec.description.output)}
    float32 = ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32
    assert {name: kind.multiArrayType.dataType for name, kind in types.items()} == {"image": float32, "logits": float32}


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_opsets(opset: int, tiny_model: Any, tmp_path: Path) -> None:
    import onnx

    (result,) = export(tiny_model, to="onnx", opset=opset, out=tmp_path)
    check(result, "fp32")
    model = onnx.load(result.artifact.model_path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]


def test_fp16_halves_the_file(tiny_artifact: Callable[..., Path]) -> None:
    for fmt in ("coreml", "onnx", "tflite"):
        full, half = (weight_bytes(read_artifact(tiny_artifact(fmt, p)).model_path, fmt) for p in ("fp32", "fp16"))
        padded = 0.56 if fmt == "coreml" else 0.52  # Core ML pads every blob to 64 bytes
        assert 0.49 < half / full < padded, fmt


def weight_bytes(file: Path, fmt: str) -> int:
    """The weights alone: a tiny network's graph is as large as its numbers."""
    if fmt == "coreml":
        return (file / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    if fmt == "onnx":
        import onnx

        return sum(len(tensor.raw_data) for tensor in onnx.load(file).graph.initializer if len(tensor.raw_data) > 64)
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(file))
    described = {entry.buffer for entry in model.metadata}
    buffers = [len(b.data) for i, b in enumerate(model.buffers) if b.data is not None and i not in described]
    return sum(size for size in buffers if size > 64)


@pytest.mark.parametrize("size", ["48x80", "50"])
def test_sizes_that_the_patch_does_not_divide(size: str, tmp_path: Path) -> None:
    (result,) = export(load_model(model=TINY, image_size=size), to="onnx", out=tmp_path)
    check(result, "fp32")


def test_patch_configuration_b(tmp_path: Path) -> None:
    model = load_model("xxs", patch_config="b", image_size=128, num_classes=7)
    (result,) = export(model, to="onnx", out=tmp_path)
    check(result, "fp32")
    manifest = result.artifact.manifest
    assert (manifest.model.settings["patch_config"], manifest.model.num_classes) == ("B", 7)
    assert manifest.outputs[0].shape == (1, 7)


def test_own_checkpoint_through_the_command(cli: Callable[..., Finished], tmp_path: Path) -> None:
    """Save, export without naming the variant, move the checkpoint, verify with --weights."""
    weights = tmp_path / "mine.safetensors"
    model = randomize(create_mobilevit("xxs", num_classes=5), seed=2)
    save_weights(model, weights, preprocessing=FAMILY_PREPROCESSING["timm"], labels=LABELS[:5])  # type: ignore[arg-type]
    done = cli("--to", "onnx", "--weights", weights, "--image-size", "64", "--out", tmp_path)
    assert done.code == 0, done.err
    manifest = read_artifact(tmp_path / "mobilevit_xxs/onnx-fp32").manifest
    assert (manifest.weights.family, manifest.weights.trained) == ("mvit-export", True)
    assert manifest.model.labels == LABELS[:5]
    assert manifest.preprocessing is not None
    assert manifest.preprocessing.channel_order == "RGB"
    moved = weights.rename(tmp_path / "elsewhere.safetensors")
    lost = cli("verify", tmp_path)
    assert lost.code == 2
    assert lost.err.startswith(f"mvit-export: error: {weights}: ")
    assert cli("verify", tmp_path, "--weights", moved).code == 0


def test_timm_model_by_name(tmp_path: Path) -> None:
    import_timm()
    model = load_model(model="timm:mobilenetv3_small_050", image_size=64)
    assert model.preprocessing is not None
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    (result,) = export(model, to="onnx", input="image", out=tmp_path)
    check(result, "fp32")
    assert result.artifact.path == tmp_path / "mobilenetv3_small_050/onnx-fp32"
    assert result.artifact.manifest.weights.trained is False


MODELS = """
import torch
from torch import nn

class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), super().forward(x).sigmoid()

class Mapping(nn.Linear):
    def forward(self, x):
        return {"scores": super().forward(x)}

def pair():
    return Pair(6, 4)

def mapping():
    return Mapping(6, 4)
"""


@pytest.mark.parametrize(("factory", "names"), [("pair", ("output_0", "output_1")), ("mapping", ("scores",))])
@pytest.mark.parametrize("fmt", ["onnx", "tflite"])
def test_any_model_with_other_outputs(factory: str, names: tuple[str, ...], fmt: str, tmp_path: Path) -> None:
    source = tmp_path / f"{factory}_net.py"
    source.write_text(MODELS)
    model = load_model(model=f"{source}:{factory}", input_shape=(2, 6))
    (result,) = export(model, to=fmt, out=tmp_path)
    check(result, "fp32")
    assert result.artifact.manifest.output_names == names
    assert result.artifact.manifest.inputs[0].shape == (2, 6)


def test_weights_for_any_model(tmp_path: Path) -> None:
    """--model with --weights: loaded strictly, and the verification reads them again."""
    source = tmp_path / "net.py"
    source.write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))\n")
    state = {"1.weight": torch.randn(3, 12), "1.bias": torch.randn(3)}
    torch.save(state, tmp_path / "w.pt")
    model = load_model(model=f"{source}:net", weights=tmp_path / "w.pt", input_shape=(1, 3, 2, 2))
    (result,) = export(model, to="onnx", out=tmp_path)
    check(result, "fp32")
    assert result.artifact.manifest.weights.trained is True
    ones = np.ones((1, 3, 2, 2), np.float32)
    expected = (state["1.weight"].sum(1) + state["1.bias"]).numpy()
    assert run_onnx(result.artifact.model_path, ones)[0] == pytest.approx(expected, abs=1e-5)


def test_weights_for_a_half_precision_model_are_not_rounded(tmp_path: Path) -> None:
    source = tmp_path / "net.py"
    source.write_text("from torch import nn\ndef net(): return nn.Linear(6, 3).half()\n")
    weight = torch.rand(3, 6)
    torch.save({"weight": weight, "bias": torch.zeros(3)}, tmp_path / "w.pt")
    model = load_model(model=f"{source}:net", weights=tmp_path / "w.pt", input_shape=(1, 6))
    assert torch.equal(model.module.weight, weight)


def test_repeated_labels_of_a_checkpoint_are_numbered(tmp_path: Path) -> None:
    """ImageNet's list has "crane" twice; a user who passed no labels must not be stopped by it."""
    weights = tmp_path / "w.safetensors"
    model = create_mobilevit("xxs", num_classes=3)
    save_weights(model, weights, preprocessing=FAMILY_PREPROCESSING["hf"], labels=["crane", "dog", "crane"])  # type: ignore[arg-type]
    assert load_model(weights=weights, image_size=32).info.labels == ("crane", "dog", "crane (2)")


def test_labels_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(LABELS), encoding="utf-8-sig")
    assert load_model(model=TINY, labels=tmp_path / "labels.txt").info.labels == LABELS


def test_factory_that_is_random_is_refused_before_the_work(tmp_path: Path) -> None:
    source = tmp_path / "net.py"
    source.write_text(
        "import os, torch\ndef net():\n    layer = torch.nn.Linear(6, 3)\n"
        "    layer.bias.data[0] = int.from_bytes(os.urandom(3), 'big')\n    return layer\n"
    )
    with pytest.raises(MvitExportError, match="gives other weights than were exported"):
        export(load_model(model=f"{source}:net", input_shape=(1, 6)), to="onnx", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loading_leaves_the_random_stream_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (load_model("xxs", image_size=32).weights.state_sha256 for _ in range(2))
    assert first == second
    assert torch.equal(torch.rand(3), expected)
    assert load_model("xxs", image_size=32, seed=1).weights.state_sha256 != first


def test_example_script(tmp_path: Path) -> None:
    """The Python API as the README and examples/ show it."""
    script = Path(__file__).parents[2] / "examples/export_and_verify.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "onnx-fp32 pass" in done.stdout


@pytest.mark.parametrize(
    ("name", "capture"),
    [("mobilenetv3_small_050", "torch.export"), ("swin_tiny_patch4_window7_224", "torch.jit.trace")],
)
def test_timm_families_in_core_ml(name: str, capture: str, tmp_path: Path) -> None:
    """Swin converts from a trace only, and the manifest says so. The other families are in test_mil_models.py."""
    import_timm()
    (result,) = export(load_model(model=f"timm:{name}"), to="coreml", precision="fp32", out=tmp_path)
    check(result, "fp32")
    assert result.artifact.manifest.capture == capture
