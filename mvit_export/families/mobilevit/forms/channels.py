"""Tokens as a map, for Apple's Neural Engine: (B, d, P, N); `channels_last.py` is for LiteRT's GPU delegates.

The batch stays the outermost axis, no tensor has more than four axes, linear layers are 1x1 convolutions, layer norms
and softmax run over channels. Letters as in network.py, h heads.

Heads join the pixels of a patch on axis 2 as (P, h), h innermost, since attention treats both as a batch and MIL's
einsum has its batch on axis 2. No reshape is needed for that: rows of weights may be written in any order, so a
transposed convolution with kernel and stride (h, 1) writes a token's heads below each other, and a convolution with
kernel and stride (h, 1) reads them; both have the weights of the linear layer and none of their products overlap.

apple/ml-ane-transformers asks for this layout and this einsum, but computes it once for each head. Transposed
convolutions are a risk: one with stride 16 was reported refused (apple/coremltools#2450); here the stride is h = 4.
Only the file of this form was examined: its ops, its lint, its results. No Apple device has run or timed it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.families.mobilevit.forms.algebra import SHIFT, CarryingNorm
from mvit_export.families.mobilevit.forms.blocks import OpenAttention, OpenBlock, OpenEncoder, SplitLinear
from mvit_export.families.mobilevit.network import HEADS, FeedForward, resize


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
    """LayerNorm without affine over the channels of (B, d, P, N), which coremltools recognises: one layer_norm op.

    It looks for exactly these ops: the square as a product, the difference used three times, a bias before a weight,
    both of them vectors. A weight of 1 is removed before it looks.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.carries = isinstance(norm, CarryingNorm)
        if self.carries:
            (d,) = norm.norm.normalized_shape
            self.register_buffer("shift", torch.full((d, 1, 1), SHIFT))
            self.register_buffer("scale", torch.full((d, 1, 1), norm.scale))
        self.eps: float = (norm.norm if self.carries else norm).eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        y = centred * torch.rsqrt((centred * centred).mean(dim=1, keepdim=True) + self.eps)
        return (y + self.shift) * self.scale if self.carries else y


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
        self.weight = nn.Parameter(torch.cat([below_each_other(weight) for weight in qkv.weights], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, stride=(HEADS, 1))


def below_each_other(weight: Tensor) -> Tensor:
    """A linear layer's weight as that of a transposed convolution that writes heads along axis 2."""
    heads = weight.detach().unflatten(0, (HEADS, -1))  # (h, d/h, d)
    return heads.permute(2, 1, 0)[..., None].contiguous()  # (d, d/h, h, 1)


class JoinHeads(nn.Module):
    """The linear layer after attention as one convolution: (B, d/h, P*h, N) -> (B, d, P, N)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        heads = linear.weight.detach().unflatten(1, (HEADS, -1))  # (d, h, d/h)
        self.weight = nn.Parameter(heads.transpose(1, 2)[..., None].contiguous())  # (d, d/h, h, 1)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=(HEADS, 1))
