"""Ops without arithmetic: identity, classifier outputs, state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class State:
    """One named state of a program: a tensor that `write_state` replaces and that outlives a call."""

    value: Tensor


def identity(x: Tensor) -> Tensor:
    return x


def classify(probabilities: Tensor, classes: list[Any]) -> tuple[Any, dict[Any, float]]:
    """The likeliest class, and the probability of each."""
    flat = probabilities.reshape(-1)
    if flat.numel() != len(classes):
        raise ValueError(f"{flat.numel()} probabilities for {len(classes)} classes")
    return classes[int(flat.argmax())], dict(zip(classes, flat.tolist(), strict=True))


def read_state(input: State) -> Tensor:
    return input.value


def write_state(input: State, data: Tensor) -> tuple[()]:
    if data.shape != input.value.shape:
        raise ValueError(f"state of shape {tuple(input.value.shape)} cannot take {tuple(data.shape)}")
    input.value = data
    return ()


OPS: dict[str, Callable[..., Any]] = {
    "classify": classify,
    "identity": identity,
    "read_state": read_state,
    "write_state": write_state,
}
