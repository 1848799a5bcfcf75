"""The form `channels` in LiteRT's tensor layout, for its GPU delegates: tokens (B, P, N, d).

The same layers as in `channels.py`; around each convolution axes are swapped to PyTorch's order and back, which the
converter cancels. Softmax is over the last axis, since LiteRT has no other. Tensors keep the batch outermost and have
four axes, also in unfold and fold: delegates read them as batch, height, width, channels, and refuse what is folded
into the batch. All ops are listed in TensorFlow's tools/versioning/gpu_compatibility.cc; no GPU has run or timed it.
Letters as in network.py, h heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.families.mobilevit.forms.algebra import CarryingNorm
from mvit_export.families.mobilevit.forms.blocks import (
    OpenAttention,
    OpenBlock,
    OpenEncoder,
    SplitLinear,
    channels_first,
    channels_last,
)
from mvit_export.families.mobilevit.forms.channels import ChannelsMLP, JoinHeads, below_each_other
from mvit_export.families.mobilevit.network import HEADS, resize


class ChannelsLastBlock(nn.Module):
    def __init__(self, block: OpenBlock) -> None:
        super().__init__()
        self.patch = block.patch
        self.local, self.to_tokens, self.norm = block.local, block.to_tokens, keep_axes(block.norm)
        self.from_tokens, self.fuse = block.from_tokens, block.fuse
        self.encoders = nn.ModuleList(ChannelsLastEncoder(encoder) for encoder in block.encoders)

    def forward(self, x: Tensor) -> Tensor:
        y = self.to_tokens(self.local(x))  # (B, d, H, W)
        (h, w), p = y.shape[-2:], self.patch
        nh, nw = math.ceil(h / p), math.ceil(w / p)
        tokens = self.unfold(channels_last(resize(y, (nh * p, nw * p))), nh, nw)  # (B, P, N, d)
        for encoder in self.encoders:
            tokens = encoder(tokens)
        y = channels_first(self.fold(self.norm(tokens), nh, nw))  # (B, d, H', W')
        return self.fuse(torch.cat((x, self.from_tokens(resize(y, (h, w)))), dim=1))

    def unfold(self, y: Tensor, nh: int, nw: int) -> Tensor:
        """(B, H, W, d) -> (B, P, N, d), P as (pw, ph): two swaps of whole rows."""
        (b, _, _, d), p = y.shape, self.patch
        y = y.reshape(b, nh, p, nw * p * d).transpose(1, 2)  # (B, ph, nh, W*d)
        y = y.reshape(b, p * nh * nw, p, d).transpose(1, 2)  # (B, pw, ph*N, d)
        return y.reshape(b, p * p, nh * nw, d)

    def fold(self, tokens: Tensor, nh: int, nw: int) -> Tensor:
        (b, _, _, d), p = tokens.shape, self.patch
        y = tokens.reshape(b, p, p * nh * nw, d).transpose(1, 2)  # (B, ph*N, pw, d)
        y = y.reshape(b, p, nh, nw * p * d).transpose(1, 2)  # (B, nh, ph, W*d)
        return y.reshape(b, nh * p, nw * p, d)


def keep_axes(norm: Any) -> nn.Module:
    """The same norm with all its values on four axes."""
    return CarryingNorm(keep_axes(norm.norm), norm.scale) if isinstance(norm, CarryingNorm) else FourAxesNorm(norm.eps)


class FourAxesNorm(nn.Module):
    """`CentredNorm` with eps inside the mean: if added to it, the converter drops the last axis and puts it back."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x + self.eps).mean(dim=-1, keepdim=True))


class ChannelsLastEncoder(nn.Module):
    def __init__(self, encoder: OpenEncoder) -> None:
        super().__init__()
        self.norm1, self.norm2 = keep_axes(encoder.norm1), keep_axes(encoder.norm2)
        self.attention, self.mlp = ChannelsLastAttention(encoder.attention), ChannelsMLP(encoder.mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + channels_last(self.mlp(channels_first(self.norm2(x))))


class ChannelsLastAttention(nn.Module):
    """Between the N tokens of each place in a patch: (B, P, N, d) -> (B, P, N, d)."""

    def __init__(self, attention: OpenAttention) -> None:
        super().__init__()
        self.qkv, self.proj = SplitHeadsLast(attention.qkv), JoinHeads(attention.proj)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        # einsum, since PyTorch turns `@` into a product on three axes, with P*h as the batch.
        weights = torch.einsum("bpqc,bpck->bpqk", q, k).softmax(dim=-1)  # (B, P*h, N, N)
        return channels_last(self.proj(channels_first(torch.einsum("bpqk,bpkc->bpqc", weights, v))))


class SplitHeadsLast(nn.Module):
    """(B, P, N, d) -> q and v (B, P*h, N, d/h) as in `SplitHeads`, k (B, P*h, d/h, N).

    k is a 1x1 convolution and has its axes swapped before its heads are split. If swapped after that, the converter
    would leave it to a flag of BATCH_MATMUL (adj_y), which LiteRT's GPU delegate reads but TensorFlow Lite's does not.
    """

    def __init__(self, qkv: SplitLinear) -> None:
        super().__init__()
        assert len(qkv.biases) == 0
        q, k, v = qkv.weights
        self.qv = nn.Parameter(torch.cat((below_each_other(q), below_each_other(v)), dim=1))
        self.k = nn.Parameter(k.detach()[..., None, None])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (b, p, n, d), x = x.shape, channels_first(x)
        q, v = channels_last(F.conv_transpose2d(x, self.qv, stride=(HEADS, 1))).chunk(2, dim=-1)
        k = F.conv2d(x, self.k).transpose(1, 2)  # (B, P, d, N)
        return q, k.reshape(b, p * HEADS, d // HEADS, n), v
