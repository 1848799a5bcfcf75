"""MobileViT in forms that a runtime runs faster: the same function, another order of the same sums.

Everything here keeps the paths of modules with weights, which recipes and `verify --locate` speak of.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.models.mobilevit import Attention, Encoder, MobileViTBlock, resize


def flatten_tokens(module: nn.Module, *, batched: bool) -> nn.Module:
    """A copy of a network whose MobileViT blocks hold their tokens as one matrix (N * B * P, d), N outermost.

    A head's q, k and v are then strided views of what the linear layers give, and its matrix products take them
    without a transpose; linear layers and norms work on a matrix, which ONNX Runtime runs better than a stack of them.
    `batched` is False where the batch is always 1. Other networks, and blocks in which somebody replaced a part that is
    written anew here, come back as they are.
    """
    module = copy.deepcopy(module)
    for path, block in list(module.named_modules()):
        if path and isinstance(block, MobileViTBlock) and is_standard(block):
            module.set_submodule(path, FlatBlock(block, batched=batched))
    return module


def is_standard(block: MobileViTBlock) -> bool:
    """Whether what `FlatBlock` does not call but writes anew is as it was built: a subclass may compute otherwise."""
    encoders: list[Any] = list(block.encoders)
    parts: list[tuple[object, type]] = [(block, MobileViTBlock)]
    for encoder in encoders:
        parts += [(encoder, Encoder), (encoder.dropout, nn.Dropout), (encoder.attention, Attention)]
        parts += [(encoder.attention.qkv, nn.Linear)]
    return all(type(part) is kind for part, kind in parts) and all(
        encoder.attention.qkv.bias is not None for encoder in encoders
    )


class FlatBlock(nn.Module):
    """MobileViTBlock. Letters as in models/mobilevit.py."""

    def __init__(self, block: MobileViTBlock, *, batched: bool) -> None:
        super().__init__()
        self.patch, self.batched = block.patch, batched
        self.local, self.to_tokens, self.norm = block.local, block.to_tokens, block.norm
        self.from_tokens, self.fuse = block.from_tokens, block.fuse
        encoders: list[Any] = list(block.encoders)
        self.encoders = nn.ModuleList(FlatEncoder(encoder) for encoder in encoders)

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
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = encoder.norm1, encoder.norm2, encoder.mlp
        self.attention = FlatAttention(encoder.attention)

    def forward(self, x: Tensor, count: int) -> Tensor:
        x = x + self.attention(self.norm1(x), count)
        return x + self.mlp(self.norm2(x))


class FlatAttention(nn.Module):
    """Between the `count` tokens of each place in a patch: (N*B*P, d) -> (N*B*P, d)."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        self.qkv, self.proj = SplitLinear(attention.qkv, scale=attention.head_dim**-0.5), attention.proj

    def forward(self, x: Tensor, count: int) -> Tensor:
        q, k, v = (part.reshape(count, -1, self.head_dim) for part in self.qkv(x))  # (N, B*P*heads, d/heads)
        weights = (q.transpose(0, 1) @ k.permute(1, 2, 0)).softmax(dim=-1)  # (B*P*heads, N, N)
        return self.proj((weights @ v.transpose(0, 1)).transpose(0, 1).reshape(x.shape))


class SplitLinear(nn.Module):
    """q, k and v as three layers; 1 / sqrt(d/heads) is part of q's."""

    def __init__(self, linear: nn.Linear, *, scale: float) -> None:
        super().__init__()
        weights, biases = linear.weight.detach().chunk(3), linear.bias.detach().chunk(3)
        scales = (scale, 1.0, 1.0)
        self.weights = nn.ParameterList(w * s for w, s in zip(weights, scales, strict=True))
        self.biases = nn.ParameterList(b * s for b, s in zip(biases, scales, strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, w, b) for w, b in zip(self.weights, self.biases, strict=True))
