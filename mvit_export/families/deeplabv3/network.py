"""DeepLabV3 (Chen et al., arXiv 1706.05587) on any backbone that returns its maps: the head, and the whole segmenter.

Written for reading, like mobilevit/network.py. Letters in shape comments: B batch, C channels of the backbone's last
map, A channels of the pyramid, K classes, h and w height and width of that map, H and W those of the picture.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.families.deeplabv3.variants import COARSE, LABELS, OUTPUTS, SCORES
from mvit_export.families.mobilevit.network import EPS, init_weights

# Of the three dilated convolutions, by output stride: section 4.2 of the paper doubles them where the map is doubled.
RATES = {16: (6, 12, 18), 8: (12, 24, 36)}


@dataclass(frozen=True)
class HeadConfig:
    """What determines the head's parameters, and how its scores are resized."""

    channels: int = 256  # of every branch of the pyramid
    rates: tuple[int, ...] = RATES[16]
    num_classes: int = 21  # PASCAL VOC's, background first
    align_corners: bool = False  # of the upsampling; a matter of where the weights were trained

    def __post_init__(self) -> None:
        if len(self.rates) != 3 or min(self.rates) < 1:
            raise ValueError(f"rates are {self.rates}, expected three from 1 on")
        if min(self.channels, self.num_classes) < 1:
            raise ValueError(f"{self.channels} channels and {self.num_classes} classes, expected at least 1 each")


class ConvNormReLU(nn.Module):
    """Bias-free convolution that keeps the map's size, BatchNorm, ReLU: (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, kernel: int, *, dilation: int = 1) -> None:
        super().__init__()
        padding = (kernel - 1) // 2 * dilation
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=padding, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(c_out, eps=EPS, momentum=0.1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, three dilated 3x3 and the map's mean, (B, C, h, w) -> (B, A, h, w)."""

    def __init__(self, c_in: int, config: HeadConfig) -> None:
        super().__init__()
        a = config.channels
        dilated = [ConvNormReLU(c_in, a, 3, dilation=rate) for rate in config.rates]
        self.branches = nn.ModuleList([ConvNormReLU(c_in, a, 1), *dilated])
        self.pool = ConvNormReLU(c_in, a, 1)
        self.project = ConvNormReLU(5 * a, a, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.pool(x.mean(dim=(2, 3), keepdim=True))  # (B, A, 1, 1)
        # Bilinear resizing of a single pixel, as it is usually written, repeats it.
        maps = [*(branch(x) for branch in self.branches), mean.expand(-1, -1, *x.shape[-2:])]
        return self.project(torch.cat(maps, dim=1))  # (B, 5 * A, h, w) -> (B, A, h, w)


class Head(nn.Module):
    """The last map of a backbone -> scores of the classes before softmax, (B, C, h, w) -> (B, K, h, w)."""

    def __init__(self, c_in: int, config: HeadConfig) -> None:
        super().__init__()
        self.pyramid = Pyramid(c_in, config)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Conv2d(config.channels, config.num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.pyramid(x)))


class Upsample(nn.Module):
    """Bilinear, to the picture's size: (B, K, h, w) -> (B, K, H, W)."""

    def __init__(self, *, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners

    def forward(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(scores, size=size, mode="bilinear", align_corners=self.align_corners)


class Segmenter(nn.Module):
    """Pictures (B, 3, H, W) -> what `output` says, see variants.py.

    `backbone` returns a tuple of maps, of which the last, with `c_in` channels, is used.
    """

    def __init__(self, backbone: nn.Module, c_in: int, config: HeadConfig, *, output: str = SCORES) -> None:
        super().__init__()
        assert output in OUTPUTS
        self.config, self.output = config, output
        self.backbone = backbone
        self.head = Head(c_in, config)
        self.upsample = Upsample(align_corners=config.align_corners)

    def forward(self, x: Tensor) -> Tensor:
        coarse = self.head(self.backbone(x)[-1])  # (B, K, h, w)
        if self.output == COARSE:
            return coarse
        scores = self.upsample(coarse, x.shape[-2:])  # (B, K, H, W)
        return scores.argmax(dim=1).to(torch.int32) if self.output == LABELS else scores  # (B, H, W)

    def scored(self) -> Segmenter:
        """This network with the scores that its labels are chosen by; it shares the weights."""
        other = copy.copy(self)
        other.output = SCORES
        return other

    def init_weights(self) -> None:
        """The convolutions as the backbone's; the classifier's bias at zero."""
        self.apply(init_weights)
        assert self.head.classifier.bias is not None
        nn.init.zeros_(self.head.classifier.bias)
