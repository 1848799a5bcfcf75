"""MobileViT (Mehta and Rastegari, arXiv 2110.02178), the whole network in one file, leaves first.

This is the reference that every exported file is compared with, so it is written for reading:
plain layers, shapes at the end of the line, no export tricks. Forms that suit a runtime better
are in forms/.

Letters in shape comments: B batch, C map channels, H and W map height and width, d transformer
width, P pixels in a patch (ph * pw), N patches in a map (nh * nw).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.families.mobilevit.variants import CUSTOM

PATCH_CONFIGS = {
    "A": (2, 2, 2),  # patch side in stages 3, 4, 5: more accurate
    "B": (8, 4, 2),  # faster; the paper's Table 11
}
HEADS = 4
DEPTHS = (2, 4, 3)  # encoders in stages 3, 4, 5
EPS = 1e-5  # of every BatchNorm and LayerNorm


@dataclass(frozen=True)
class MobileViTConfig:
    """Everything that determines the shapes of the network's parameters and maps."""

    stem: int
    stages: tuple[int, int, int, int, int]  # channels out of stages 1 to 5
    widths: tuple[int, int, int]  # transformer width d in stages 3, 4, 5
    head: int  # channels of the 1x1 expansion before pooling: min(4 * stages[-1], 960)
    expansion: int  # of the inverted residuals
    dropout: float  # inside the encoders
    num_classes: int = 1000
    patch_config: str = "A"
    output_stride: int = 32

    def __post_init__(self) -> None:
        if self.patch_config not in PATCH_CONFIGS:
            raise ValueError(f"patch_config is {self.patch_config!r}, expected one of {sorted(PATCH_CONFIGS)}")
        if self.output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {self.output_stride}, expected 8, 16 or 32")
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}, expected at least 1")

    @property
    def variant(self) -> str:
        """The variant whose sizes these are, "custom" if none."""
        return next((name for name, row in VARIANTS.items() if row.sizes == self.sizes), CUSTOM)

    @property
    def sizes(self) -> tuple[object, ...]:
        """What tells the variants apart."""
        return self.stem, self.stages, self.widths, self.head, self.expansion


