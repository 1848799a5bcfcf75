"""Our own safetensors files: a network's weights with all that belongs to them in the metadata."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from mvit_export.data.preprocessing import Preprocessing
from mvit_export.errors import UsageError, WeightsError
from mvit_export.system.files import write_whole

OURS = "mvit-export"  # our source, and the key of our JSON in a safetensors file's metadata


def save_weights(
    model: nn.Module,
    path: str | Path,
    *,
    preprocessing: Preprocessing,
    variant: str | None = None,
    labels: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write our own safetensors file, whole or not at all, with everything that loading it needs in its metadata.

    `model` is a MobileViT; `variant`, if given, must be what it is. `dtype` is that of the stored
    floats. Raises WeightsError.
    """
    path, config = Path(path), getattr(model, "config", None)
    actual: str | None = getattr(config, "variant", None)
    if config is None or actual is None:
        raise WeightsError(f"{path}: the model is a {type(model).__name__}, expected a MobileViT")
    if variant not in (None, actual):
        raise WeightsError(f"{path}: the model is variant {actual}, asked to be saved as {variant}")
    if labels is not None and len(labels) != config.num_classes:
        raise WeightsError(f"{path}: {len(labels)} labels, expected {config.num_classes}, one for each class")
    state = {k: v.detach().cpu().to(dtype if v.is_floating_point() else v.dtype) for k, v in model.state_dict().items()}
    bad = next((key for key, tensor in state.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise WeightsError(f"{path}: {bad} has NaN or Inf as {dtype}, expected finite weights; nothing was written")
    data = {
        "format": 1,
        "config": asdict(config),
        "preprocessing": preprocessing.to_json(),
        "labels": None if labels is None else list(labels),
    }
    metadata = {OURS: json.dumps(data), "format": "pt"}
    try:
        content = safetensors.torch.save({k: v.contiguous() for k, v in state.items()}, metadata)
        write_whole(path, with_sorted_header(content))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written ({error.strerror or error}): check the folder") from error


def with_sorted_header(content: bytes) -> bytes:
    """The same safetensors file with its metadata in order: the library's own order changes from call to call."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def read_own(text: str, kind: Any) -> tuple[Any, Preprocessing, tuple[str, ...] | None]:
    """Read back what `save_weights` wrote: the config, of the dataclass `kind`, the preprocessing and the labels."""
    try:
        data = json.loads(text)
        values = {f.name: data["config"][f.name] for f in fields(kind)}
        config = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        preprocessing = Preprocessing.from_json(data["preprocessing"])
        labels = None if data.get("labels") is None else tuple(map(str, data["labels"]))
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise WeightsError(f"its {OURS} metadata is damaged ({error}), expected what save_weights writes") from error
    return config, preprocessing, labels
