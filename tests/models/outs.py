"""Networks whose outputs have names, types and shapes that files do not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Answer:
    scores: Tensor
    extra: Tensor | None = None


class Returning(nn.Module):
    """Four class scores, returned as `wrap` has it."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.wrap = nn.Conv2d(3, 4, 3, stride=8), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.conv(x).mean((2, 3)))


def named() -> nn.Module:
    return Returning(lambda y: {"cls-logits": y, "0": y + 1, "state": y * 2, "left out": None})


def precise() -> nn.Module:
    return Returning(lambda y: (y.double(), y.half()))


def record() -> nn.Module:
    return Returning(lambda y: Answer(scores=y))


def probable() -> nn.Module:
    return Returning(lambda y: {"probabilities": y})
