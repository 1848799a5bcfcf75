"""Which of a file's entries is read: the averaged weights as in timm, else the usual one, or the only one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mvit_export.errors import WeightsError
from mvit_export.models.entries import find_entry


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 2), value), "a.bias": torch.full((2,), value)}


RAW, EMA = weights(0.0), weights(1.0)
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2, 2)}}, "param_groups": [{"lr": 0.1}]}
BESIDE = {
    "epoch": 3, "optimizer": OPTIMIZER, "scaler": {"scale": 1.0}, "rng": torch.zeros(8, dtype=torch.uint8),
    "callbacks": {"checkpoint": {"best_model_score": torch.tensor(0.5)}}, "gan_optimizers": {"g": OPTIMIZER},
}  # fmt: skip


@pytest.mark.parametrize(
    ("trained", "average"),
    [
        ("state_dict", "state_dict_ema"),  # timm
        ("model", "model_ema"),
        ("model_state_dict", "ema_model_state_dict"),
        ("model", "ema"),
        ("net", "net_ema"),
        ("params", "params_ema"),  # BasicSR
        ("state_dict", "swa_state_dict"),
        ("generator", "generatorEMA"),
    ],
)
def test_average_is_read_unless_declined(trained: str, average: str) -> None:
    for content in ({trained: RAW, average: EMA} | BESIDE, {**BESIDE, average: EMA, trained: RAW}):
        found = find_entry(content)
        assert (found.tensors, found.ema) == (EMA, True)
        assert found.notes == (
            f"the weights are those of {average}, averaged during training; {trained} was left out (--no-ema)",
        )
        declined = find_entry(content, ema=False)
        assert (declined.tensors, declined.ema) == (RAW, False)
        assert declined.notes == (
            f"the weights are those of {trained} as trained, not averaged; {average} was left out",
        )
        assert find_entry(content, ema=None).tensors == RAW, "as 0.1.0 did"


def test_only_averaged_weights() -> None:
    content = {"state_dict": None, "model_ema": {"decay": 0.999, "module": EMA}}
    for ema in (True, None):
        found = find_entry(content, ema)
        assert (found.tensors, found.ema) == (EMA, True)
        assert found.notes[0] == "the weights are those of model_ema, averaged during training"
    with pytest.raises(
        WeightsError, match=r"only averaged weights are in it \(model_ema\), --no-ema asks for the others"
    ):
        find_entry(content, ema=False)


def test_averages_of_several_rates_are_named() -> None:
    content = {"model": RAW, "ema_0.99": EMA, "ema_0.999": EMA}
    with pytest.raises(WeightsError, match=r"several networks are in it \(ema_0\.99, ema_0\.999\), expected one"):
        find_entry(content)
    assert find_entry(content, ema=False).tensors == RAW


def test_average_without_names_is_said() -> None:
    for average in ([torch.ones(2)], {"decay": 0.9, "shadow_params": [torch.ones(2)]}):
        found = find_entry({"model": RAW, "ema": average})
        assert (found.tensors, found.ema) == (RAW, None)
        assert found.notes == ("ema holds averaged weights without their names, which cannot be read",)


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model"])
def test_usual_entry_needs_no_word(name: str) -> None:
    found = find_entry({name: RAW, "args": object()} | BESIDE)
    assert (found.tensors, found.ema, found.notes) == (RAW, None, ())


@pytest.mark.parametrize("name", ["net", "params", "generator", "network", "weights", "student"])
def test_only_entry_with_tensors_is_taken_and_said(name: str) -> None:
    found = find_entry({name: RAW} | BESIDE)
    assert (found.tensors, found.notes) == (RAW, (f"the weights are those of {name} in the checkpoint",))
    nested = find_entry({"states": {name: {"state_dict": RAW}}})
    assert nested.tensors == RAW


def test_several_entries_are_named() -> None:
    with pytest.raises(
        WeightsError, match=r"several networks are in it \(generator, discriminator\), expected one; save"
    ):
        find_entry({"generator": RAW, "discriminator": EMA} | BESIDE)
    found = find_entry({"discriminator": EMA, "model": RAW})
    assert (found.tensors, found.notes) == (
        RAW,
        ("the weights are those of model in the checkpoint; discriminator was left out",),
    )


def test_state_dict_itself_may_hold_more_than_tensors() -> None:
    extra: dict[str, Any] = {"a._extra_state": {"scale": torch.ones(2)}, "a.version": 3}
    assert find_entry(RAW | extra).tensors == RAW


def holding_itself(**others: torch.Tensor) -> dict[str, Any]:
    content: dict[str, Any] = {**others}
    content["state_dict"] = {"model": content}
    return content


def test_a_dictionary_that_holds_itself_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"a dict with state_dict \(dict\), expected tensors"):
        find_entry(holding_itself())
    with pytest.raises(WeightsError, match="weights inside more than 16 dictionaries"):
        find_entry(holding_itself(a=torch.zeros(2)))


def test_dictionaries_that_hold_one_another_many_times_take_no_time() -> None:
    content: dict[str, Any] = {}
    for _ in range(60):  # 2 ** 60 ways down
        content = {"a": content, "b": content}
    with pytest.raises(WeightsError, match="expected tensors"):
        find_entry(content)
