"""The parity check itself: its figures against numpy and scipy-free arithmetic, and that a wrong file fails it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, ROOT, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mvit_export import export, load_model, verify
from mvit_export.artifact import GOLDEN, MANIFEST, load_golden, read_artifact, save_golden, sha256_file
from mvit_export.checks import parity
from mvit_export.checks.comparison import judge_outcomes, run_cases
from mvit_export.checks.figures import measure, violations, worst
from mvit_export.checks.inputs import make_cases
from mvit_export.checks.reference import Pair
from mvit_export.converters.coreml.convert import CoreMLForm
from mvit_export.errors import ArtifactError, ModelError, UsageError, WeightsError
from mvit_export.formats.base import SAME_ARITHMETIC, Tolerance
from mvit_export.formats.table import FORMATS
from mvit_export.system.trust import TRUST_ALL
from mvit_export.tasks.classification import CLASSIFICATION


def test_figures_by_hand() -> None:
    reference = np.array([[0.0, 2.0, -4.0]], np.float32)
    output = np.array([[0.0, 2.0, -3.0]], np.float32)
    m = measure(reference, output, CLASSIFICATION)
    assert m.max_abs == 1
    assert m.max_rel == 0.25
    assert m.psnr_db == pytest.approx(10 * np.log10(16 / (1 / 3)))
    assert m.cosine == pytest.approx(16 / np.sqrt(20 * 13))
    p, q = (np.exp(x) / np.exp(x).sum() for x in (reference[0].astype(float), output[0].astype(float)))
    assert m.of_task["kl"] == pytest.approx((p * np.log(p / q)).sum())
    assert m.of_task["top1_agreement"] == 1


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 1e3), noise=st.floats(1e-6, 1e-1))
@settings(deadline=None, max_examples=50)
def test_noise_of_known_size_gives_its_decibels(seed: int, scale: float, noise: float) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((4, 1000)) * scale
    output = reference + rng.standard_normal((4, 1000)) * noise * np.abs(reference).max()
    assert measure(reference, output, CLASSIFICATION).psnr_db == pytest.approx(-20 * np.log10(noise), abs=0.5)


def test_identical_outputs_have_finite_figures() -> None:
    for array in (np.ones((1, 5), np.float32), np.zeros((1, 5), np.float32)):
        m = measure(array, array, CLASSIFICATION)
        assert (m.max_abs, m.max_rel, m.cosine, m.of_task["kl"]) == (0, 0, pytest.approx(1), 0)
        assert 300 < m.psnr_db < 330
        json.dumps(m.__dict__, allow_nan=False)


def test_zero_reference_and_nonzero_output_is_no_match() -> None:
    m = measure(np.zeros((1, 5)), np.full((1, 5), 1e-9), CLASSIFICATION)
    assert (m.psnr_db, m.max_rel) == (0, 1)


def test_agreement_ignores_order_within_the_top_five() -> None:
    reference = np.arange(10.0)[None]
    swapped = reference.copy()
    swapped[0, [9, 8]] = reference[0, [8, 9]]
    m = measure(reference, swapped, CLASSIFICATION)
    assert (m.of_task["top1_agreement"], m.of_task["top5_agreement"]) == (0, 1)


def test_confidence_collapse_fails_although_the_argmax_agrees() -> None:
    reference = np.log(np.array([[0.68, 0.16, 0.16]]))
    collapsed = np.log(np.array([[0.40, 0.30, 0.30]]))
    m = measure(reference, collapsed, CLASSIFICATION)
    assert m.of_task["top1_agreement"] == 1
    tolerance = FORMATS["onnx"].precisions["fp16"].tolerance
    assert any(reason.startswith("KL") for reason in violations(m, tolerance, CLASSIFICATION))


def test_worst_takes_each_figure_from_its_worst_case() -> None:
    a = measure(np.array([[1.0, 2.0]]), np.array([[1.0, 2.1]]), CLASSIFICATION)
    b = measure(np.array([[1.0, 20.0]]), np.array([[1.5, 20.0]]), CLASSIFICATION)
    both = worst([a, b], CLASSIFICATION)
    assert both.max_abs == b.max_abs
    assert both.max_rel == a.max_rel
    assert both.psnr_db == min(a.psnr_db, b.psnr_db)


def test_each_bound_is_applied() -> None:
    tight = Tolerance(psnr_db=80, max_rel=1e-6, cosine=1 - 1e-12, kl=1e-9, reason="")
    m = measure(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 3.01]]), CLASSIFICATION)
    assert [reason.split()[0] for reason in violations(m, tight, CLASSIFICATION)] == ["PSNR", "max", "1", "KL"]
    assert not violations(measure(np.ones((1, 3)), np.ones((1, 3)), CLASSIFICATION), tight, CLASSIFICATION)


def test_every_format_and_precision_has_a_reasoned_tolerance() -> None:
    rows = [(p, precision.tolerance) for fmt in FORMATS.values() for p, precision in fmt.precisions.items()]
    assert all(row.reason for _, row in rows)
    for p, row in rows:
        assert row.psnr_db >= {"fp32": 100, "fp16": 50}.get(p, 10)
        assert p in ("fp32", "fp16") or None not in (row.mean_kl, row.delta_p)  # a collapse of confidence must fail


def test_inputs_are_noise_photographs_and_structures(tiny_artifact: Callable[..., Path]) -> None:
    cases = {case.name: case for case in make_cases(read_artifact(tiny_artifact("onnx")).manifest)}
    assert {*cases} == {
        "noise-0", "noise-1", "noise-2", "photo-chelsea", "photo-coffee", "black", "white", "checkerboard", "gradient",
    }  # fmt: skip
    image = cases["photo-coffee"].artifact_input
    assert image.shape == (1, 3, 64, 64)
    assert image.dtype == np.float32
    colours = image.mean(axis=(0, 2, 3)) * [0.2, 0.25, 0.3] + [
        0.4,
        0.45,
        0.5,
    ]  # mean and std undone
    assert colours[2] > colours[0] + 0.1  # BGR: the last channel is the coffee's red
    assert len({case.artifact_input.tobytes() for case in cases.values()}) == len(cases)


def test_image_input_takes_pictures(tiny_artifact: Callable[..., Path]) -> None:
    cases = make_cases(read_artifact(tiny_artifact("onnx", "fp32", "image")).manifest)
    for case in cases:
        assert case.artifact_input.shape == (1, 64, 64, 3)
        assert case.artifact_input.dtype == np.uint8
        assert case.model_input.shape == (1, 3, 64, 64)


@pytest.mark.slow
def test_dynamic_batch_is_run_at_two_sizes(tiny_model: Any, tmp_path: Path) -> None:
    (result,) = export(tiny_model, to="onnx", dynamic_batch=True, out=tmp_path)
    assert result.parity is not None
    assert result.parity.status == "pass"
    cases = make_cases(result.artifact.manifest)
    assert {case.artifact_input.shape[0] for case in cases} == {1, 3}
    assert result.parity.inputs == len(cases) == 10


def compare(manifest: Any, run: Callable[[np.ndarray], Any], pairs: list[Pair]) -> tuple[list[str], Any]:
    judged = judge_outcomes(run_cases(manifest, run, pairs), SAME_ARITHMETIC, CLASSIFICATION)
    return judged.reasons, judged.metrics


# The mutations that a check must notice. Each makes a wrong file; the manifest keeps the truth.


def swap_channels(model: nn.Module) -> None:
    model.stem.conv.weight.data = model.stem.conv.weight.data.flip(1)


def transpose_weight(model: nn.Module) -> None:
    proj = model.stages[0][1].encoders[0].attention.proj
    proj.weight.data = proj.weight.data.T.contiguous()


def drop_layer_norm(model: nn.Module) -> None:
    model.stages[0][1].norm = nn.Identity()


def wrong_eps(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3  # the default of Keras


def smaller_eps(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6  # the default of many networks


def bear_nan(model: nn.Module) -> None:
    model.classifier.bias.data[3] = float("nan")


MUTATIONS = [(m, "onnx") for m in (swap_channels, transpose_weight, drop_layer_norm, wrong_eps, bear_nan)]
MUTATIONS += [(m, fmt) for m in (swap_channels, bear_nan) for fmt in ("coreml", "tflite")]  # the check is the same


def check_mutant(model: Any, mutate: Callable[[nn.Module], None], fmt: str, out: Path) -> Any:
    module = copy.deepcopy(model.module)
    mutate(module)
    (result,) = export(replace(model, module=module), to=fmt, out=out)
    assert result.parity is not None
    return result.parity


@pytest.mark.slow
@pytest.mark.parametrize(("mutate", "fmt"), MUTATIONS, ids=lambda part: getattr(part, "__name__", part))
def test_mutated_file_fails(mutate: Callable[[nn.Module], None], fmt: str, small_model: Any, tmp_path: Path) -> None:
    verdict = check_mutant(small_model, mutate, fmt, tmp_path)
    assert verdict.status == "fail"
    assert ("NaN" in verdict.reason) == (mutate is bear_nan)


@pytest.mark.slow
def test_smaller_eps_fails(tiny_model: Any, tmp_path: Path) -> None:
    assert check_mutant(tiny_model, smaller_eps, "onnx", tmp_path).status == "fail"


@pytest.mark.slow
def test_smaller_eps_fails_in_a_trained_network(tmp_path: Path) -> None:
    """Only a flat green picture shows it, on which the LayerNorms' inputs vary least."""
    model = load_model(weights=ROOT / "examples" / "digits_xxs.safetensors", image_size=64)
    mutated = copy.deepcopy(model.module)
    smaller_eps(mutated)
    (result,) = export(replace(model, module=mutated), to="onnx", out=tmp_path)
    assert result.parity is not None
    assert (result.parity.status, result.parity.worst_case) == ("fail", "flat-#008000")
    (located,) = verify(result.artifact.path, find_layer=True)
    assert located.located is not None
    assert located.located.case == "flat-#008000"
    (right,) = export(model, to="onnx", out=tmp_path / "right")
    assert right.parity is not None
    assert (right.parity.status, right.parity.inputs) == ("pass", 10)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["onnx", "tflite"])
