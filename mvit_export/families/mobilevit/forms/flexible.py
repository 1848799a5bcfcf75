"""A MobileViT that is correct at several image sizes after one trace, for Core ML's enumerated shapes.

The reference network resizes a map `if` the patch does not divide it, and back after the transformer. A trace keeps
the branch of its own example and is wrong, or fails, at another size. Here nothing depends on a branch: bilinear
interpolation is linear and acts on each axis separately, so resizing a map x of (n_h, n_w) pixels to (m_h, m_w) is

    A[n_h -> m_h] x A[n_w -> m_w]^T,    A[n -> m][i, j] = max(0, 1 - |s_i - j|)
                                        s_i = clamp((i + 1/2) n / m - 1/2, 0, n - 1)

where A is the identity if m = n. The sizes are known, so A is not computed in the graph, which fp16 would spoil, but is
a table of constants, computed in float64 by the interpolation itself; the map's size picks the matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_export.families.mobilevit.network import MobileViTBlock

Size = tuple[int, int]  # height, width; in a trace both are integers that depend on the input


def make_flexible(module: nn.Module, shapes: Sequence[tuple[int, ...]]) -> nn.Module:
    """A copy of `module` whose MobileViT blocks may be traced once for all input `shapes` (B, 3, H, W).

    Other modules stay as they are: one that branches on a size freezes the branch, which parity then detects.
    """
    flexible = copy.deepcopy(module)
    for name, sizes in map_sizes(module, shapes).items():
        parent, _, last = name.rpartition(".")
        block = flexible.get_submodule(name)
        assert isinstance(block, MobileViTBlock)
        setattr(flexible.get_submodule(parent), last, FlexibleBlock(block, sizes))
    return flexible


@torch.no_grad()
def map_sizes(module: nn.Module, shapes: Sequence[tuple[int, ...]]) -> dict[str, set[Size]]:
    """The (H, W) that each MobileViT block sees, by the block's path, found by running every shape."""
    sizes: dict[str, set[Size]] = {n: set() for n, m in module.named_modules() if isinstance(m, MobileViTBlock)}
    hooks = []
    for name, seen in sizes.items():

        def note(_: nn.Module, inputs: tuple[Tensor], seen: set[Size] = seen) -> None:
            seen.add((inputs[0].shape[2], inputs[0].shape[3]))

        hooks.append(module.get_submodule(name).register_forward_pre_hook(note))
    for shape in shapes if sizes else ():
        module(torch.zeros(shape))
    for hook in hooks:
        hook.remove()
    return sizes


class FlexibleBlock(nn.Module):
    """`MobileViTBlock` without a branch, around the same layers under the same names. Keeps (B, C, H, W).

    `sizes` are the (H, W) that will occur. If the patch divides them all, nothing is resized.
    """

    def __init__(self, block: MobileViTBlock, sizes: set[Size]) -> None:
        super().__init__()
        self.patch = block.patch
        self.local, self.to_tokens = block.local, block.to_tokens
        self.encoders, self.norm = block.encoders, block.norm
        self.from_tokens, self.fuse = block.from_tokens, block.fuse
        sides = sorted({side for size in sizes for side in size})
        self.whole = all(side % self.patch == 0 for side in sides)
        self.square = all(h == w for h, w in sizes)
        pairs = {side: (side, round_up(side, self.patch)) for side in sides}
        self.up, self.down = Resize(pairs), Resize({side: (m, n) for side, (n, m) in pairs.items()})

    def forward(self, x: Tensor) -> Tensor:
        y = self.to_tokens(self.local(x))  # (B, d, H, W)
        h, w = y.shape[-2:]
        if self.square:
            h = w  # so that both axes share one matrix: coremltools merges equal operators
        size = (h, w)
        whole = size if self.whole else (round_up(h, self.patch), round_up(w, self.patch))  # (H', W')
        y = y if self.whole else self.up(y, size, size, whole)  # (B, d, H', W')
        tokens = unfold_patches(y, self.patch, whole[1])  # (B*P, N, d)
        for encoder in self.encoders:
            tokens = encoder(tokens)
        y = fold_patches(self.norm(tokens), self.patch, y.shape[0], whole[1])  # (B, d, H', W')
        y = self.from_tokens(y if self.whole else self.down(y, size, whole, size))  # (B, C, H, W)
        return self.fuse(torch.cat((x, y), dim=1))  # residual first


class Resize(nn.Module):
    """Bilinear, without aligned corners, from one known size to another. `pairs[key]` is (n, m), from n to m pixels."""

    table: Tensor
    row: Tensor

    def __init__(self, pairs: Mapping[int, tuple[int, int]]) -> None:
        super().__init__()
        most_n, most_m = (max(sides) for sides in zip(*pairs.values(), strict=True))
        table = torch.zeros(len(pairs), most_m, most_n)  # (K, M, N); of entry k only the first (m, n) are used
        row = torch.zeros(max(pairs) + 1, dtype=torch.int32)  # key -> k
        for k, (key, (n, m)) in enumerate(pairs.items()):
            table[k, :m, :n] = interpolation(n, m)
            row[key] = k
        self.register_buffer("table", table)
        self.register_buffer("row", row)

    def forward(self, x: Tensor, key: Size, old: Size, new: Size) -> Tensor:
        """(B, C, n_h, n_w) -> (B, C, m_h, m_w), with (n_h, n_w) = `old`, (m_h, m_w) = `new`."""
        rows, columns = (self.matrix(*axis) for axis in zip(key, old, new, strict=True))
        return rows @ x @ columns.transpose(1, 2)

    def matrix(self, key: int, n: int, m: int) -> Tensor:
        """A[n -> m] of the module's docstring: (1, m, n)."""
        return self.table.index_select(0, self.row[key : key + 1])[:, :m, :n]


def interpolation(n: int, m: int) -> Tensor:
    """A[n -> m], from what the interpolation does to each unit vector: (m, n) in float64."""
    units = torch.eye(n, dtype=torch.float64)[None]  # (1, n vectors, n pixels)
    return F.interpolate(units, size=m, mode="linear", align_corners=False)[0].T


def round_up(side: int, patch: int) -> int:
    """The next multiple of `patch`. Not by `//` or math.ceil: a trace freezes one and makes the other a float."""
    return side + patch - 1 - (side + patch - 1) % patch


def unfold_patches(x: Tensor, patch: int, width: int) -> Tensor:
    """The reference's regrouping (B, d, H, W) -> (B * P, N, d), using only W = `width` of the size; rank at most 5."""
    b, d = x.shape[:2]
    x = x.reshape(b * d, -1, patch, width).transpose(1, 2)  # (B*d, ph, nh, W)
    x = x.reshape(b, d, patch, -1, patch).permute(0, 2, 4, 3, 1)  # (B, ph, pw, N, d): a row is nw patches of pw
    return x.reshape(b * patch * patch, -1, d)  # (B*P, N, d)


def fold_patches(x: Tensor, patch: int, batch: int, width: int) -> Tensor:
    """Undo `unfold_patches`: (B * P, N, d) -> (B, d, H, W) with B = `batch` and W = `width`."""
    d = x.shape[-1]
    x = x.reshape(batch, patch, patch, -1, d).permute(0, 4, 1, 3, 2)  # (B, d, ph, N, pw)
    x = x.reshape(batch * d, patch, -1, width).transpose(1, 2)  # (B*d, nh, ph, W)
    return x.reshape(batch, d, -1, width)  # (B, d, H, W)
