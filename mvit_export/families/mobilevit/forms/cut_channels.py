"""Layers cut where XNNPACK's kernels waste lanes: y = (W_1 x, W_2 x), W_1 the first output channels, W_2 the rest.

On AVX-512 its kernels compute 32 output channels at a time. A convolution of 48 channels costs as much as one of 64,
but parts of 32 and 16 cost only their share. A linear layer whose outputs are not a multiple of 32 gets a kernel that
computes 16 at a time. With it all outputs, not only the rest, take longer, by half on a 2.8 GHz Xeon (layers timed
alone in LiteRT 2.3): 80 outputs take longer than 96, and two layers of 64 and 16 take the least time.
NEON's kernels compute 8, and nothing is lost there either way except the copy that joins the parts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.families.mobilevit.forms.blocks import OpenBlock
from mvit_export.families.mobilevit.network import ConvNormAct

WIDE, NARROW = 32, 16  # output channels


def cut_convs(block: OpenBlock) -> None:
    """Cut the dense convolutions whose rest over a multiple of `WIDE` is at most `NARROW`."""
    block.local, block.fuse = cut_conv(block.local), cut_conv(block.fuse)


def cut_linears(block: OpenBlock) -> None:
    """Cut the two layers of an encoder that write the stream. q, k and v gain nothing: their parts are copied twice."""
    for encoder in block.encoders:
        encoder.attention.proj, encoder.mlp.reduce = map(cut_linear, (encoder.attention.proj, encoder.mlp.reduce))


def cut_conv(layer: ConvNormAct) -> nn.Module:
    rest = layer.conv.out_channels % WIDE
    return CutConv(layer, layer.conv.out_channels - rest) if 0 < rest <= NARROW < layer.conv.out_channels else layer


def cut_linear(layer: Any) -> nn.Module:
    return CutLinear(layer) if len(cut_width(layer.out_features)) > 1 else layer


def cut_width(width: int) -> list[int]:
    """The widths of the parts of a linear layer with this many outputs: 80 -> 64, 16; 64 and 24 as they are."""
    rest = width % WIDE
    return [width - rest, rest] if 0 < rest < width else [width]


class CutConv(nn.Module):
    """`ConvNormAct`, whose BatchNorm was folded, in two: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, layer: ConvNormAct, count: int) -> None:
        super().__init__()
        self.conv, self.act = nn.ModuleList((part(layer.conv, 0, count), part(layer.conv, count, None))), layer.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(torch.cat([conv(x) for conv in self.conv], dim=1))


class CutLinear(nn.Module):
    """A linear layer with a bias in two: (..., d_in) -> (..., d_out)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        widths = cut_width(layer.out_features)
        self.weights = nn.ParameterList(part.clone() for part in layer.weight.detach().split(widths))
        self.biases = nn.ParameterList(part.clone() for part in layer.bias.detach().split(widths))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, w, b) for w, b in zip(self.weights, self.biases, strict=True)], dim=-1)


def part(conv: nn.Conv2d, start: int, end: int | None) -> nn.Conv2d:
    """A convolution of some of the output channels."""
    weight = conv.weight.detach()[start:end]
    made = nn.Conv2d(conv.in_channels, len(weight), 3, padding=1, bias=conv.bias is not None)
    made.weight = nn.Parameter(weight)
    if conv.bias is not None:
        made.bias = nn.Parameter(conv.bias.detach()[start:end])
    return made