def test_shuffled_labels_fail(fmt: str, tmp_path: Path) -> None:
    model = load_model(model=SMALL, input_shape=(1, 3, 16, 16), labels=LABELS)
    (good,) = export(model, to=fmt, out=tmp_path)
    assert good.parity is not None
    assert good.parity.status == "pass"
    shuffled = [LABELS[1], LABELS[0], *LABELS[2:]]
    rewrite_manifest(good.artifact.path, lambda data: data["model"].update(labels=shuffled))
    (result,) = verify(good.artifact.path)
    assert result.status == "fail"
    assert result.reason == "label 0 is 'digit 0' in the file, 'digit 1' in the manifest"


def negated_probabilities(self: CoreMLForm, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scores = self.model(image)["logits"]
    return scores, torch.softmax(-scores, dim=-1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["labels", "probabilities"])
def test_wrong_classifier_fails(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Core ML's own classifier, beside metadata that is right: reversed labels, probabilities of the negated scores."""
    import coremltools as ct

    if fault == "labels":
        original = ct.ClassifierConfig
        monkeypatch.setattr(ct, "ClassifierConfig", lambda labels, **options: original(labels[::-1], **options))
    else:
        monkeypatch.setattr(CoreMLForm, "forward", negated_probabilities)
    source = tmp_path / "net.py"
    source.write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))\n")
    model = load_model(model=f"{source}:net", input_shape=(1, 3, 2, 2), labels=["a", "b", "c"])
    (result,) = export(model, to="coreml", precision="fp32", out=tmp_path)
    assert result.parity is not None
    assert result.parity.status == "fail"
    assert f"the classifier's {fault} are not" in result.parity.reason


