"""The forms of a MobileViT: the same function, another order of the same sums, as a runtime likes it best.

Every form keeps the paths of modules with weights, which recipes and `verify --locate` speak of. Which form a format
takes by default stands in `formats.FORMATS`, with what it measured in the README.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mvit_export.artifact import Manifest
from mvit_export.converters.fold import fold_batch_norms
from mvit_export.converters.forms.algebra import (
    carry_biases,
    centre_stream,
    fold_norm_affine,
    move_value_bias,
    scale_queries,
)
from mvit_export.converters.forms.blocks import OpenBlock, is_standard
from mvit_export.converters.forms.channels import ChannelsBlock
from mvit_export.converters.forms.channels_last import ChannelsLastBlock
from mvit_export.converters.forms.flat import FlatBlock
from mvit_export.converters.forms.lanes import cut_lanes
from mvit_export.converters.forms.patches import PatchesBlock
from mvit_export.converters.forms.winograd import WinogradBlock
from mvit_export.errors import ConversionError
from mvit_export.models.load import name_outputs

TOLERANCE = 1e-5  # of the largest output, as parity has it in fp32; rounding alone gives 5e-7


@dataclass(frozen=True)
class Form:
    """Passes over each block's weights, in this order, then the layout: (block, whether the batch may not be 1)."""

    passes: tuple[Callable[[OpenBlock], None], ...]
    layout: Callable[[OpenBlock, bool], nn.Module]


Key = tuple[str, str]  # format, form
WITHOUT_AFFINE = (scale_queries, fold_norm_affine, move_value_bias)
CENTRED = (*WITHOUT_AFFINE, centre_stream)
FORMS: dict[Key, Form] = {
    ("coreml", "channels"): Form(
        (*WITHOUT_AFFINE, partial(carry_biases, scale=0.5)), lambda block, _: ChannelsBlock(block)
    ),
    ("onnx", "flat"): Form((scale_queries,), lambda block, batched: FlatBlock(block, batched=batched)),
    ("tflite", "patches"): Form((*CENTRED, cut_lanes), lambda block, _: PatchesBlock(block)),
    ("tflite", "winograd"): Form(CENTRED, lambda block, _: WinogradBlock(block)),
    ("tflite", "channels"): Form((*CENTRED, carry_biases), lambda block, _: ChannelsLastBlock(block)),
}


def take_form(network: nn.Module, key: Key, example: Tensor, *, batched: bool = True) -> nn.Module | None:
    """A copy of a network, its BatchNorms folded, whose MobileViT blocks have this form; None if it has no such block.

    Blocks in which somebody replaced a part keep the form they have. `batched` is False where the batch is always 1.
    Both networks run once on `example`. Raises ConversionError where they differ.
    """
    formed, chosen = copy.deepcopy(network), FORMS[key]
    blocks = [(path, block) for path, block in formed.named_modules() if path and is_standard(block)]
    for path, block in blocks:
        opened = OpenBlock(block)
        for rewrite in chosen.passes:
            rewrite(opened)
        formed.set_submodule(path, chosen.layout(opened, batched))
    if not blocks:
        return None
    check_same(network, formed, example, form=key[1])
    return formed


@torch.no_grad()
def check_same(network: nn.Module, formed: nn.Module, example: Tensor, *, form: str) -> None:
    """A network around the blocks may reach into them, which no look at the blocks alone can tell."""
    for name, expected in name_outputs(network(example)).items():
        found, scale = name_outputs(formed(example))[name], float(expected.abs().max())
        error = float((found - expected).abs().max()) / scale if found.shape == expected.shape else math.inf
        if not error <= TOLERANCE:
            raise ConversionError(
                f"form {form} changes the output {name!r} of this network by {error:.1e} of its scale, "
                f"expected at most {TOLERANCE:g}; pass --form plain"
            )


def write_as(network: nn.Module, manifest: Manifest) -> nn.Module:
    """A network as an artifact holds it: its BatchNorms folded, its blocks in the manifest's form."""
    spec = manifest.inputs[0]
    b, c, h, w = (spec.shape[axis] or 1 for axis in ((0, 3, 1, 2) if spec.layout == "NHWC" else range(4)))
    example = torch.rand((b, c, h, w), generator=torch.Generator().manual_seed(0))
    key, folded = (manifest.format, manifest.form), fold_batch_norms(network, example)
    formed = take_form(folded, key, example, batched=spec.shape[0] != 1)
    assert formed is not None, "the manifest names a form, so there was a block to write in it"
    return formed