# fmt: off
VARIANTS = {
    #                       stem  stages                  widths           head expansion dropout
    "xxs": MobileViTConfig(  16, (16, 24, 48,  64,  80), ( 64,  80,  96), 320,      2,    0.05),
    "xs":  MobileViTConfig(  16, (32, 48, 64,  80,  96), ( 96, 120, 144), 384,      4,    0.10),
    "s":   MobileViTConfig(  16, (32, 64, 96, 128, 160), (144, 192, 240), 640,      4,    0.10),
}
# fmt: on


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Round to a multiple of `divisor` without losing more than 10 % (MobileNetV2's rule)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class ConvNormAct(nn.Module):
    """Bias-free convolution, BatchNorm and, if `act`, SiLU. (B, C_in, H, W) -> (B, C_out, H/stride, W/stride)."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        padding = (kernel - 1) // 2 * dilation
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, groups, bias=False)
        self.norm = nn.BatchNorm2d(c_out, eps=EPS, momentum=0.1)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand 1x1, depthwise 3x3, reduce 1x1 without activation."""

    def __init__(self, c_in: int, c_out: int, *, expansion: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        hidden = make_divisible(round(c_in * expansion))
        self.expand = ConvNormAct(c_in, hidden, 1)
        self.depthwise = ConvNormAct(hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden)
        self.reduce = ConvNormAct(hidden, c_out, 1, act=False)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class Attention(nn.Module):
    """Multi-head self-attention over N tokens, written out: (B * P, N, d) -> (B * P, N, d)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.head_dim = d // HEADS
        self.qkv = nn.Linear(d, 3 * d)  # rows: all of q, then k, then v
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, self.head_dim)  # (B*P, N, 3, heads, d/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B*P, heads, N, d/heads)
        weights = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # (B*P, heads, N, N)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))  # (B*P, N, d)


class FeedForward(nn.Module):
    """Linear d -> 2d, SiLU, Linear 2d -> d."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.expand = nn.Linear(d, 2 * d)
        self.act = nn.SiLU()
        self.reduce = nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.act(self.expand(x)))


class Encoder(nn.Module):
    """Pre-norm transformer layer; no position encoding, since the convolutions before it encode position."""

    def __init__(self, d: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d, eps=EPS)
        self.attention = Attention(d)
        self.norm2 = nn.LayerNorm(d, eps=EPS)
        self.mlp = FeedForward(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


def unfold_patches(x: Tensor, patch: int) -> Tensor:
    """Group the pixels that share a place inside their patch: (B, d, H, W) -> (B * P, N, d)."""
    b, d, h, w = x.shape
    nh, nw, area = h // patch, w // patch, patch * patch
    x = x.reshape(b * d, nh, patch, nw, patch).permute(0, 2, 4, 1, 3)  # (B*d, ph, pw, nh, nw): rank 5 works everywhere
    x = x.reshape(b, d, area, nh * nw).permute(0, 2, 3, 1)  # (B, P, N, d)
    return x.reshape(b * area, nh * nw, d)  # (B*P, N, d)


def fold_patches(x: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Undo `unfold_patches`: (B * P, N, d) -> (B, d, H, W) with (H, W) = `size`."""
    h, w = size
    nh, nw, area, d = h // patch, w // patch, patch * patch, x.shape[-1]
    b = x.shape[0] // area
    x = x.reshape(b, area, nh * nw, d).permute(0, 3, 1, 2)  # (B, d, P, N)
    x = x.reshape(b * d, patch, patch, nh, nw).permute(0, 3, 1, 4, 2)  # (B*d, nh, ph, nw, pw)
    return x.reshape(b, d, h, w)  # (B, d, H, W)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear without aligned corners, as in ml-cvnets; nothing if the size is already right."""
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class MobileViTBlock(nn.Module):
    """Local convolution, then attention between patches, then a fusion with the input. Keeps (B, C, H, W)."""

    def __init__(self, c: int, d: int, *, depth: int, patch: int, dropout: float) -> None:
        super().__init__()
        self.patch = patch
        self.local = ConvNormAct(c, c, 3)
        self.to_tokens = nn.Conv2d(c, d, 1, bias=False)
        self.encoders = nn.ModuleList(Encoder(d, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(d, eps=EPS)
        self.from_tokens = ConvNormAct(d, c, 1)
        self.fuse = ConvNormAct(2 * c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.to_tokens(self.local(x))  # (B, d, H, W)
        h, w = y.shape[-2:]
        whole = (math.ceil(h / self.patch) * self.patch, math.ceil(w / self.patch) * self.patch)
        tokens = unfold_patches(resize(y, whole), self.patch)  # (B*P, N, d)
        for encoder in self.encoders:
            tokens = encoder(tokens)
        y = fold_patches(self.norm(tokens), self.patch, whole)  # (B, d, H', W')
        y = self.from_tokens(resize(y, (h, w)))  # (B, C, H, W)
        return self.fuse(torch.cat((x, y), dim=1))  # residual first


class MobileViT(nn.Module):
    """The classifier: images (B, 3, H, W) -> logits (B, num_classes). H and W are at least 32."""

    def __init__(self, config: MobileViTConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvNormAct(3, config.stem, 3, stride=2)
        self.stages = nn.ModuleList(build_stages(config))
        self.head = ConvNormAct(config.stages[-1], config.head, 1)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(config.head, config.num_classes)
        self.apply(init_weights)

    def forward_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """The map after each of the five stages, (B, C_i, H_i, W_i), for task heads."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.forward_features(x)[-1])  # (B, head, H/32, W/32)
        return self.classifier(self.dropout(x.mean(dim=(2, 3))))  # (B, num_classes)


def build_stages(config: MobileViTConfig) -> list[nn.Sequential]:
    """The five stages; a smaller output stride removes the last strides, as DeepLab does it."""
    c1, c2, *deep = config.stages
    e = config.expansion
    stages = [
        nn.Sequential(InvertedResidual(config.stem, c1, expansion=e)),
        nn.Sequential(
            InvertedResidual(c1, c2, expansion=e, stride=2),
            InvertedResidual(c2, c2, expansion=e),
            InvertedResidual(c2, c2, expansion=e),
        ),
    ]
    # (stride, dilation) of the inverted residual that opens stages 3, 4, 5. Dilation follows the
    # stride that an *earlier* stage gave up, so stage 5 at output stride 16 has none.
    steps = {32: ((2, 1), (2, 1), (2, 1)), 16: ((2, 1), (2, 1), (1, 1)), 8: ((2, 1), (1, 1), (1, 2))}
    patches = PATCH_CONFIGS[config.patch_config]
    c_in = c2
    for c, d, depth, patch, (stride, dilation) in zip(
        deep, config.widths, DEPTHS, patches, steps[config.output_stride], strict=True
    ):
        stages.append(
            nn.Sequential(
                InvertedResidual(c_in, c, expansion=e, stride=stride, dilation=dilation),
                MobileViTBlock(c, d, depth=depth, patch=patch, dropout=config.dropout),
            )
        )
        c_in = c
    return stages


def init_weights(module: nn.Module) -> None:
    """He's normal for convolutions (fan out), normal(0.02) for linears, identity norms."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def create_mobilevit(
    variant: str, *, num_classes: int = 1000, patch_config: str = "A", output_stride: int = 32
) -> MobileViT:
    """Build `variant` ("xxs", "xs" or "s") with fresh weights from torch's global generator, in training mode."""
    config = replace(VARIANTS[variant], num_classes=num_classes, patch_config=patch_config, output_stride=output_stride)
    return MobileViT(config)
