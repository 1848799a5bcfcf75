"""A model is rebuilt from what its manifest names: the same source, at the same commit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Finished
from helpers import randomize

from mvit_export.artifact import Manifest, WeightsInfo
from mvit_export.converters.manifest import draft_manifest
from mvit_export.families.load import load_model, rebuild_model
from mvit_export.families.mobilevit.network import create_mobilevit
from mvit_export.formats.targets import plan_targets
from mvit_export.models.loaded import LoadedModel
from mvit_export.system import trust

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def manifest_of(model: LoadedModel) -> Manifest:
    (target,) = plan_targets("onnx")
    return draft_manifest(model, target, {})


@pytest.mark.parametrize("source", ["hf:owner/net", "hf:owner/net@v1", f"hf:owner/net@{COMMIT}", "timm:net@main"])
def test_hub_weights_are_rebuilt_at_their_commit(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever revision was asked for: one `@`, and the name that the user is told is one that he can pass."""
    asked: list[str] = []

    def locate(name: str) -> tuple[Path, str, str]:
        asked.append(name)
        return tmp_path / "w.pt", name, COMMIT

    torch.save(randomize(create_mobilevit("xxs", num_classes=3)).state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr("mvit_export.models.stored.locate", locate)
    manifest = manifest_of(load_model(weights=source, image_size=32))
    rebuild_model(manifest)
    assert asked == [source, f"{source.partition('@')[0]}@{COMMIT}"]
    assert trust.is_trusted(f"weights:{asked[1]}", "")
    assert manifest.weights == WeightsInfo(
        source, "mvit-export", manifest.weights.sha256, manifest.weights.state_sha256, True, None, COMMIT
    )


@pytest.fixture
def two_sets(tmp_path: Path) -> Path:
    """A training script's file of the tiny network: as trained, and averaged."""
    states = [randomize(create_mobilevit("xxs", num_classes=3), seed).state_dict() for seed in (1, 2)]
    averaged = {f"module.{key}": value for key, value in states[1].items()}
    torch.save({"state_dict": states[0], "state_dict_ema": averaged, "epoch": 3}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


@pytest.mark.slow
def test_the_set_that_was_read_is_read_again(two_sets: Path) -> None:
    averaged, trained = (load_model(weights=two_sets, image_size=32, ema=ema) for ema in (True, False))
    assert averaged.weights.state_sha256 != trained.weights.state_sha256
    assert (averaged.weights.ema, trained.weights.ema) == (True, False)
    assert averaged.notes == (
        "the weights are those of state_dict_ema, averaged during training; state_dict was left out (--no-ema)",
        "the prefix module. was taken off the checkpoint's names",
    )
    for model in (averaged, trained):
        manifest = Manifest.from_json(manifest_of(model).to_json())
        assert manifest.weights == model.weights
        assert rebuild_model(manifest).weights == model.weights


def test_a_manifest_of_0_1_0_has_the_set_that_was_read_then(two_sets: Path) -> None:
    """It took the weights as trained, and did not say which."""
    written = manifest_of(load_model(weights=two_sets, image_size=32, ema=False)).to_json()
    assert written["weights"].pop("ema") is False
    manifest = Manifest.from_json(written)
    assert rebuild_model(manifest).weights.state_sha256 == manifest.weights.state_sha256


def test_without_a_choice_the_manifest_is_as_it_was() -> None:
    assert "ema" not in manifest_of(load_model("xxs", image_size=32)).to_json()["weights"]


@pytest.mark.slow
def test_no_ema_of_the_command(cli: Callable[..., Finished], two_sets: Path, tmp_path: Path) -> None:
    options = ("--to", "onnx", "--weights", two_sets, "--image-size", "32", "--no-verify")
    done = cli(*options, "--no-ema", "--out", tmp_path, "--json")
    said = "the weights are those of state_dict as trained, not averaged; state_dict_ema was left out"
    assert done.json["notes"] == [said]
    assert f"note    {said}" in done.err
    place = tmp_path / "mobilevit_xxs/onnx-fp32"
    assert json.loads((place / "manifest.json").read_text())["weights"]["ema"] is False
    refused = cli("--to", "onnx", "--like", place, "--no-ema", "--out", tmp_path / "again")
    assert (refused.code, "leave out --no-ema" in refused.err) == (2, True)
