"""Weights in several files, as transformers writes large ones: an index says which file holds which tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mvit_export.errors import WeightsError
from mvit_export.models.checkpoints import Checkpoint, blame, read_checkpoint
from mvit_export.models.settings import read_json

MOST_SHARDS = 1000
INDEX = ".index.json"  # how the name of an index ends


def read_shards(index: Path) -> Checkpoint:
    """All tensors of the files that `index` names, which lie beside it; its sha256 is one over theirs.

    Raises WeightsError for a file that is missing, and for tensors that are not where the index says.
    """
    with blame(index.parent):
        where, names = weight_map(index), shard_names(index)
    tensors: dict[str, Tensor] = {}
    digests = hashlib.sha256()
    for name in names:
        shard = read_checkpoint(index.parent / name, ema=True)
        with blame(index.parent):
            check_place(shard, where, index, name)
        tensors.update(shard.tensors)
        digests.update(f"{name} {shard.sha256}\n".encode())
    return Checkpoint(tensors, digests.hexdigest())


def check_place(shard: Checkpoint, where: Mapping[str, str], index: Path, name: str) -> None:
    found, expected = set(shard.tensors), {key for key, file in where.items() if file == name}
    if found != expected:
        key = min(found ^ expected)
        raise WeightsError(f"{index.name} and {name} disagree on where {key} is: download both again")


def shard_names(index: Path) -> list[str]:
    """The files that an index names, sorted. Raises WeightsError for anything that is not the name of a file."""
    names = sorted(set(weight_map(index).values()))
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise WeightsError(f"{index.name} names {name!r}, expected files beside it")
    if not 0 < len(names) <= MOST_SHARDS:
        raise WeightsError(f"{index.name} names {len(names)} files, expected 1 to {MOST_SHARDS}")
    return names


def weight_map(index: Path) -> Mapping[str, str]:
    found = (read_json(index) or {}).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise WeightsError(f"{index.name} has no weight_map, expected the file of each tensor: download it again")
    return found
