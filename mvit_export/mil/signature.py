"""What an op's function expects, read once from its annotations (see `ops/__init__.py` for the rules)."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from torch import Tensor

from mvit_export.mil.ops.control import State


@dataclass(frozen=True)
class Parameter:
    """What an op's function expects under one name."""

    kind: Literal["tensor", "tensors", "list", "scalar"]
    required: bool
    values: tuple[Any, ...] = ()  # the supported ones, if only some are


@functools.cache
def parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of an op's function, from its annotations."""
    hints = typing.get_type_hints(function)
    return {
        name: parameter(hints.get(name, Tensor), required=p.default is inspect.Parameter.empty)
        for name, p in inspect.signature(function).parameters.items()
    }


def parameter(hint: Any, *, required: bool) -> Parameter:
    options = [option for option in get_args(hint) if option is not type(None)]
    if type(None) in get_args(hint):
        hint = options[0]
    if hint in (Tensor, State):
        return Parameter("tensor", required)
    if get_origin(hint) is list:
        return Parameter("tensors" if get_args(hint) == (Tensor,) else "list", required)
    return Parameter("scalar", required, get_args(hint) if get_origin(hint) is Literal else ())


def to_python(value: Any, kind: str) -> Any:
    """A constant as the Python value that an op's function expects."""
    if not isinstance(value, Tensor):
        return value
    if kind == "scalar":
        return value.item()
    return value.tolist() if value.dim() else [value.item()]
