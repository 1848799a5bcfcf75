"""Dense 3x3 convolutions cut where XNNPACK's kernels would waste lanes.

On AVX-512 its kernels make 32 output channels at a time, and 16 where no more are asked for: 48 channels cost as much
as 64, but 32 and 16 by themselves what they are. NEON's make 8, and nothing is lost there either way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvit_export.converters.forms.blocks import OpenBlock
from mvit_export.models.mobilevit import ConvNormAct

WIDE, NARROW = 32, 16  # output channels


def cut_lanes(block: OpenBlock) -> None:
    """y = (W_1 x, W_2 x) with W_1 the first output channels, a multiple of `WIDE`, and W_2 at most `NARROW` of them."""
    block.local, block.fuse = cut(block.local), cut(block.fuse)


def cut(layer: ConvNormAct) -> nn.Module:
    rest = layer.conv.out_channels % WIDE
    return CutConv(layer, layer.conv.out_channels - rest) if 0 < rest <= NARROW < layer.conv.out_channels else layer


class CutConv(nn.Module):
    """`ConvNormAct`, whose BatchNorm was folded, in two: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, layer: ConvNormAct, count: int) -> None:
        super().__init__()
        self.conv, self.act = nn.ModuleList((part(layer.conv, 0, count), part(layer.conv, count, None))), layer.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(torch.cat([conv(x) for conv in self.conv], dim=1))


def part(conv: nn.Conv2d, start: int, end: int | None) -> nn.Conv2d:
    """A convolution of some of the output channels."""
    weight = conv.weight.detach()[start:end]
    made = nn.Conv2d(conv.in_channels, len(weight), 3, padding=1, bias=conv.bias is not None)
    made.weight = nn.Parameter(weight)
    if conv.bias is not None:
        made.bias = nn.Parameter(conv.bias.detach()[start:end])
    return made
