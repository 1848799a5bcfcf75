"""Networks that one converter cannot write and others can."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Enlarge(nn.Module):
    """A convolution, enlarged by an interpolation; coremltools has none for "bicubic"."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.conv, self.mode = nn.Conv2d(3, 4, 3, stride=4, padding=1), mode

    def forward(self, x: Tensor) -> Tensor:
        return functional.interpolate(self.conv(x), size=(9, 11), mode=self.mode)


def bicubic() -> nn.Module:
    torch.manual_seed(0)
    return Enlarge("bicubic")
