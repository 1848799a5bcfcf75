"""BatchNorm folding: nothing changes beyond rounding, and what cannot be folded is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import randomize
from tiny import tiny
from torch import nn

from mvit_export.families.timm import import_timm
from mvit_export.models.fold import fold_batch_norms


def norms(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


@pytest.mark.slow
def test_every_norm_of_mobilevit_is_folded() -> None:
    model = tiny().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    folded = fold_batch_norms(model, image)
    assert (norms(model), norms(folded)) == (32, 0)
    with torch.no_grad():
        expected, found = model(image), folded(image)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # the original stays


def biased() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-2))


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8), nn.ReLU())


@pytest.mark.parametrize(("build", "channels"), [(biased, 3), (grouped, 4)])
def test_bias_eps_and_groups(build: Callable[[], nn.Module], channels: int) -> None:
    model = randomize(build())
    image = torch.randn(1, channels, 9, 9)
    folded = fold_batch_norms(model, image)
    assert norms(folded) == 0
    with torch.no_grad():
        torch.testing.assert_close(folded(image), model(image), rtol=1e-5, atol=1e-6)


class Shared(nn.Module):
    """Two norms read one convolution's output; one convolution serves two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.a, self.b, self.c, self.d = (nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.a(y) + self.b(y) + self.c(self.twice(x)) + self.d(self.twice(-x))


def test_shared_convolutions_are_left_alone() -> None:
    model = randomize(Shared())
    image = torch.randn(1, 3, 5, 5)
    folded = fold_batch_norms(model, image)
    assert norms(folded) == 4
    with torch.no_grad():
        assert torch.equal(folded(image), model(image))


def test_norm_that_includes_its_activation() -> None:
    """timm's BatchNormAct2d must keep the activation when its arithmetic has gone."""
    import_timm()
    from timm.layers import BatchNormAct2d

    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)))
    image = torch.randn(1, 3, 9, 9)
    folded = fold_batch_norms(model, image)
    assert torch.equal(folded[1].running_mean, torch.zeros(4))
    with torch.no_grad():
        torch.testing.assert_close(folded(image), model(image), rtol=1e-5, atol=1e-5)
