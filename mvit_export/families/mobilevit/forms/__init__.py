"""The forms of a MobileViT: the same function with its sums in the order that suits a runtime best.

Every form keeps the paths of modules with weights, which recipes and `verify --locate` refer to. The row of a format
says which form is the default and which layout its name stands for; the documentation has the measurements.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mvit_export.artifact import Manifest
from mvit_export.errors import ArtifactError, ConversionError
from mvit_export.families.mobilevit.forms.algebra import (
    carry_biases,
    centre_stream,
    fold_norm_affine,
    move_value_bias,
    scale_queries,
)
from mvit_export.families.mobilevit.forms.blocks import OpenBlock, is_standard
from mvit_export.families.mobilevit.forms.channels import ChannelsBlock
from mvit_export.families.mobilevit.forms.channels_last import ChannelsLastBlock
from mvit_export.families.mobilevit.forms.cut_channels import cut_convs, cut_linears
from mvit_export.families.mobilevit.forms.flat import FlatBlock
from mvit_export.families.mobilevit.forms.flexible import make_flexible
from mvit_export.families.mobilevit.forms.patches import PatchesBlock
from mvit_export.families.mobilevit.forms.winograd import WinogradBlock
from mvit_export.families.mobilevit.network import MobileViTBlock
from mvit_export.formats.table import FORMATS
from mvit_export.models.fold import fold_batch_norms
from mvit_export.models.outputs import name_outputs

__all__ = ["count_blocks", "make_flexible", "take_form", "write_as"]  # used by families/forms.py

TOLERANCE = 1e-5  # of the largest output, as for parity in fp32; rounding alone causes 5e-7


@dataclass(frozen=True)
class Form:
    """Passes over each block's weights, in this order, then the layout: (block, whether the batch can be above 1)."""

    passes: tuple[Callable[[OpenBlock], None], ...]
    layout: Callable[[OpenBlock, bool], nn.Module]


Key = tuple[str, str]  # format, form
WITHOUT_AFFINE = (scale_queries, fold_norm_affine, move_value_bias)
CENTRED = (*WITHOUT_AFFINE, centre_stream)
FORMS: dict[str, Form] = {
    "channels": Form((*WITHOUT_AFFINE, partial(carry_biases, scale=0.5)), lambda block, _: ChannelsBlock(block)),
    "flat": Form((scale_queries,), lambda block, batched: FlatBlock(block, batched=batched)),
    "patches": Form((*CENTRED, cut_linears, cut_convs), lambda block, _: PatchesBlock(block)),
    "winograd": Form((*CENTRED, cut_linears), lambda block, _: WinogradBlock(block)),
    "channels-last": Form((*CENTRED, carry_biases), lambda block, _: ChannelsLastBlock(block)),
}


def find_form(key: Key) -> Form:
    """The form that a name refers to in a format."""
    format, form = key
    return FORMS[FORMATS[format].layout(form)]


def count_blocks(network: nn.Module) -> tuple[int, int]:
    """How many MobileViT blocks of a network can be rewritten, and how many there are."""
    blocks = [block for path, block in network.named_modules() if path and isinstance(block, MobileViTBlock)]
    return sum(map(is_standard, blocks)), len(blocks)


def take_form(
    network: nn.Module, key: Key, example: Tensor, *, batched: bool = True, names: Sequence[str] | None = None
) -> nn.Module | None:
    """A copy of a network, its BatchNorms folded, whose MobileViT blocks have this form; None if it has no such block.

    Blocks in which a part was replaced keep the form they have. `batched` is False if the batch is always 1.
    Both networks run once on `example`; `names` are those of the outputs, for error messages.
    Raises ConversionError if they differ.
    """
    blocks = [(path, block) for path, block in network.named_modules() if path and is_standard(block)]
    if not blocks:
        return None
    formed, chosen = copy.deepcopy(network), find_form(key)
    for path, block in blocks:
        opened = OpenBlock(block)
        for rewrite in chosen.passes:
            rewrite(opened)
        formed.set_submodule(path, chosen.layout(opened, batched))
    check_same(network, formed, example, form=key[1], names=names)
    return formed


@torch.no_grad()
def check_same(
    network: nn.Module, formed: nn.Module, example: Tensor, *, form: str, names: Sequence[str] | None = None
) -> None:
    """The network around the blocks may reach into them, which the blocks alone do not show.

    Where float32 says that they differ, float64 decides: what a form changes stays, what float32 rounds away does not.
    The outputs of a fresh network may be denormal (1e-43 with the initial weights of transformers), where the same
    network is off by 3e-2 of its scale from itself in float64, and each form by 1e-7 once both are in float64.
    """
    name, error = largest_change(network, formed, example, names)
    if error > TOLERANCE:
        with suppress(Exception):  # a network that takes float32 alone, and says so in any way
            wide, wide_formed = (copy.deepcopy(module).double() for module in (network, formed))
            name, error = largest_change(wide, wide_formed, example.double(), names)
    if error > TOLERANCE:
        raise ConversionError(
            f"form {form} changes the output {name!r} of this network by {error:.1e} of its scale, "
            f"expected at most {TOLERANCE:g}; pass --form plain"
        )


def largest_change(
    network: nn.Module, formed: nn.Module, example: Tensor, names: Sequence[str] | None
) -> tuple[str, float]:
    """The output that differs most between two networks, and by how much of its scale."""
    outputs = name_outputs(formed(example), names)
    errors = {
        name: difference(outputs[name], expected) if name in outputs else math.inf
        for name, expected in name_outputs(network(example), names).items()
    }
    return max(errors.items(), key=lambda item: item[1])


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value; infinite if shapes, or the places of NaN and Inf, differ."""
    finite = expected.isfinite()
    if found.shape != expected.shape or not torch.equal(finite, found.isfinite()):
        return math.inf
    if not finite.any():
        return 0.0
    scale, error = (float(values[finite].abs().max()) for values in (expected, found - expected))
    return error / scale if scale else (math.inf if error else 0.0)


def write_as(network: nn.Module, manifest: Manifest) -> nn.Module:
    """A network as stored in an artifact: its BatchNorms folded, its blocks in the manifest's form.

    Raises ArtifactError if this version does not know the form, or the network has no block to write in it.
    """
    key = (manifest.format, manifest.form)
    if manifest.target.row.layout(manifest.form) not in FORMS:
        raise ArtifactError(f"form {manifest.form} of {manifest.format} is not known to this version; export again")
    spec = manifest.inputs[0]
    b, c, h, w = (spec.shape[axis] or 1 for axis in ((0, 3, 1, 2) if spec.layout == "NHWC" else range(4)))
    example = torch.rand((b, c, h, w), generator=torch.Generator().manual_seed(0))
    folded, names = fold_batch_norms(network, example), manifest.output_names
    formed = take_form(folded, key, example, batched=spec.shape[0] != 1, names=names)
    if formed is None:
        raise ArtifactError(f"the manifest says form {manifest.form}, but the network has no block that has it")
    return formed
