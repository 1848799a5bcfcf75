"""The patches form whose dense 3x3 convolutions are Winograd's F(2x2, 3x3), written as ops of the graph.

Four pixels of output take 16 products in place of 36 (Lavin and Gray, Fast Algorithms for Convolutional Neural
Networks, arXiv 1509.09308, section 4.1):

    Y = A^T [(G g G^T) * (B^T d B)] A        * is element by element, summed over the input's channels

for every 4x4 tile d of the padded input, 2 apart, and the 3x3 kernel g. The 16 products are linear layers over all
tiles.
The four outputs of a tile are the pixels of a 2x2 patch, so they are tokens already: unfold is one concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.converters.forms.blocks import OpenBlock
from mvit_export.converters.forms.patches import PatchesBlock
from mvit_export.models.mobilevit import ConvNormAct

G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


class WinogradBlock(PatchesBlock):
    """For a patch of 2x2 on a map of even sides; another block or map computes as `PatchesBlock` does."""

    def __init__(self, block: OpenBlock) -> None:
        super().__init__(block)
        if self.patch == 2:
            self.local_phases, self.fuse_phases = WinogradConv(block.local), WinogradConv(block.fuse)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        if self.patch != 2 or h % 2 or w % 2:
            return super().forward(x)
        nh, nw = h // 2, w // 2
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        tokens = self.to_tokens(self.local_phases(x))  # (P*B, N, d)
        for encoder in self.encoders:
            tokens = encoder(tokens)
        y = self.fold(self.from_tokens(self.norm(tokens)), nh, nw)  # (B, H, W, C)
        y = self.fold(self.fuse_phases(torch.cat((x, y), dim=-1)), nh, nw)
        return y.permute(0, 3, 1, 2)  # (B, C, H, W)


class WinogradConv(nn.Module):
    """`ConvNormAct` of a 3x3 convolution: (B, H, W, C_in) -> (P*B, N, C_out), the patches of the result."""

    def __init__(self, layer: ConvNormAct) -> None:
        super().__init__()
        g = torch.tensor(G, dtype=torch.float64)
        kernel = torch.einsum("ia,ocab,jb->ijoc", g, layer.conv.weight.detach().double(), g)  # (4, 4, C_out, C_in)
        self.weights = nn.ParameterList(matrix.to(layer.conv.weight.dtype) for row in kernel for matrix in row)
        self.bias, self.act = layer.conv.bias, layer.act

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1] * x.shape[2] // 4  # N
        tiles = [tile.flatten(0, 2) for rows in transform_rows(x) for tile in transform_columns(rows)]  # (B*N, C_in)
        pairs = zip(tiles, self.weights, strict=True)
        # The product at (1, 1) is part of all four outputs, with a plus: the bias is added there.
        products = [F.linear(t, m, self.bias if i == 5 else None) for i, (t, m) in enumerate(pairs)]
        columns = [gather(products[4 * i : 4 * i + 4]) for i in range(4)]  # of each row of products
        (top_left, bottom_left), (top_right, bottom_right) = (gather([c[j] for c in columns]) for j in range(2))
        y = torch.stack((top_left, top_right, bottom_left, bottom_right))  # (P, B*N, C_out)
        return self.act(y.reshape(-1, count, y.shape[-1]))  # (P*B, N, C_out)


def transform_rows(x: Tensor) -> tuple[Tensor, ...]:
    """B^T d, over the rows of all tiles at once: (B, H, W, C) -> 4 of (B, nh, W + 2, C)."""
    b, h, w, c = x.shape
    pairs = F.pad(x, (0, 0, 1, 1, 1, 1)).reshape(b, h // 2 + 1, 2, w + 2, c)  # (B, nh + 1, 2, W + 2, C)
    return transform(pairs[:, :-1, 0], pairs[:, :-1, 1], pairs[:, 1:, 0], pairs[:, 1:, 1])


def transform_columns(x: Tensor) -> tuple[Tensor, ...]:
    """d B, over the columns: (B, nh, W + 2, C) -> 4 of (B, nh, nw, C)."""
    b, nh, w, c = x.shape
    pairs = x.reshape(b, nh, w // 2, 2, c)  # (B, nh, nw + 1, 2, C)
    return transform(pairs[:, :, :-1, 0], pairs[:, :, :-1, 1], pairs[:, :, 1:, 0], pairs[:, :, 1:, 1])


def transform(d0: Tensor, d1: Tensor, d2: Tensor, d3: Tensor) -> tuple[Tensor, ...]:
    return d0 - d2, d1 + d2, d2 - d1, d1 - d3


def gather(m: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A^T m: two outputs of four products."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]
