"""The flat picture on which a network's norms see the least."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mvit_export.checks.flat import COLOURS, name_of, picture_of, weakest_colour
from mvit_export.data.preprocessing import Preprocessing

SIZE = Preprocessing("RGB", crop=(128, 96))


class Green(nn.Module):
    """Its norm sees r - g / 2 and g / 2 - r, which are least where neither or both cancel."""

    def __init__(self, *, named: bool = False, sides: tuple[int, int] | None = None, batch: int | None = None) -> None:
        super().__init__()
        self.named, self.sides, self.batch = named, sides, batch
        self.mix, self.norm = nn.Conv2d(3, 2, 1, bias=False), nn.LayerNorm(2)
        self.mix.weight.data = torch.tensor([[1.0, -0.5, 0.3], [-1.0, 0.5, 0.3]]).reshape(2, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sides:
            assert x.shape[2:] == self.sides
        if self.batch:
            assert len(x) == self.batch
        tokens = self.mix(x + 0.01).flatten(2).transpose(1, 2)  # (B, HW, 2)
        return (self.norm(input=tokens) if self.named else self.norm(tokens)).mean(1)


@pytest.mark.parametrize(
    ("network", "batch"), [(Green(), 1), (Green(named=True), 1), (Green(sides=(128, 96)), 1), (Green(batch=2), 2)]
)
def test_colour_is_where_the_variance_is_least(network: Green, batch: int) -> None:
    def difference(colour: tuple[int, int, int]) -> float:
        red, green, _ = (value / 255 + 0.01 for value in colour)
        return abs(2 * (red - green / 2))

    found = weakest_colour(network, SIZE, batch)
    assert found is not None
    assert difference(found) == pytest.approx(min(map(difference, COLOURS)))


def test_network_without_norms_has_none() -> None:
    assert weakest_colour(nn.Conv2d(3, 2, 1), SIZE, 1) is None


def test_name_gives_the_picture_back() -> None:
    picture = picture_of(name_of((0, 128, 255)), (3, 2))
    assert picture.shape == (3, 2, 3)
    np.testing.assert_array_equal(picture, np.full((3, 2, 3), (0, 128, 255)))
