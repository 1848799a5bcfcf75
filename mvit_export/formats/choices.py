"""What users write, as values: one of several names, lists, sizes and shapes. Each error lists what is expected."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

from mvit_export.errors import UsageError


def choose(value: str, choices: Iterable[str], *, what: str) -> str:
    """`value` if it is one of `choices`, ignoring case; else an error with the list and the nearest match."""
    names = list(choices)
    by_fold = {name.casefold(): name for name in names}
    if value.casefold() in by_fold:
        return by_fold[value.casefold()]
    near = difflib.get_close_matches(value.casefold(), by_fold, n=1)
    hint = f"; did you mean {by_fold[near[0]]}?" if near else ""
    raise UsageError(f"{what} {value!r} is not known, expected one of {', '.join(names)}{hint}")


def split_list(values: str | Sequence[str]) -> tuple[str, ...]:
    """`"a,b"` or `["a", "b,c"]` -> names in order, without repeats."""
    parts = [values] if isinstance(values, str) else values
    return tuple(dict.fromkeys(name.strip() for part in parts for name in part.split(",") if name.strip()))


def parse_size(text: str) -> tuple[int, int]:
    """`"256"` or `"240x272"` (height x width) -> (height, width) in pixels."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--image-size is {text!r}, expected N or HxW in pixels, such as 256 or 240x320")
    return int(parts[0]), int(parts[-1])


def parse_shape(text: str) -> tuple[int, ...]:
    """`"1,3,224,224"` -> (1, 3, 224, 224)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--input-shape is {text!r}, expected positive numbers with commas, such as 1,3,224,224")
    return tuple(int(part) for part in parts)


def parse_three(text: str, option: str) -> tuple[float, float, float]:
    """`"0.485,0.456,0.406"` or one number for all three channels."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or not all(math.isfinite(value) for value in values):
        raise UsageError(f"{option} is {text!r}, expected one number or three with commas, such as 0.485,0.456,0.406")
    first, *others = values
    return (first, *others) if len(others) == 2 else (first, first, first)  # type: ignore[return-value]


def parse_ratio(text: str, option: str) -> float:
    """`"1/255"` or `"0.5"`."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{option} is {text!r}, expected a number or a fraction, such as 1/255") from None
