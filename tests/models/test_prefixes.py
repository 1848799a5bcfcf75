"""Names in a checkpoint and in the network: wrappers before or between them, other tensors beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mvit_export.errors import WeightsError
from mvit_export.models.checkpoints import read_checkpoint
from mvit_export.models.fit import load_into
from mvit_export.models.prefixes import align

State = dict[str, torch.Tensor]


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "head": nn.Linear(4, 2)})


STATE: State = network(1).state_dict()


def under(prefix: str, state: State = STATE) -> State:
    return {prefix + key: value for key, value in state.items()}


def check(state: State, *, ema: bool | None = True, expected: State = STATE, into: Any = None) -> tuple[str, ...]:
    """Load into a network of other weights; what was said."""
    module = into or network()
    with torch.no_grad():
        found = align(state, module.state_dict(), ema)
    module.load_state_dict(found.tensors)
    for value, want in zip(module.state_dict().values(), expected.values(), strict=True):
        assert torch.equal(value, want)
    return found.notes


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "net.", "model._orig_mod.", "a.b.c."],
)
def test_prefix_is_taken_off_and_said(prefix: str, tmp_path: Path) -> None:
    assert check(under(prefix)) == (f"the prefix {prefix} was taken off the checkpoint's names",)
    torch.save({"epoch": 1, "state_dict": under(prefix)}, tmp_path / "w.pt")
    loaded = load_into(network(), read_checkpoint(tmp_path / "w.pt"), tmp_path / "w.pt")
    assert loaded.notes == (f"the prefix {prefix} was taken off the checkpoint's names",)


# torch's own warning, as it imports its compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda module: nn.DataParallel(torch.compile(module))]
)
def test_wrappers_of_torch(wrap: Any) -> None:
    assert "was taken off" in check(wrap(network(1)).state_dict())[0]


def test_averaged_model_counts_beside_it() -> None:
    state = AveragedModel(network(1)).state_dict()
    assert "n_averaged" in state
    assert check(state) == ("the prefix module. was taken off the checkpoint's names",)


def test_names_that_fit_stay() -> None:
    for name in ("model", "module", "net"):
        wrapper = nn.ModuleDict({name: network()})
        assert check(under(f"{name}."), into=wrapper) == ()
        again = check(under(f"module.{name}."), into=nn.ModuleDict({name: network()}))
        assert again == ("the prefix module. was taken off the checkpoint's names",)
    assert check(STATE) == ()
    assert align({"x": torch.ones(1)}, STATE).tensors.keys() == {"x"}, "other networks are told as such by their names"


def test_only_a_part_was_wrapped() -> None:
    """As torch.compile and DataParallel do it with a backbone; and the network may be wrapped where the file is not."""
    for wrapper in ("module", "_orig_mod"):
        state = {key.replace("body.", f"body.{wrapper}."): value for key, value in STATE.items()}
        (note,) = check(state)
        assert note.endswith(f"body.{wrapper}.0.weight is read as body.0.weight")
    assert "0.weight is read as module." in check(STATE, into=nn.DataParallel(network()))[0]


@pytest.mark.parametrize("prefix", ["module.", "net.", "model._orig_mod."])
def test_missing_key_is_one_that_is_missing_under_the_prefix(prefix: str, tmp_path: Path) -> None:
    state = under(prefix)
    del state[f"{prefix}head.bias"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt: head\.bias is missing"):
        load_into(network(), read_checkpoint(tmp_path / "w.pt"), tmp_path / "w.pt")


def test_tensors_beside_the_network_are_named() -> None:
    state = under("model.") | {"criterion.weight": torch.ones(2)}
    assert check(state) == ("the prefix model. was taken off the checkpoint's names; left out: criterion.weight",)


def test_tensors_that_the_network_lacks_are_an_error(tmp_path: Path) -> None:
    torch.save(under("model.") | {"model.body.2.weight": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(
        WeightsError, match=r"model\.body\.2\.weight \(2,\) is in the checkpoint, but the network has no"
    ):
        load_into(network(), read_checkpoint(tmp_path / "w.pt"), tmp_path / "w.pt")


def test_averaged_network_beside_the_trained_one() -> None:
    other: State = network(2).state_dict()
    for trained, average in (("model.", "ema_model."), ("model.", "model_ema.module."), ("", "ema.")):
        state = under(trained) | under(average, other)
        said = check(state, expected=other)
        assert said[0].startswith("the weights are those of ") and "averaged during training" in said[0]
        assert "as trained, not averaged" in check(state, ema=False)[0]
        assert align(state, STATE, None).ema is False
    assert align(under("ema."), STATE).ema is True


def test_several_networks_are_named() -> None:
    with pytest.raises(WeightsError, match=r"several networks are in it \(student, teacher\), expected one"):
        align(under("student.") | under("teacher."), STATE)


@pytest.mark.parametrize("name", ["lora_A.weight", "lora_B.default.weight", "lora_up.weight", "lora_down.weight"])
def test_lora_is_named(name: str) -> None:
    for state in ({f"base_model.model.head.{name}": torch.ones(1)}, STATE | {f"head.{name}": torch.ones(1)}):
        with pytest.raises(
            WeightsError, match=r"belongs to a LoRA, a change to a network's weights, .*; merge it into"
        ):
            align(state, STATE)
    own = [*STATE, f"head.{name}"]
    assert align(STATE | {f"head.{name}": torch.ones(1)}, own).tensors.keys() == set(own), "a network may have them"
