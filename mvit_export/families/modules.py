"""Shared by families whose networks come from elsewhere: a module as it is, and any checkpoint that fits it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvit_export.artifact import ModelInfo, WeightsInfo
from mvit_export.data.preprocessing import DEFAULT_PREPROCESSING, UNSTATED, Preprocessing
from mvit_export.families.base import Request
from mvit_export.models.loaded import LoadedModel, call_guarded, count_parameters, state_digest

if TYPE_CHECKING:
    from torch import nn

    from mvit_export.models.stored import StoredWeights

Notes = tuple[str, ...]


def read_weights(asked: Request, weights: str | Path | None) -> StoredWeights | None:
    """Read a file, folder or hub model; None if there is none. Raises WeightsError and HubError."""
    if weights is None:
        return None
    from mvit_export.models.stored import read_stored

    return read_stored(weights, ema=asked.ema)


def describe_module(
    module: nn.Module,
    asked: Request,
    *,
    name: str,
    source: str,
    weights: StoredWeights | None,
    trained: bool | None,
    preprocessing: Callable[[nn.Module], Any],
) -> LoadedModel:
    """A module with its weights loaded, and what an export records. `trained` applies if there are no `weights`."""
    module = call_guarded(lambda: module.eval().float(), f"{asked.model}, made float32,")
    origin, notes = WeightsInfo(None, None, None, "", trained, asked.seed), Notes()
    if weights is not None:
        origin, notes = load_weights_into(module, weights, asked.ema)
    digest = call_guarded(lambda: state_digest(module), f"{asked.model}, asked for its state,")
    found = preprocessing(module)
    info = ModelInfo(
        name=re.sub(r"\W+", "_", name), source=source, task="unknown", params=count_parameters(module), macs=0
    )
    origin = replace(origin, state_sha256=digest)
    known = found if isinstance(found, Preprocessing) else replace(DEFAULT_PREPROCESSING, source=UNSTATED)
    return LoadedModel(module, info, origin, known, (), (), notes)


def load_weights_into(module: nn.Module, weights: StoredWeights, ema: bool | None) -> tuple[WeightsInfo, Notes]:
    """Load weights strictly into any module."""
    from mvit_export.models.fit import load_into

    loaded = load_into(module, weights.checkpoint, weights.file, ema)
    origin = WeightsInfo(weights.name, "model", loaded.sha256, "", True, None, weights.revision, loaded.ema)
    return origin, loaded.notes
