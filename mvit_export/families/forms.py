"""Networks whose blocks are rewritten, by the family that the blocks belong to.

The blocks decide, not the model's name: a user's own network may contain them too. A family's module has the four
functions below; for one family's networks they do what is described here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mvit_export.artifact import Manifest
from mvit_export.errors import ArtifactError
from mvit_export.families.table import FAMILIES

if TYPE_CHECKING:
    from torch import Tensor, nn


def writers() -> Iterator[Any]:
    """The modules of the families that know forms."""
    return (importlib.import_module(family.forms) for family in FAMILIES if family.forms)


def count_blocks(network: nn.Module) -> tuple[int, int]:
    """How many blocks of a network can be rewritten, and how many there are."""
    counts = [writer.count_blocks(network) for writer in writers()]
    return sum(standard for standard, _ in counts), sum(every for _, every in counts)


def take_form(
    network: nn.Module,
    key: tuple[str, str],
    example: Tensor,
    *,
    batched: bool = True,
    names: Sequence[str] | None = None,
) -> nn.Module | None:
    """A copy of a network whose blocks have this form, by `key` (format, form); None if it has no such block.

    `batched` is False if the batch is always 1. Both networks run once on `example`; `names` are those of the outputs,
    for error messages. Raises ConversionError if they differ.
    """
    for writer in writers():
        formed: nn.Module | None = writer.take_form(network, key, example, batched=batched, names=names)
        if formed is not None:
            return formed
    return None


def write_as(network: nn.Module, manifest: Manifest) -> nn.Module:
    """A network as stored in an artifact: its BatchNorms folded, its blocks in the manifest's form.

    Raises ArtifactError if this version does not know the form, or the network has no block to write in it.
    """
    for writer in writers():
        if writer.count_blocks(network)[1]:
            formed: nn.Module = writer.write_as(network, manifest)
            return formed
    raise ArtifactError(f"the manifest says form {manifest.form}, but the network has no block that has it")


def make_flexible(network: nn.Module, shapes: Sequence[tuple[int, ...]]) -> nn.Module:
    """A network that may be traced once for all input `shapes` (B, 3, H, W); see the families' own functions."""
    for writer in writers():
        network = writer.make_flexible(network, shapes)
    return network
