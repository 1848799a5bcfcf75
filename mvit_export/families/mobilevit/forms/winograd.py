"""The patches form whose dense 3x3 convolutions are Winograd's F(2x2, 3x3), written as ops of the graph.

Four pixels of output need 16 products instead of 36 (Lavin and Gray, Fast Algorithms for Convolutional Neural
Networks, arXiv 1509.09308, section 4.1):

    Y = A^T [(G g G^T) * (B^T d B)] A        * is element by element, summed over the input's channels

for every 4x4 tile d of the padded input, 2 apart, and the 3x3 kernel g. The 16 products are linear layers over all
tiles. B^T d B is made of depthwise convolutions of stride 2, four over the rows and four of each over the columns: they
include the padding, whereas slices and sums of a padded map are a quarter more ops, and more copies.
The four outputs of a tile are the pixels of a 2x2 patch, so they already are tokens: unfold is one concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.families.mobilevit.forms.blocks import OpenBlock, channels_first, channels_last
from mvit_export.families.mobilevit.forms.cut_channels import cut_width
from mvit_export.families.mobilevit.forms.patches import PatchesBlock
from mvit_export.families.mobilevit.network import ConvNormAct

G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
B_T = ((1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.0, -1.0))


class WinogradBlock(PatchesBlock):
    """For a patch of 2x2 on a map with even sides; other blocks or maps are computed as in `PatchesBlock`."""

    def __init__(self, block: OpenBlock) -> None:
        super().__init__(block)
        if self.patch == 2:
            self.local_phases, self.fuse_phases = WinogradConv(block.local), WinogradConv(block.fuse)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        if self.patch != 2 or h % 2 or w % 2:
            return super().forward(x)
        nh, nw = h // 2, w // 2
        tokens = self.to_tokens(self.local_phases(x))  # (P*B, N, d)
        for encoder in self.encoders:
            tokens = encoder(tokens)
        y = channels_first(self.fold(self.from_tokens(self.norm(tokens)), nh, nw))  # (B, C, H, W)
        return channels_first(self.fold(self.fuse_phases(torch.cat((x, y), dim=1)), nh, nw))


class WinogradConv(nn.Module):
    """`ConvNormAct` of a 3x3 convolution: (B, C_in, H, W) -> (P*B, N, C_out), the patches of the result."""

    rows: Tensor
    columns: Tensor

    def __init__(self, layer: ConvNormAct) -> None:
        super().__init__()
        g = torch.tensor(G, dtype=torch.float64)
        weight, bias, self.act = layer.conv.weight.detach(), layer.conv.bias, layer.act
        kernel = torch.einsum("ia,ocab,jb->ijoc", g, weight.double(), g).to(weight.dtype)  # (4, 4, C_out, C_in)
        widths = cut_width(len(weight))
        biases = [None] * len(widths) if bias is None else bias.detach().split(widths)
        self.parts = nn.ModuleList(map(WinogradProducts, kernel.split(widths, dim=2), biases))
        taps = torch.tensor(B_T, dtype=weight.dtype)[:, None, None].expand(-1, weight.shape[1], -1, -1)
        self.register_buffer("rows", taps[..., None].contiguous())  # (4, C_in, 1, 4, 1)
        self.register_buffer("columns", taps[..., None, :].contiguous())  # (4, C_in, 1, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[2] * x.shape[3] // 4  # N
        tiles = [channels_last(tile).flatten(0, 2) for tile in self.transform(x)]  # 16 of (B*N, C_in)
        y = torch.cat([part(tiles) for part in self.parts], dim=-1)  # (P, B*N, C_out)
        return self.act(y.reshape(-1, count, y.shape[-1]))  # (P*B, N, C_out)

    def transform(self, x: Tensor) -> list[Tensor]:
        """B^T d B of all tiles, row by row: 16 of (B, C_in, nh, nw)."""
        c = x.shape[1]
        rows = [F.conv2d(x, taps, stride=(2, 1), padding=(1, 0), groups=c) for taps in self.rows]  # (B, C_in, nh, W)
        return [F.conv2d(y, taps, stride=(1, 2), padding=(0, 1), groups=c) for y in rows for taps in self.columns]


class WinogradProducts(nn.Module):
    """Some of a convolution's output channels: 16 of (B*N, C_in) -> (P, B*N, C)."""

    def __init__(self, kernel: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weights = nn.ParameterList(matrix.clone() for row in kernel for matrix in row)
        self.bias = None if bias is None else nn.Parameter(bias.clone())

    def forward(self, tiles: Sequence[Tensor]) -> Tensor:
        pairs = zip(tiles, self.weights, strict=True)
        # The product at (1, 1) is part of all four outputs, with a plus sign: the bias is added there.
        products = [F.linear(t, m, self.bias if i == 5 else None) for i, (t, m) in enumerate(pairs)]
        columns = [gather(products[4 * i : 4 * i + 4]) for i in range(4)]  # of each row of products
        (top_left, bottom_left), (top_right, bottom_right) = (gather([c[j] for c in columns]) for j in range(2))
        return torch.stack((top_left, top_right, bottom_left, bottom_right))


def gather(m: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A^T m: two outputs from four products."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]
