"""The row of models made by a function in a user's Python file: `FILE.py:FACTORY`."""

from __future__ import annotations

import importlib.util
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvit_export.errors import ModelError, UsageError
from mvit_export.families.base import Family, Request
from mvit_export.families.modules import describe_module, read_weights
from mvit_export.models.loaded import LoadedModel, call_guarded, seeded

if TYPE_CHECKING:
    from torch import nn


def load(asked: Request) -> LoadedModel:
    source = str(asked.model)
    weights = read_weights(asked, asked.weights)
    with seeded(asked.seed):
        module = build_from_file(source, asked.pretrained)
    file, _, factory = source.rpartition(":")
    return describe_module(
        module, asked, name=factory, source=f"{Path(file).absolute()}:{factory}", weights=weights,
        trained=None,  # the factory may have loaded its own weights
        preprocessing=lambda module: getattr(module, "preprocessing", None),
    )  # fmt: skip


def build_from_file(source: str, pretrained: bool) -> nn.Module:
    """Import FILE.py like a script, with its folder on the path, and call FACTORY without arguments."""
    from torch import nn

    if pretrained:
        raise UsageError("--pretrained belongs to --variant and timm:NAME; let the factory load weights, or --weights")
    file, separator, name = source.rpartition(":")
    path = Path(file)
    if not separator or path.suffix != ".py":
        raise UsageError(f"--model is {source!r}, expected FILE.py:FACTORY or timm:NAME")
    if not path.is_file():
        raise ModelError(f"{path} does not exist, expected a Python file with a function {name}()")
    factory = _import_file(path).get(name)
    if not callable(factory):
        raise ModelError(f"{path} defines no function {name!r}, expected one that returns a torch.nn.Module")
    module = call_guarded(factory, f"{path}:{name}()")
    if not isinstance(module, nn.Module):
        raise ModelError(f"{path}:{name}() returned {type(module).__name__}, expected a torch.nn.Module")
    return module


def _import_file(path: Path) -> Mapping[str, Any]:
    name = f"_mvit_export_model_{zlib.crc32(os.fsencode(path.absolute())):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look classes up there
    sys.path.insert(0, str(path.parent.absolute()))
    try:
        call_guarded(lambda: spec.loader.exec_module(module), f"{path}")  # type: ignore[union-attr]
    finally:
        sys.path.remove(str(path.parent.absolute()))
    return vars(module)


def code_of(source: str) -> Path:
    return Path(source.rpartition(":")[0]).absolute()


PYTHON_FILE = Family(title="a Python file", owns=lambda source: True, load=load, repeatable=False, code=code_of)
