"""MobileViTv2 (Mehta and Rastegari, arXiv 2206.02680), the whole network, leaves first.

This is the reference that every exported file is compared with, so it is written for reading: plain layers, shapes at
the end of the line, no export tricks. Forms that suit a runtime better are in forms/. The convolutions around the
blocks are those of MobileViT.

Letters in shape comments: B batch, C map channels, H and W map height and width, d transformer width, P pixels in a
patch (always 2x2), N patches in a map (nh * nw).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.families.mobilevit.network import ConvNormAct, InvertedResidual, make_divisible
from mvit_export.families.mobilevitv2.variants import CUSTOM, VARIANT_NAMES

PATCH = 2  # side of a patch in every block
DEPTHS = (2, 4, 3)  # encoders in stages 3, 4, 5
EXPANSION = 2  # of the inverted residuals
EPS = 1e-5  # of every BatchNorm and GroupNorm


@dataclass(frozen=True)
class MobileViTV2Config:
    """Everything that determines the shapes of the network's parameters."""

    stem: int
    stages: tuple[int, int, int, int, int]  # channels out of stages 1 to 5
    widths: tuple[int, int, int]  # transformer width d in stages 3, 4, 5
    num_classes: int = 1000

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}, expected at least 1")

    @property
    def variant(self) -> str:
        """The variant whose sizes these are, "v2-custom" if none."""
        sizes = (self.stem, self.stages, self.widths)
        return next((name for name, row in VARIANTS.items() if (row.stem, row.stages, row.widths) == sizes), CUSTOM)


def scaled(width: float) -> MobileViTV2Config:
    """The sizes at a width multiplier: those of 1.0 times `width`, divisible by 8 or 16."""
    return MobileViTV2Config(
        stem=make_divisible(min(max(32 * width, 16), 64)),
        stages=(
            make_divisible(64 * width, 16),
            make_divisible(128 * width),
            make_divisible(256 * width),
            make_divisible(384 * width),
            make_divisible(512 * width),
        ),
        widths=(make_divisible(128 * width), make_divisible(192 * width), make_divisible(256 * width)),
    )


VARIANTS = {name: scaled(float(name.removeprefix("v2-"))) for name in VARIANT_NAMES}


class SeparableAttention(nn.Module):
    """Attention with one query: N scores weigh the keys' sum, which gates the values. (B, d, P, N) -> (B, d, P, N).

    Its cost is linear in N. Each of the P places in a patch has scores of its own.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(d, 1, 1)
        self.key = nn.Conv2d(d, d, 1)
        self.value = nn.Conv2d(d, d, 1)
        self.proj = nn.Conv2d(d, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x).softmax(dim=-1)  # (B, 1, P, N)
        context = (self.key(x) * scores).sum(dim=-1, keepdim=True)  # (B, d, P, 1)
        return self.proj(F.relu(self.value(x)) * context)


class FeedForward(nn.Module):
    """1x1 convolution d -> 2d, SiLU, 1x1 convolution 2d -> d."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(d, 2 * d, 1)
        self.act = nn.SiLU()
        self.reduce = nn.Conv2d(2 * d, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.act(self.expand(x)))


def whole_norm(d: int) -> nn.GroupNorm:
    """One group: mean and variance of an image are over all of (d, P, N), not those of a token."""
    return nn.GroupNorm(1, d, eps=EPS)


