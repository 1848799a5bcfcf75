"""A checkpoint as it lies somewhere: a file, a folder of transformers or timm, or a model on a hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mvit_export.models.checkpoints import Checkpoint, blame, find_weights, read_checkpoint
from mvit_export.models.hub import locate
from mvit_export.models.shards import INDEX, read_shards


@dataclass(frozen=True)
class StoredWeights:
    """A checkpoint as read from `file`, under the user's name for it, with the hub's commit.

    `folder` holds the settings beside the weights; None if the user named the file alone.
    """

    checkpoint: Checkpoint
    file: Path
    name: str
    revision: str | None
    folder: Path | None


def read_stored(source: str | Path, *, ema: bool | None = True) -> StoredWeights:
    """Read `source`: a file, a folder, `hf:ID[@REVISION]` or `timm:ID[@REVISION]`. Raises WeightsError and HubError.

    `ema` as in `find_entry`.
    """
    path, name, revision = locate(str(source))
    folder = path if path.is_dir() else None
    with blame(name):
        file = find_weights(path) if folder else path
    sharded = folder is not None and file.name.endswith(INDEX)
    checkpoint = read_shards(file) if sharded else read_checkpoint(file, ema=ema)
    return StoredWeights(checkpoint, file, name, revision, folder)
