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


class Extremes(nn.Module):
    """A maximum over windows of unequal size, for which neither ONNX nor TFLite has an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.AdaptiveMaxPool2d((5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x))  # a line of this file


class Switch(nn.Module):
    """Bright pictures go another way than dark ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y * 2 if x.mean() > 0.5 else y - 1  # the fork


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.detach().numpy().mean())  # leaves PyTorch


class Leaving(nn.Module):
    """Computes with numpy in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.blocks = nn.Conv2d(3, 4, 3, stride=4), nn.Sequential(nn.ReLU(), Inner())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.conv(x))
        return y


def extremes() -> nn.Module:
    return Extremes()


def switch() -> nn.Module:
    return Switch()


def leaving() -> nn.Module:
    return Leaving()