class Encoder(nn.Module):
    """Pre-norm transformer layer: (B, d, P, N) -> (B, d, P, N)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1 = whole_norm(d)
        self.attention = SeparableAttention(d)
        self.norm2 = whole_norm(d)
        self.mlp = FeedForward(d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def unfold_patches(x: Tensor) -> Tensor:
    """Group the pixels that share a place inside their patch: (B, d, H, W) -> (B, d, P, N)."""
    b, d, h, w = x.shape
    nh, nw = h // PATCH, w // PATCH
    x = x.reshape(b * d, nh, PATCH, nw, PATCH).permute(0, 2, 4, 1, 3)  # (B*d, ph, pw, nh, nw): rank 5 works everywhere
    return x.reshape(b, d, PATCH * PATCH, nh * nw)  # (B, d, P, N)


def fold_patches(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo `unfold_patches`: (B, d, P, N) -> (B, d, H, W) with (H, W) = `size`."""
    (b, d), (h, w) = x.shape[:2], size
    x = x.reshape(b * d, PATCH, PATCH, h // PATCH, w // PATCH).permute(0, 3, 1, 4, 2)  # (B*d, nh, ph, nw, pw)
    return x.reshape(b, d, h, w)  # (B, d, H, W)


def make_even(x: Tensor) -> Tensor:
    """Resize a map whose sides the patch does not divide: (B, C, H, W) -> (B, C, H', W'), sides rounded up.

    Bilinear with aligned corners, and nothing resizes the map back: so do ml-cvnets and timm. transformers drops the
    last row and column instead.
    """
    h, w = x.shape[-2:]
    size = (math.ceil(h / PATCH) * PATCH, math.ceil(w / PATCH) * PATCH)
    return x if size == (h, w) else F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class MobileViTV2Block(nn.Module):
    """Depthwise convolution, then attention between patches. (B, C, H, W) -> (B, C, H', W'), sides made even.

    Unlike MobileViT's block it has no fusion with its input.
    """

    def __init__(self, c: int, d: int, *, depth: int) -> None:
        super().__init__()
        self.local = ConvNormAct(c, c, 3, groups=c)
        self.to_tokens = nn.Conv2d(c, d, 1, bias=False)
        self.encoders = nn.ModuleList(Encoder(d) for _ in range(depth))
        self.norm = whole_norm(d)
        self.from_tokens = ConvNormAct(d, c, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.to_tokens(self.local(make_even(x)))  # (B, d, H', W')
        h, w = y.shape[-2:]
        tokens = unfold_patches(y)  # (B, d, P, N)
        for encoder in self.encoders:
            tokens = encoder(tokens)
        return self.from_tokens(fold_patches(self.norm(tokens), (h, w)))  # (B, C, H', W')


class MobileViTV2(nn.Module):
    """The classifier: images (B, 3, H, W) -> logits (B, num_classes). H and W are at least 32."""

    def __init__(self, config: MobileViTV2Config) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvNormAct(3, config.stem, 3, stride=2)
        self.stages = nn.ModuleList(build_stages(config))
        self.classifier = nn.Linear(config.stages[-1], config.num_classes)
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
        x = self.forward_features(x)[-1]  # (B, C, H/32, W/32)
        return self.classifier(x.mean(dim=(2, 3)))  # (B, num_classes)


def build_stages(config: MobileViTV2Config) -> list[nn.Sequential]:
    c1, c2, *deep = config.stages
    stages = [
        nn.Sequential(InvertedResidual(config.stem, c1, expansion=EXPANSION)),
        nn.Sequential(
            InvertedResidual(c1, c2, expansion=EXPANSION, stride=2),
            InvertedResidual(c2, c2, expansion=EXPANSION),
        ),
    ]
    c_in = c2
    for c, d, depth in zip(deep, config.widths, DEPTHS, strict=True):
        down = InvertedResidual(c_in, c, expansion=EXPANSION, stride=2)
        stages.append(nn.Sequential(down, MobileViTV2Block(c, d, depth=depth)))
        c_in = c
    return stages


def init_weights(module: nn.Module) -> None:
    """He's normal for convolutions (fan out, of one group), normal(0.02) for the classifier, biases 0, identity norms.

    With the fan out of all groups, depthwise convolutions would shrink a map by the root of its channels each, until
    the eps of the norms after them decides.
    """
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels / module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def create_mobilevitv2(variant: str, *, num_classes: int = 1000) -> MobileViTV2:
    """Build `variant` ("v2-0.5" to "v2-2.0") with fresh weights from torch's global generator, in training mode."""
    return MobileViTV2(replace(VARIANTS[variant], num_classes=num_classes))
