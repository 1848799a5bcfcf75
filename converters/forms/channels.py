"""Tokens as a map, for Apple's Neural Engine and for the GPU delegates of LiteRT: (B, d, P, N).

The batch stays the outermost axis, which GPU delegates ask for, no tensor has more than four axes, and linear layers are
1x1 convolutions, layer norms run over channels. Letters as in models/mobilevit.py, h heads.

Heads join the pixels of a patch on axis 2 as (P, h), h innermost, since attention treats both as a batch and MIL's
einsum takes its batch from axis 2. No reshape is needed for that: rows of weights may be written in any order, so a
transposed convolution with kernel and stride (h, 1) writes a token's heads below each other, and a convolution with
kernel and stride (h, 1) reads them; both have the weights and the products of the linear layer and share none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.converters.forms.blocks import OpenAttention, OpenBlock, OpenEncoder, SplitLinear
from mvit_export.models.mobilevit import HEADS, FeedForward, resize


class ChannelsBlock(nn.Module):
    def __init__(self, block: OpenBlock) -> None:
        super().__init__()
        self.patch = block.patch
        self.local, self.to_tokens, self.norm = block.local, block.to_tokens, ChannelNorm(block.norm)
        self.from_tokens, self.fuse = block.from_tokens, block.fuse
        self.encoders = nn.ModuleList(ChannelsEncoder(encoder) for encoder in block.encoders)

    def forward(self, x: Tensor) -> Tensor:
        y = self.to_tokens(self.local(x))  # (B, d, H, W)
        (b, d, h, w), p = y.shape, self.patch
        nh, nw = math.ceil(h / p), math.ceil(w / p)
        y = F.pixel_unshuffle(resize(y, (nh * p, nw * p)), p)  # (B, d*P, nh, nw)
        tokens = y.reshape(b, d, p * p, nh * nw)  # (B, d, P, N)
        for encoder in self.encoders:
            tokens = encoder(tokens)
        y = self.norm(tokens).reshape(b, d * p * p, nh, nw)
        y = self.from_tokens(resize(F.pixel_shuffle(y, p), (h, w)))  # (B, C, H, W)
        return self.fuse(torch.cat((x, y), dim=1))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, d, P, N), as coremltools finds it: one layer_norm op.

    It looks for these ops and no others: the square as a product, the difference used three times, the bias before the
    weight.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.eps, self.affine = norm.eps, norm.elementwise_affine
        if self.affine:
            self.weight = nn.Parameter(norm.weight.detach()[:, None, None])
            self.shift = nn.Parameter((norm.bias / norm.weight).detach()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        y = centred * torch.rsqrt((centred * centred).mean(dim=1, keepdim=True) + self.eps)
        return (y + self.shift) * self.weight if self.affine else y


class ChannelsEncoder(nn.Module):
    def __init__(self, encoder: OpenEncoder) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(encoder.norm1), ChannelNorm(encoder.norm2)
        self.attention, self.mlp = ChannelsAttention(encoder.attention), ChannelsMLP(encoder.mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ChannelsMLP(nn.Module):
    def __init__(self, mlp: FeedForward) -> None:
        super().__init__()
        self.expand, self.act, self.reduce = Pointwise(mlp.expand), mlp.act, Pointwise(mlp.reduce)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.act(self.expand(x)))


class Pointwise(nn.Module):
    """A linear layer as a 1x1 convolution: (B, D_in, P, N) -> (B, D_out, P, N)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach()[:, :, None, None])
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class ChannelsAttention(nn.Module):
    """Between the N tokens of each place in a patch: (B, d, P, N) -> (B, d, P, N)."""

    def __init__(self, attention: OpenAttention) -> None:
        super().__init__()
        self.qkv, self.proj = SplitHeads(attention.qkv), JoinHeads(attention.proj)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=1)  # (B, d/h, P*h, N)
        scores = torch.einsum("nchw,nwhu->nchu", k.permute(0, 3, 2, 1), q)  # (B, N keys, P*h, N queries)
        return self.proj(torch.einsum("nchw,nwhu->nchu", v, scores.softmax(dim=1)))


class SplitHeads(nn.Module):
    """q, k and v as one transposed convolution: (B, d, P, N) -> (B, 3*d/h, P*h, N). `carry_biases` left no bias."""

    def __init__(self, qkv: SplitLinear) -> None:
        super().__init__()
        assert len(qkv.biases) == 0
        thirds = torch.stack([weight.detach().unflatten(0, (HEADS, -1)) for weight in qkv.weights])  # (3, h, d/h, d)
        self.weight = nn.Parameter(thirds.permute(3, 0, 2, 1).flatten(1, 2)[..., None].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, stride=(HEADS, 1))


class JoinHeads(nn.Module):
    """The linear layer after attention as one convolution: (B, d/h, P*h, N) -> (B, d, P, N)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        heads = linear.weight.detach().unflatten(1, (HEADS, -1))  # (d, h, d/h)
        self.weight = nn.Parameter(heads.transpose(1, 2)[..., None].contiguous())  # (d, d/h, h, 1)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=(HEADS, 1))
