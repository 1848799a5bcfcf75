"""Shared by families whose networks come from elsewhere: a module as it is, and any checkpoint that fits it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvit_export.artifact import ModelInfo, WeightsInfo
from mvit_export.data.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from mvit_export.families.base import Request
from mvit_export.models.hub import locate
from mvit_export.models.loaded import LoadedModel, call_guarded, count_parameters, state_digest

if TYPE_CHECKING:
    from torch import nn


def describe_module(
    module: nn.Module,
    asked: Request,
    *,
    name: str,
    source: str,
    weights: str | Path | None,
    trained: bool | None,
    preprocessing: Callable[[nn.Module], Any],
) -> LoadedModel:
    """A module with its weights loaded, and what an export records. `trained` applies if there are no `weights`."""
    module = call_guarded(lambda: module.eval().float(), f"{asked.model}, made float32,")
    origin = WeightsInfo(None, None, None, "", trained, asked.seed)
    if weights is not None:
        origin = load_weights_into(module, str(weights))
    digest = call_guarded(lambda: state_digest(module), f"{asked.model}, asked for its state,")
    found = preprocessing(module)
    info = ModelInfo(
        name=re.sub(r"\W+", "_", name), source=source, task="unknown", params=count_parameters(module), macs=0
    )
    origin = replace(origin, state_sha256=digest)
    known = found if isinstance(found, Preprocessing) else DEFAULT_PREPROCESSING
    return LoadedModel(module, info, origin, known, (), ())


def load_weights_into(module: nn.Module, weights: str) -> WeightsInfo:
    """Load a file, folder or hub model strictly into any module."""
    from mvit_export.models.checkpoints import find_weights
    from mvit_export.models.fit import load_strict

    path, name, revision = locate(weights)
    sha256 = load_strict(module, find_weights(path) if path.is_dir() else path)
    return WeightsInfo(name, "model", sha256, "", trained=True, seed=None, revision=revision)