@pytest.mark.slow
def test_error_hidden_under_an_offset_fails(tmp_path: Path) -> None:
    """A large bias makes every relative figure look good; what the input changes is what counts."""
    source = tmp_path / "net.py"
    text = (
        "import torch\nfrom torch import nn\ndef net():\n    torch.manual_seed(0)\n    layer = nn.Linear(12, 3)\n"
        "    nn.init.constant_(layer.bias, 10)\n    layer.weight.data *= 0.01\n    return nn.Sequential({}, layer)\n"
    )
    source.write_text(text.format("nn.Flatten()"))
    model = load_model(model=f"{source}:net", input_shape=(1, 3, 2, 2))
    swapped = replace(model, module=nn.Sequential(Flip(), *copy.deepcopy(model.module)))
    (result,) = export(swapped, to="onnx", precision="fp16", out=tmp_path)
    assert result.parity is not None
    assert result.parity.status == "fail"
    assert "of what the input changes" in result.parity.reason
    (good,) = export(model, to="onnx", precision="fp32", out=tmp_path)
    assert good.parity is not None
    assert good.parity.status == "pass"


class Flip(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x[:, 2:3], x[:, 1:2], x[:, 0:1]), dim=1)


@pytest.mark.slow
def test_damaged_file_leaves_no_old_verdict(tiny_model: Any, tmp_path: Path) -> None:
    (result,) = export(tiny_model, to="onnx", out=tmp_path)
    assert (result.artifact.path / "parity.json").exists()
    result.artifact.model_path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="was changed after the export"):
        verify(tmp_path)
    assert not (result.artifact.path / "parity.json").exists()


