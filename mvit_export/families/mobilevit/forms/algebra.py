"""Rewrites of an open block's weights, each exact up to rounding and done in float64.

Letters: W and b are a layer's weight and bias, d the transformer width, 1 a vector of d ones.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from mvit_export.families.mobilevit.forms.blocks import OpenBlock

SHIFT = 1 / 16  # s of `carry_biases`: the smaller, the more digits n keeps in fp16


def scale_queries(block: OpenBlock) -> None:
    """softmax(s q k^T) with s = 1 / sqrt(d / heads): W_q' = s W_q, b_q' = s b_q."""
    for encoder in block.encoders:
        qkv, scale = encoder.attention.qkv, encoder.attention.head_dim**-0.5
        set_weight(qkv.weights[0], qkv.weights[0].double() * scale)
        set_weight(qkv.biases[0], qkv.biases[0].double() * scale)


def move_value_bias(block: OpenBlock) -> None:
    """The rows of softmax sum to 1, so v's bias passes through attention: b_proj' = b_proj + W_proj b_v, b_v' = 0.

    k's bias adds the same number to all scores of a query, which softmax ignores: b_k' = 0.
    """
    for encoder in block.encoders:
        biases, proj = encoder.attention.qkv.biases, encoder.attention.proj
        set_weight(proj.bias, proj.bias.double() + proj.weight.double() @ biases[2].double())
        encoder.attention.qkv.biases = nn.ParameterList(biases[:1])


def fold_norm_affine(block: OpenBlock) -> None:
    """A norm outputs g * n + h; the next layer absorbs g and h: W' = W diag(g), b' = b + W h. The norm keeps only n.

    The layer after the last norm is a 1x1 convolution. A resize between them is linear and keeps constants.
    """
    for encoder in block.encoders:
        qkv, expand = encoder.attention.qkv, encoder.mlp.expand
        for weight, bias in zip(qkv.weights, qkv.biases, strict=True):
            absorb(encoder.norm1, weight, bias)
        absorb(encoder.norm2, expand.weight, expand.bias)
        encoder.norm1, encoder.norm2 = plain(encoder.norm1), plain(encoder.norm2)
    conv = block.from_tokens.conv
    if conv.bias is None:
        conv.bias = nn.Parameter(torch.zeros(conv.out_channels, dtype=conv.weight.dtype))
    absorb(block.norm, conv.weight, conv.bias)
    block.norm = plain(block.norm)


def absorb(norm: Any, weight: Tensor, bias: Tensor) -> None:
    matrix = weight.double().flatten(1)  # (out, d), also of a 1x1 convolution
    set_weight(bias, bias.double() + matrix @ norm.bias.double())
    set_weight(weight, (matrix * norm.weight.double()).view_as(weight))


def plain(norm: Any) -> nn.LayerNorm:
    return nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)


def carry_biases(block: OpenBlock, *, scale: float = 1.0) -> None:
    """Put the biases of q, k and v into their weights, for layers that have no place for biases.

    A norm without affine outputs n with 1^T n = 0, so a constant s added to it can be told apart from the tokens:
    W' = W C / g + b 1^T / (d g s), C = I - 1 1^T / d, has W' g (n + s 1) = W n + b. `scale` is g.

    Biases of 0 need not be carried, and must not be: an untrained network with such biases outputs 0 for a black
    picture, and its norms would turn W C 1, which is 0 but for rounding, into anything.
    """
    for encoder in block.encoders:
        qkv = encoder.attention.qkv
        if any(bool(bias.any()) for bias in qkv.biases):
            for weight, bias in itertools.zip_longest(qkv.weights, qkv.biases):
                carried = weight.double() - weight.double().mean(dim=1, keepdim=True)
                if bias is not None:
                    carried += bias.double()[:, None] / (weight.shape[1] * SHIFT)
                set_weight(weight, carried / scale)
            encoder.norm1 = CarryingNorm(encoder.norm1, scale)
        qkv.biases = nn.ParameterList()


class CarryingNorm(nn.Module):
    """A norm without affine, then g (n + s)."""

    def __init__(self, norm: nn.Module, scale: float) -> None:
        super().__init__()
        self.norm, self.scale = norm, scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) + SHIFT
        return y if self.scale == 1 else y * self.scale


def centre_stream(block: OpenBlock) -> None:
    """Keep the tokens' mean over their d channels at zero, so that LayerNorm has no mean to subtract.

    LayerNorm sees x only as x - mean(x) = C x, C = I - 1 1^T / d, and all that is added to the stream comes out of a
    layer: W' = C W, b' = C b for the d-projection, attention's output and the MLP's. Norms without affine become
    x / sqrt(mean(x^2) + eps). A resize mixes pixels, not channels.
    """
    centre(block.to_tokens)
    for encoder in block.encoders:
        centre(encoder.attention.proj)
        centre(encoder.mlp.reduce)
        encoder.norm1, encoder.norm2 = CentredNorm(encoder.norm1), CentredNorm(encoder.norm2)
    block.norm = CentredNorm(block.norm)


def centre(layer: Any) -> None:
    """`layer` is a linear or a 1x1 convolution: the first axis of its weight is that of its d outputs."""
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            set_weight(parameter, parameter.double() - parameter.double().mean(dim=0, keepdim=True))


class CentredNorm(nn.Module):
    """LayerNorm without affine of tokens (..., d) whose mean over d is already zero: RMSNorm.

    The reshape costs nothing and keeps XNNPACK from fusing square and mean into one op, which it has only in fp32: it
    leaves all that follows it in fp32 when told to compute in fp16.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        assert isinstance(norm, nn.LayerNorm) and norm.weight is None
        self.eps: float = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        squares = (x * x).flatten(0, -2)  # (all tokens, d)
        return x * torch.rsqrt(squares.mean(dim=-1).reshape(*x.shape[:-1], 1) + self.eps)


@torch.no_grad()
def set_weight(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)
