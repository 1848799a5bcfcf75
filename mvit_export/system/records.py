"""A frozen dataclass from a JSON object that may come from anyone: its annotations are the rules."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

MOST = 2**64  # a seed may have so many bits
NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}
NAMES[type(None)] = "null"


def build(cls: type, data: Any, what: str) -> Any:
    """The record of type `cls`; unknown fields are ignored, so that newer minor additions load.

    A field of another record type is read by its `from_json`, if it has one. `what` is the path so far.
    Raises ValueError that names the field, such as `model.params`, what was found and what is expected.
    """
    assert is_dataclass(cls)
    if not isinstance(data, Mapping):
        raise ValueError(f"{what or 'it'} is {kind(data)}, expected an object")
    hints = get_type_hints(cls)
    for field in fields(cls):
        if field.name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{below(what, field.name)} is missing")
    found = [field.name for field in fields(cls) if field.name in data]
    return cls(**{name: convert(data[name], hints[name], below(what, name)) for name in found})


def below(what: str, name: str) -> str:
    return f"{what}.{name}" if what else name


def convert(value: Any, hint: Any, what: str) -> Any:
    """`value` as an annotation says, lists as tuples. Raises ValueError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):  # X | None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else convert(value, inner, what)
    if origin is tuple:
        return convert_tuple(value, arguments, what)
    if is_dataclass(hint):
        read = getattr(hint, "from_json", None)
        if not isinstance(value, Mapping):
            raise ValueError(f"{what} is {kind(value)}, expected an object")
        return read(value) if read else build(hint, value, what)  # type: ignore[arg-type]
    if origin is not None:  # Mapping[str, X]
        if not isinstance(value, Mapping):
            raise ValueError(f"{what} is {kind(value)}, expected an object")
        return {str(key): convert(inner, arguments[1], f"{what}.{key}") for key, inner in value.items()}
    right = isinstance(value, (int, float)) if hint is float else isinstance(value, hint)
    if not right or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{what} is {kind(value)}, expected {NAMES[hint]}")
    if hint in (int, float) and not (abs(value) <= MOST):  # NaN is not
        raise ValueError(f"{what} is out of range")
    return value


def convert_tuple(value: Any, arguments: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{what} is {kind(value)}, expected a list")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise ValueError(f"{what} has {len(value)} entries, expected {len(arguments)}")
    return tuple(convert(v, hint, f"{what}[{i}]") for i, (v, hint) in enumerate(zip(value, arguments, strict=True)))


def kind(value: Any) -> str:
    return NAMES.get(type(value), type(value).__name__)