@pytest.mark.parametrize("status", ["pass", "fail"])
def test_verdict_that_cannot_be_stored_says_so(
    status: str, tiny_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: Any) -> None:
        raise ArtifactError(f"{path} cannot be written: Read-only file system")

    monkeypatch.setattr(parity, "write_json", refuse)
    if status == "fail":
        row = FORMATS["onnx"].precisions["fp32"]
        impossible = replace(row, tolerance=Tolerance(999, 0, 1, 0, "impossible"))
        monkeypatch.setitem(FORMATS["onnx"].precisions, "fp32", impossible)
    (result,) = verify(tiny_artifact("onnx"), against="golden")
    assert result.status == status
    assert result.note.endswith("parity.json cannot be written: Read-only file system")


def rewrite_manifest(place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((place / MANIFEST).read_text())
    change(data)
    (place / MANIFEST).write_text(json.dumps(data))


def test_wrong_shape_and_missing_output_are_named(tiny_artifact: Callable[..., Path]) -> None:
    artifact = read_artifact(tiny_artifact("onnx"))
    pairs = [Pair("case", np.zeros((1, 3, 64, 64), np.float32), {"logits": np.zeros((1, 10), np.float32)})]

    def faults(outputs: dict[str, np.ndarray]) -> list[str]:
        return compare(artifact.manifest, lambda _: outputs, pairs)[0]

    assert faults({"logits": np.zeros((1, 9), np.float32)}) == ["case: logits has shape (1, 9), expected (1, 10)"]
    assert faults({"logits": np.zeros((1, 10), np.float16)}) == ["case: logits is float16, expected float32"]
    assert faults({"scores": np.zeros((1, 10))}) == ["case: no output 'logits', the file has scores"]
    assert faults({"logits": np.full((1, 10), np.inf, np.float32)}) == ["case: logits holds 0 NaN and 10 Inf"]


def test_runtime_that_fails_is_a_failed_check(tiny_artifact: Callable[..., Path]) -> None:
    artifact = read_artifact(tiny_artifact("onnx"))
    pairs = [Pair("case", np.zeros(1), {"logits": np.zeros((1, 10), np.float32)})]

    def run(_: np.ndarray) -> dict[str, np.ndarray]:
        raise RuntimeError("kernel missing\nmore")

    reasons, metrics = compare(artifact.manifest, run, pairs)
    assert reasons == ["case: the runtime failed: kernel missing"]
    assert metrics is None


@pytest.mark.slow
def test_golden_check_notices_a_wrong_vector(tiny_model: Any, tmp_path: Path) -> None:
    (result,) = export(tiny_model, to="onnx", out=tmp_path, verify=False)
    artifact = result.artifact
    assert verify(artifact.path, against="golden")[0].status == "pass"
    cases = load_golden(artifact)
    cases["gradient"]["logits"] = cases["gradient"]["logits"] + np.float32(1e-3)
    save_golden(artifact.path / GOLDEN, cases)
    digest = sha256_file(artifact.path / GOLDEN)

    def change(data: dict[str, Any]) -> None:
        for info in data["files"]:
            info["sha256"] = digest if info["path"] == GOLDEN else info["sha256"]

    rewrite_manifest(artifact.path, change)
    assert verify(artifact.path, against="golden")[0].status == "fail"
    assert verify(artifact.path)[0].status == "pass"


@pytest.mark.slow
def test_reference_is_rebuilt_and_must_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that gives other weights than it did at the export is an error, not a failed or passed check."""
    source = tmp_path / "net.py"
    text = "import torch\nfrom torch import nn\n"
    text += "def net():\n    torch.manual_seed({})\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))\n"
    source.write_text(text.format(1))
    model = load_model(model=f"{source}:net", input_shape=(1, 3, 2, 2))
    (result,) = export(model, to="onnx", out=tmp_path, verify=False)
    source.write_text(text.format(2))
    with pytest.raises(ModelError, match="that you have not exported, or that has changed since"):
        verify(result.artifact.path)
    monkeypatch.setenv(TRUST_ALL, "1")
    with pytest.raises(WeightsError, match="gives other weights than were exported"):
        verify(result.artifact.path)
    assert verify(result.artifact.path, against="golden")[0].status == "pass"


def test_questions_that_cannot_be_asked(tiny_artifact: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="expected one of pytorch, golden"):
        verify(tiny_artifact("onnx"), against="silver")
    with pytest.raises(UsageError, match="--weights has no use with --against golden"):
        verify(tiny_artifact("onnx"), against="golden", weights="x.pt")
    with pytest.raises(ArtifactError, match="does not exist"):
        verify("/nowhere")


def test_weak_reference_is_blamed(tiny_artifact: Callable[..., Path]) -> None:
    artifact = read_artifact(tiny_artifact("onnx"))
    pairs = [Pair("case", np.zeros(1), {"logits": np.full((1, 10), np.nan, np.float32)})]
    reasons, _ = compare(artifact.manifest, lambda _: {"logits": np.zeros((1, 10), np.float32)}, pairs)
    assert "the reference itself holds NaN or Inf" in reasons[0]


@pytest.mark.slow
def test_reference_that_ignores_its_input_proves_nothing(tmp_path: Path) -> None:
    """An untrained head of zeros makes every file look perfect."""
    source = tmp_path / "net.py"
    source.write_text(
        "from torch import nn\ndef net():\n    head = nn.Linear(12, 3)\n    nn.init.zeros_(head.weight)\n"
        "    return nn.Sequential(nn.Flatten(), head)\n"
    )
    (result,) = export(load_model(model=f"{source}:net", input_shape=(1, 3, 2, 2)), to="onnx", out=tmp_path)
    assert result.parity is not None
    assert result.parity.status == "not-run"
    assert result.parity.reason.startswith("the reference gives the same logits for all 9 inputs")


def test_reference_runs_without_gradients_and_in_eval_mode(tiny_model: Any) -> None:
    assert not tiny_model.module.training
    assert all(p.dtype == torch.float32 for p in tiny_model.module.parameters())
