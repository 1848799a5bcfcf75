"""A MobileViT small enough for many quick tests, as a user's own model file (`--model tests/tiny.py:tiny`)."""

import torch

from mvit_export.models.mobilevit import MobileViT, MobileViTConfig
from mvit_export.preprocessing import Preprocessing

CONFIG = MobileViTConfig(
    stem=8, stages=(8, 8, 16, 16, 16), widths=(16, 16, 16), head=32, expansion=2, dropout=0.0, num_classes=10
)


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Make every parameter and statistic matter: a default initialisation hides a dropped bias or a swapped norm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, mean: float, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (torch.nn.BatchNorm2d, torch.nn.LayerNorm)):
                normal(layer.weight, 1.0, 0.2)
                normal(layer.bias, 0.0, 0.2)
            if isinstance(layer, torch.nn.BatchNorm2d):
                normal(layer.running_mean, 0.0, 0.2)
                layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=generator) + 0.5)
            if isinstance(layer, torch.nn.Linear):
                normal(layer.weight, 0.0, layer.in_features**-0.5)
                if layer.bias is not None:
                    normal(layer.bias, 0.0, 0.2)
    return module


def tiny() -> MobileViT:
    """10 classes; a BGR checkpoint with mean and std, at 64x64."""
    model = randomize(MobileViT(CONFIG))
    model.preprocessing = Preprocessing(
        "BGR", crop=(64, 64), mean=(0.4, 0.45, 0.5), std=(0.2, 0.25, 0.3), source="tests"
    )
    return model


def returns_nothing() -> None:
    """A factory with a mistake."""


def raises() -> MobileViT:
    raise RuntimeError("no such backbone\nsecond line")
