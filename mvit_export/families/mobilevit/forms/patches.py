"""Tokens as a stack of patches, channels last, for XNNPACK, LiteRT's CPU kernels: (P * B, N, d), P outermost.

Everything between the two dense convolutions of a block has channels last, like all of LiteRT: 1x1 convolutions are
linear layers on the innermost axis, and unfold and fold are one transpose each that moves whole rows of d numbers.
Letters as in network.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.families.mobilevit.forms.blocks import (
    OpenAttention,
    OpenBlock,
    OpenEncoder,
    channels_first,
    channels_last,
)
from mvit_export.families.mobilevit.network import HEADS, ConvNormAct, resize

AT_ONCE = 2**18  # attention weights: 1 MiB in fp32
PARTS = 4  # the places in a patch of 2x2


class PatchesBlock(nn.Module):
    def __init__(self, block: OpenBlock) -> None:
        super().__init__()
        self.patch = block.patch
        self.local, self.fuse, self.norm = block.local, block.fuse, block.norm
        self.to_tokens, self.from_tokens = Pointwise(block.to_tokens), PointwiseNormAct(block.from_tokens)
        self.encoders = nn.ModuleList(PatchesEncoder(encoder) for encoder in block.encoders)

    def forward(self, x: Tensor) -> Tensor:
        y = self.to_tokens(channels_last(self.local(x)))  # (B, H, W, d)
        (h, w), p = y.shape[1:3], self.patch
        nh, nw = math.ceil(h / p), math.ceil(w / p)
        tokens = self.unfold(resize_last(y, (nh * p, nw * p)), nh, nw)  # (P*B, N, d)
        for encoder in self.encoders:
            tokens = encoder(tokens)
        y = self.fold(self.norm(tokens), nh, nw)  # (B, H', W', d)
        y = channels_first(self.from_tokens(resize_last(y, (h, w))))  # (B, C, H, W)
        return self.fuse(torch.cat((x, y), dim=1))

    def unfold(self, y: Tensor, nh: int, nw: int) -> Tensor:
        p, d = self.patch, y.shape[-1]
        y = y.reshape(-1, p, nw, p, d).permute(1, 3, 0, 2, 4)  # (ph, pw, B*nh, nw, d)
        return y.reshape(-1, nh * nw, d)  # (P*B, N, d)

    def fold(self, tokens: Tensor, nh: int, nw: int) -> Tensor:
        p, d = self.patch, tokens.shape[-1]
        rows = tokens.reshape(p, p, -1, nw, d).permute(2, 0, 3, 1, 4)  # (B*nh, ph, nw, pw, d)
        return rows.reshape(-1, nh * p, nw * p, d)


def resize_last(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`resize` of (B, H, W, C)."""
    if tuple(x.shape[1:3]) == size:
        return x
    return channels_last(resize(channels_first(x), size))


class Pointwise(nn.Module):
    """A 1x1 convolution as a linear layer on the last axis: (..., C_in) -> (..., C_out)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().flatten(1))  # (C_out, C_in)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PointwiseNormAct(nn.Module):
    """`ConvNormAct` of a 1x1 convolution, whose BatchNorm was folded, on the last axis."""

    def __init__(self, layer: ConvNormAct) -> None:
        super().__init__()
        self.conv, self.act = Pointwise(layer.conv), layer.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class PatchesEncoder(nn.Module):
    def __init__(self, encoder: OpenEncoder) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = encoder.norm1, encoder.norm2, encoder.mlp
        self.attention = PatchesAttention(encoder.attention)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchesAttention(nn.Module):
    """Between the N tokens of each place in a patch: (P*B, N, d) -> (P*B, N, d).

    Computed in parts if at most `PARTS` are needed, so that a part's attention weights stay in a processor's L2 cache
    between the op that writes them and the next. At 256x256 the first block has 1 MiB for each place in a patch.
    """

    def __init__(self, attention: OpenAttention) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, x: Tensor) -> Tensor:
        count, d = x.shape[1:]
        q, k, v = (part.reshape(-1, count, HEADS, self.head_dim) for part in self.qkv(x))  # (P*B, N, heads, D)
        q, k, v = q.transpose(1, 2), k.permute(0, 2, 3, 1), v.transpose(1, 2)  # (P*B, heads, N, D), k's (.., D, N)
        part = part_of(len(q), HEADS * count**2)
        if part < len(q):
            y = torch.cat([attend(*some) for some in zip(*(x.split(part) for x in (q, k, v)), strict=True)])
        else:
            y = attend(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(-1, count, d))


def part_of(batch: int, each: int) -> int:
    """How much of a batch is computed at once, in even parts; `each` is the number of attention weights per item."""
    fitting = AT_ONCE // each
    parts = math.ceil(batch / fitting) if fitting else PARTS + 1
    return math.ceil(batch / parts) if parts <= PARTS else batch


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k) v, over the last two axes: (.., N, D), (.., D, N), (.., N, D) -> (.., N, D)."""
    return (q @ k).softmax(dim=-1) @ v
