"""Tokens as one matrix, for ONNX Runtime: (N * B * P, d), N outermost.

A head's q, k and v are then strided views of the linear layers' outputs, and its matrix products use them without a
transpose (ONNX Runtime fuses the swaps of axes into FusedMatMul); linear layers and norms work on a matrix, which it
runs faster than a stack of them. Letters as in network.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mvit_export.families.mobilevit.forms.blocks import OpenAttention, OpenBlock, OpenEncoder
from mvit_export.families.mobilevit.network import resize


class FlatBlock(nn.Module):
    """`batched` is False if the batch is always 1."""

    def __init__(self, block: OpenBlock, *, batched: bool) -> None:
        super().__init__()
        self.patch, self.batched = block.patch, batched
        self.local, self.to_tokens, self.norm = block.local, block.to_tokens, block.norm
        self.from_tokens, self.fuse = block.from_tokens, block.fuse
        self.encoders = nn.ModuleList(FlatEncoder(encoder) for encoder in block.encoders)

    def forward(self, x: Tensor) -> Tensor:
        y = self.to_tokens(self.local(x))  # (B, d, H, W)
        (h, w), p = y.shape[-2:], self.patch
        nh, nw = math.ceil(h / p), math.ceil(w / p)
        tokens = self.unfold(resize(y, (nh * p, nw * p)), nh, nw)  # (N*B*P, d)
        for encoder in self.encoders:
            tokens = encoder(tokens, nh * nw)
        y = self.fold(self.norm(tokens), nh, nw)  # (B, d, H', W')
        return self.fuse(torch.cat((x, self.from_tokens(resize(y, (h, w)))), dim=1))

    def unfold(self, y: Tensor, nh: int, nw: int) -> Tensor:
        d, p = y.shape[1], self.patch
        tokens = y.permute(0, 2, 3, 1).reshape(-1, p, nw, p * d).transpose(1, 2)  # (B*nh, nw, ph, pw*d)
        if self.batched:
            tokens = tokens.reshape(-1, nh * nw, p * p * d).transpose(0, 1)  # (N, B, P*d)
        return tokens.reshape(-1, d)

    def fold(self, tokens: Tensor, nh: int, nw: int) -> Tensor:
        d, p = tokens.shape[1], self.patch
        if self.batched:
            tokens = tokens.reshape(nh * nw, -1, p * p * d).transpose(0, 1)  # (B, N, P*d)
        rows = tokens.reshape(-1, nw, p, p * d).transpose(1, 2)  # (B*nh, ph, nw, pw*d)
        return rows.reshape(-1, nh * p, nw * p, d).permute(0, 3, 1, 2)


class FlatEncoder(nn.Module):
    def __init__(self, encoder: OpenEncoder) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = encoder.norm1, encoder.norm2, encoder.mlp
        self.attention = FlatAttention(encoder.attention)

    def forward(self, x: Tensor, count: int) -> Tensor:
        x = x + self.attention(self.norm1(x), count)
        return x + self.mlp(self.norm2(x))


class FlatAttention(nn.Module):
    """Between the `count` tokens of each place in a patch: (N*B*P, d) -> (N*B*P, d)."""

    def __init__(self, attention: OpenAttention) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, x: Tensor, count: int) -> Tensor:
        q, k, v = (part.reshape(count, -1, self.head_dim) for part in self.qkv(x))  # (N, B*P*heads, d/heads)
        weights = (q.transpose(0, 1) @ k.permute(1, 2, 0)).softmax(dim=-1)  # (B*P*heads, N, N)
        return self.proj((weights @ v.transpose(0, 1)).transpose(0, 1).reshape(x.shape))
