"""A model is rebuilt from what its manifest names: the same source, at the same commit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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
    monkeypatch.setattr("mvit_export.families.mobilevit.weights.locate", locate)
    manifest = manifest_of(load_model(weights=source, image_size=32))
    rebuild_model(manifest)
    assert asked == [source, f"{source.partition('@')[0]}@{COMMIT}"]
    assert trust.is_trusted(f"weights:{asked[1]}", "")
    assert manifest.weights == WeightsInfo(
        source, "mvit-export", manifest.weights.sha256, manifest.weights.state_sha256, True, None, COMMIT
    )
