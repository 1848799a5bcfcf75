"""Between records and JSON: `Record` writes one, `Fields` reads what may be damaged or come from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from mvit_export.errors import printable

Interval = tuple[float, float]
T = TypeVar("T")
MOST = 1e15  # no measured value comes near it; it also stops NaN, infinities and endless integers


class Record:
    """A frozen dataclass whose fields are the keys of its JSON object, in their order."""

    def to_json(self) -> dict[str, Any]:
        return plain_fields(self)


def plain_fields(record: Any) -> dict[str, Any]:
    return {field.name: plain(getattr(record, field.name)) for field in fields(record)}


def plain(value: Any) -> Any:
    """A field as `json` writes it: records become objects, tuples lists."""
    if isinstance(value, Record):
        return value.to_json()
    if is_dataclass(value):
        return plain_fields(value)
    return [plain(item) for item in value] if isinstance(value, tuple) else value


class Fields:
    """A JSON object of unknown quality: every getter returns the requested type or raises ValueError naming the field.

    Null and an absent key are the same.
    """

    def __init__(self, data: Any, what: str) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{what} is {kind(data)}, expected an object")
        self.data = data

    def get(self, key: str) -> Any:
        return self.data.get(key)

    def sub(self, key: str) -> Fields | None:
        return None if self.get(key) is None else Fields(self.get(key), key)

    def items(self, key: str) -> list[Any]:
        value = [] if self.get(key) is None else self.get(key)
        if not isinstance(value, list):
            raise ValueError(f"{key} is {kind(value)}, expected a list")
        return value

    def record(self, key: str, read: Callable[[Fields], T]) -> T | None:
        sub = self.sub(key)
        return read(sub) if sub else None

    def records(self, key: str, read: Callable[[Fields], T], *, each: str | None = None) -> tuple[T, ...] | None:
        if self.get(key) is None:
            return None
        return tuple(read(Fields(item, each or f"an item of {key}")) for item in self.items(key))

    def optional_text(self, key: str) -> str | None:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{key} is {kind(value)}, expected text")
        return value

    def text(self, key: str) -> str:
        """Empty if there is none."""
        return self.optional_text(key) or ""

    def texts(self, key: str) -> tuple[str, ...]:
        return tuple(value if isinstance(value, str) else tidy(value) for value in self.items(key))

    def one_of(self, key: str, choices: Sequence[str]) -> str:
        if (value := self.text(key)) not in choices:
            raise ValueError(f"{key} is {tidy(value)!r}, expected {' or '.join(choices)}")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{key} is {kind(value)}, expected true or false")
        return value

    def optional_number(self, key: str, *, least: float = 0) -> float | None:
        return None if self.get(key) is None else number(self.get(key), key, least)

    def number(self, key: str, *, least: float = 0) -> float:
        return number(self.get(key), key, least)

    def count(self, key: str) -> int | None:
        value = self.optional_number(key)
        return None if value is None else int(value)

    def numbers(self, key: str, *, least: float = 0) -> tuple[float, ...]:
        return tuple(number(value, key, least) for value in self.items(key))

    def optional_interval(self, key: str, *, least: float = 0) -> Interval | None:
        return self.interval(key, least=least) if self.items(key) else None

    def interval(self, key: str, *, least: float = 0) -> Interval:
        values = self.numbers(key, least=least)
        if len(values) != 2 or sorted(values) != list(values):
            raise ValueError(f"{key} is not an interval")
        return values[0], values[1]


def number(value: Any, key: str, least: float) -> float:
    """A finite number of at least `least`, an int if written as one. A bool is refused, though Python accepts it."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{key} is {kind(value)}, expected a number")
    if not abs(value) <= MOST or value < least:
        raise ValueError(f"{key} is out of range, expected a number{' of at least 0' if least == 0 else ''}")
    return value


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def tidy(text: Any) -> str:
    """One line without control characters, whatever a file or a path holds."""
    return printable(" ".join(str(text).split()), 2000)
