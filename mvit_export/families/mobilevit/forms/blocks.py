"""A MobileViT block taken apart for rewriting: the same layers under the same paths, with q, k and v separate.

Every form starts with `OpenBlock`; `algebra.py` rewrites its weights; a layout (`flat.py`, `patches.py`, ...) takes its
parts and computes with them. An open block has no forward itself.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.families.mobilevit.network import Attention, ConvNormAct, Encoder, FeedForward, MobileViTBlock

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class SplitLinear(nn.Module):
    """A fused linear layer split into three: q, k and v of tokens (..., d), each (..., d).

    `move_value_bias` leaves only q's bias.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = linear.bias
        self.weights = nn.ParameterList(part.detach().clone() for part in linear.weight.chunk(3))
        self.biases = nn.ParameterList(part.detach().clone() for part in bias.chunk(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, w, b) for w, b in itertools.zip_longest(self.weights, self.biases))


class OpenAttention(nn.Module):
    """`Attention` with q, k and v separate; after `scale_queries`, 1 / sqrt(d / heads) is part of q."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        self.qkv, self.proj = SplitLinear(attention.qkv), copy.deepcopy(attention.proj)


class OpenEncoder(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.norm1: nn.Module = encoder.norm1
        self.attention = OpenAttention(encoder.attention)
        self.norm2: nn.Module = encoder.norm2
        self.mlp = copy.deepcopy(encoder.mlp)


class OpenBlock(nn.Module):
    """`MobileViTBlock`, ready for passes.

    What they write to is copied, layer by layer: a layer that occurs twice must not be rewritten twice.
    """

    def __init__(self, block: MobileViTBlock) -> None:
        super().__init__()
        self.patch = block.patch
        self.local: Any = copy.deepcopy(block.local)
        self.to_tokens = copy.deepcopy(block.to_tokens)
        encoders: list[Any] = list(block.encoders)
        self.encoders: Any = nn.ModuleList(OpenEncoder(encoder) for encoder in encoders)
        self.norm: nn.Module = block.norm
        self.from_tokens = copy.deepcopy(block.from_tokens)
        self.fuse: Any = copy.deepcopy(block.fuse)


def is_standard(block: nn.Module) -> bool:
    """Whether a block computes what `MobileViTBlock` does, so that rewriting it changes nothing.

    A subclass, a hook, a replaced part or another geometry may compute anything: such blocks keep their form.
    """
    if type(block) is not MobileViTBlock or any(map(is_patched, block.modules())):
        return False
    encoders: list[Any] = list(block.encoders)
    convs = (block.local, block.from_tokens, block.fuse)
    return (
        all(is_standard_conv(conv, side) for conv, side in zip(convs, (3, 1, 3), strict=True))
        and is_conv(block.to_tokens, 1)
        and is_norm(block.norm)
        and all(map(is_standard_encoder, encoders))
    )


def is_patched(part: nn.Module) -> bool:
    """Whether this particular object computes something other than its class."""
    return "forward" in vars(part) or any(getattr(part, name) for name in HOOKS)


def is_standard_conv(layer: Any, side: int) -> bool:
    """Whether it is a convolution and SiLU, with its BatchNorm folded."""
    return (
        type(layer) is ConvNormAct
        and is_conv(layer.conv, side)
        and type(layer.norm) is nn.Identity
        and type(layer.act) is nn.SiLU
    )


def is_conv(conv: Any, side: int) -> bool:
    """Whether it is a dense `side` x `side` convolution that keeps the size of its map."""
    geometry = ((side, side), (1, 1), ((side - 1) // 2,) * 2, (1, 1), 1, "zeros")
    return type(conv) is nn.Conv2d and geometry == (
        conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode,
    )  # fmt: skip


def is_norm(norm: Any) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None


def is_standard_encoder(encoder: Any) -> bool:
    if type(encoder) is not Encoder or type(encoder.dropout) is not nn.Dropout:
        return False
    attention, mlp = encoder.attention, encoder.mlp
    if type(attention) is not Attention or type(mlp) is not FeedForward or type(mlp.act) is not nn.SiLU:
        return False
    linears = (attention.qkv, attention.proj, mlp.expand, mlp.reduce)
    return all(type(linear) is nn.Linear and linear.bias is not None for linear in linears) and all(
        map(is_norm, (encoder.norm1, encoder.norm2))
    )


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return x.permute(0, 3, 1, 2)
