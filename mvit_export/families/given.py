"""The row of modules that a Python program gives to `load_model` itself: they exist in its process alone."""

from __future__ import annotations

import copy
import uuid
import weakref
from typing import TYPE_CHECKING, Any

from mvit_export.errors import ModelError, UsageError
from mvit_export.families.base import Family, Request
from mvit_export.families.modules import describe_module, read_weights
from mvit_export.models.loaded import LoadedModel, call_guarded

if TYPE_CHECKING:
    from torch import nn

PREFIX = "module:"
_announced: dict[str, nn.Module] = {}  # by source, until they are loaded
_loaded: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()  # for as long as a model is used


def announce(module: Any) -> str:
    """A source for a copy of the module; the caller's own stays as it is. Raises UsageError for anything else."""
    import torch
    from torch import nn

    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError("a scripted or traced module cannot be exported; pass the nn.Module that it was made from")
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"model is a {type(module).__name__}, expected a torch.nn.Module, FILE.py:FACTORY or timm:NAME"
        )
    source = f"{PREFIX}{type(module).__name__}:{uuid.uuid4().hex[:12]}"  # of this object, whatever others are called
    _announced[source] = call_guarded(lambda: copy.deepcopy(module), f"{type(module).__name__}, copied,")
    return source


def load(asked: Request) -> LoadedModel:
    source = str(asked.model)
    new = _announced.pop(source, None)
    module = copy.deepcopy(find(source)) if new is None else new
    loaded = describe_module(
        module, asked, name=type(module).__name__, source=source, trained=None,
        weights=read_weights(asked, asked.weights),
        preprocessing=lambda module: getattr(module, "preprocessing", None),
    )  # fmt: skip
    if new is not None:
        _loaded[source] = loaded.module
    return loaded


def find(source: str) -> nn.Module:
    module = _loaded.get(source)
    if module is None:
        raise ModelError(
            f"the network {source} was given to load_model by a Python program, which alone has it; "
            "check with --against golden"
        )
    return module


GIVEN = Family(title="a Python program", owns=lambda source: source.startswith(PREFIX), load=load, repeatable=False)
