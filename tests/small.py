"""One stage of the tiny network, which converts in a fraction of its time; a user's own model file, as tiny.py is."""

import torch
from helpers import randomize
from torch import nn

from mvit_export.families.mobilevit.network import ConvNormAct, InvertedResidual, MobileViTBlock


class Small(nn.Module):
    """Scores of 10 classes, of pictures from 16x16 on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, 8, 3, stride=2)
        block = MobileViTBlock(16, 16, depth=1, patch=2, dropout=0.0)
        self.stages = nn.ModuleList([nn.Sequential(InvertedResidual(8, 16, expansion=2), block)])
        self.classifier = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.stages[0](self.stem(x)).mean(dim=(2, 3)))


def small() -> Small:
    return randomize(Small())


def loud() -> Small:
    """One layer leaves the range of fp16, the next one comes back. The weights do not, or they would be fp32."""
    model = small()
    block = model.stages[0][0]
    for norm, factor in ((block.expand.norm, 1e2), (block.depthwise.norm, 1e4)):
        norm.weight.data *= factor
        norm.bias.data *= factor
    block.reduce.conv.weight.data *= 1e-6
    return model
