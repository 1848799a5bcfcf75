"""timm's networks with somebody's head: the checkpoint says how many classes there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mvit_export.converters.manifest import draft_manifest
from mvit_export.errors import UsageError, WeightsError
from mvit_export.families.load import load_model, rebuild_model
from mvit_export.families.timm import import_timm
from mvit_export.formats.targets import plan_targets
from mvit_export.models.loaded import LoadedModel

timm = import_timm()
NAMES = ("mobilenetv3_small_050", "test_vit", "test_byobnet")  # classifier, head, head.fc


def fine_tuned(name: str, classes: int, file: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    state = timm.create_model(name, num_classes=classes).state_dict()
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}}, file)
    return state


def rebuilt(model: LoadedModel) -> LoadedModel:
    (target,) = plan_targets("onnx")
    return rebuild_model(draft_manifest(model, target, {}))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_classes_are_those_of_the_checkpoint(name: str, prefix: str, tmp_path: Path) -> None:
    state = fine_tuned(name, 7, tmp_path / "w.pt", prefix)
    model = load_model(model=f"timm:{name}", weights=tmp_path / "w.pt", image_size=64 if name != "test_vit" else None)
    assert model.info.num_classes == 7
    for key, value in model.module.state_dict().items():
        assert torch.equal(value, state[key])
    assert model.notes == ((f"the prefix {prefix} was taken off the checkpoint's names",) if prefix else ())
    assert rebuilt(model).weights == model.weights


def test_classes_that_are_asked_for() -> None:
    model = load_model(model=f"timm:{NAMES[0]}", num_classes=7, image_size=64)
    assert model.info.num_classes == 7
    assert rebuilt(model).weights.state_sha256 == model.weights.state_sha256
    default = load_model(model=f"timm:{NAMES[0]}", image_size=64)
    assert default.info.num_classes == 1000
    assert rebuilt(default).weights.state_sha256 == default.weights.state_sha256


def test_network_without_a_head_is_rebuilt_without_one() -> None:
    model = load_model(model="timm:eva02_tiny_patch14_224", image_size=224)
    assert model.info.num_classes == 192  # its features
    assert rebuilt(model).weights.state_sha256 == model.weights.state_sha256


def test_classes_that_disagree(tmp_path: Path) -> None:
    fine_tuned(NAMES[0], 7, tmp_path / "w.pt")
    asked = {"model": f"timm:{NAMES[0]}", "weights": tmp_path / "w.pt", "image_size": 64}
    assert load_model(**asked, num_classes=7).info.num_classes == 7
    message = r"w\.pt: the checkpoint has 7 classes, asked for 9: leave --num-classes out or use --num-classes 7$"
    with pytest.raises(WeightsError, match=message):
        load_model(**asked, num_classes=9)


def test_another_network_is_still_an_error(tmp_path: Path) -> None:
    fine_tuned("test_byobnet", 7, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt: conv_stem\.weight is missing"):
        load_model(model=f"timm:{NAMES[0]}", weights=tmp_path / "w.pt", image_size=64)


def test_a_factory_sets_its_own_classes() -> None:
    with pytest.raises(
        UsageError, match="--num-classes belongs to MobileViT or timm; with --model, set it in the model's"
    ):
        load_model(model="net.py:net", num_classes=3)
