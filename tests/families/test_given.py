"""A network that a Python program has in its hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvit_export import export, load_model, verify
from mvit_export.errors import UsageError

pytestmark = pytest.mark.slow


class Tint(nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.gain = nn.Conv2d(3, 4, 3, stride=8), gain

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).mean((2, 3)) * self.gain
        return y


def test_it_is_checked_against_that_very_module(tmp_path: Path) -> None:
    """Two modules with the same class and the same weights are not taken for each other."""
    models = [load_model(model=Tint(gain), image_size=32) for gain in (1.0, 3.0)]
    for place, model in enumerate(models):
        (result,) = export(model, to="onnx", out=tmp_path / str(place))
        assert result.parity is not None
        assert (result.parity.status, result.parity.against) == ("pass", "pytorch")
        (verdict,) = verify(result.artifact.path)
        assert verdict.status == "pass"


def test_the_program_s_own_module_stays_as_it_is(tmp_path: Path) -> None:
    module = Tint().double().train()
    model = load_model(model=module, image_size=32)
    assert module.training
    assert module.conv.weight.dtype == torch.float64
    assert not model.module.training
    with torch.no_grad():
        module.conv.weight.zero_()  # it is trained on
    (result,) = export(model, to="onnx", out=tmp_path)
    assert result.parity is not None
    assert result.parity.status == "pass"


def test_another_process_says_what_it_can_do(cli: Callable[..., Any], tmp_path: Path) -> None:
    (result,) = export(load_model(model=Tint(), image_size=32), to="onnx", out=tmp_path)
    source = result.artifact.manifest.model.source
    assert source.startswith("module:Tint:")
    done = cli("verify", result.artifact.path)
    assert done.code == 2
    assert done.err == (
        f"mvit-export: error: the network {source} was given to load_model by a Python program, which alone has it; "
        "check with --against golden\n"
    )
    assert cli("verify", result.artifact.path, "--against", "golden").code == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: export(Tint()), r"^export\(\) was given a Tint, expected what load_model\(\) returns; "),
        (lambda: load_model(Tint()), r"^variant is a Tint, expected a name; pass a module as model=$"),  # type: ignore[arg-type]
        (lambda: load_model(model=Tint), r"^model is a type, expected a torch\.nn\.Module, FILE"),  # type: ignore[arg-type]
        (lambda: load_model(model=torch.jit.trace(Tint(), torch.rand(1, 3, 32, 32))), "^a scripted or traced module"),
        (lambda: load_model(model=Tint(), num_classes=3), "^--num-classes belongs to MobileViT"),
    ],
)  # fmt: skip
def test_what_it_does_not_take(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_it_takes_a_checkpoint_with_a_wrapper_s_names(tmp_path: Path) -> None:
    trained = Tint()
    nn.init.ones_(trained.conv.weight)
    torch.save({"net": nn.DataParallel(trained).state_dict()}, tmp_path / "w.pt")
    model = load_model(model=Tint(), weights=tmp_path / "w.pt", image_size=32)
    assert torch.equal(model.module.conv.weight, trained.conv.weight)
    assert model.notes == (
        "the weights are those of net in the checkpoint",
        "the prefix module. was taken off the checkpoint's names",
    )
