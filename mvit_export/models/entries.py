"""Which entry of a file holds the weights: beside them lie epochs, optimizers and averages of the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mvit_export.errors import WeightsError

# Usual names, in the order in which they are looked for.
TRAINED = ("state_dict", "model_state_dict", "model")
AVERAGED = ("state_dict_ema", "model_ema", "ema_model_state_dict")
AVERAGE = re.compile(r"(?:^|[._-])(?:ema|swa|averaged?)(?:$|[._-])|EMA")  # in the names of averages of other scripts

DEEPEST = 16  # nobody's; but a dictionary may hold itself


@dataclass(frozen=True)
class Entry:
    """A state dict of a file. `ema` is None unless the file has averaged weights: whether these are they.

    `notes` say what was decided, a line each.
    """

    tensors: dict[str, Tensor]
    ema: bool | None = None
    notes: tuple[str, ...] = ()


def find_entry(content: Any, ema: bool | None = True, depth: int = 0) -> Entry:
    """The weights in what a pickle holds. Raises WeightsError if there are none, or several that nothing tells apart.

    `ema` says which to take where a file has the weights as trained and an average of them, as timm's files do: True is
    the average, as timm takes it, and False the others. None is for what version 0.1.0 has exported, which took the
    average only where there was nothing else. `depth` counts the dictionaries around it.
    """
    if depth > DEEPEST:
        raise WeightsError(f"weights inside more than {DEEPEST} dictionaries, expected a state dict: save it alone")
    if not isinstance(content, Mapping):
        raise WeightsError(f"holds a {type(content).__name__}, expected a state dict: save model.state_dict()")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    sets = {str(key): value for key, value in content.items() if holds_weights(value)}
    usual = any(name in sets for name in (*TRAINED, *AVERAGED))
    if sets and (usual or len(tensors) < max(map(len, sets.values()))):
        return find_inner(content, sets, ema, depth)
    if not tensors:
        found = ", ".join(f"{key} ({type(value).__name__})" for key, value in list(content.items())[:4]) or "no entries"
        raise WeightsError(f"a dict with {found}, expected tensors by name: save model.state_dict()")
    return Entry(tensors)


def holds_weights(value: Any) -> bool:
    """Whether a dictionary has weights in it, at any depth. Scores are single numbers, and an optimizer has groups."""
    waiting, seen = [value], set()  # a pickle's dictionaries may hold themselves, or one another many times
    while waiting:
        found = waiting.pop()
        if not isinstance(found, Mapping) or "param_groups" in found or id(found) in seen:
            continue
        seen.add(id(found))
        if any(isinstance(inner, Tensor) and inner.ndim > 0 for inner in found.values()):
            return True
        waiting += found.values()
    return False


def find_inner(content: Mapping[Any, Any], sets: Mapping[str, Any], ema: bool | None, depth: int) -> Entry:
    name, averaged = pick(list(sets), ema, usual=TRAINED)
    inner = find_entry(sets[name], ema, depth + 1)
    others = [other for other in sets if other != name]
    unnamed = [key for key, value in content.items() if key not in sets and AVERAGE.search(str(key)) and is_list(value)]
    notes = [describe(name, averaged, others)] if averaged is not None or others or name not in TRAINED else []
    notes += [f"{key} holds averaged weights without their names, which cannot be read" for key in unnamed]
    return Entry(inner.tensors, averaged if inner.ema is None else inner.ema, (*notes, *inner.notes))


def is_list(value: Any) -> bool:
    """Whether it is a list of tensors, or has one."""
    inner = value.values() if isinstance(value, Mapping) else [value]
    return any(isinstance(v, list | tuple) and any(isinstance(t, Tensor) for t in v) for v in inner)


def pick(names: Sequence[str], ema: bool | None, *, usual: Sequence[str]) -> tuple[str, bool | None]:
    """The set of weights to take by name, and whether it is the average: None if there is none among them.

    `usual` are names that need no telling apart, the first one first.
    """
    averaged = [name for name in names if AVERAGE.search(name) or name in AVERAGED]
    trained = [name for name in names if name not in averaged]
    if averaged and not trained and ema is False:
        only = ", ".join(averaged)
        raise WeightsError(f"only averaged weights are in it ({only}), --no-ema asks for the others; leave it out")
    chosen = averaged if averaged and (ema or not trained) else trained
    first = next((name for name in (*usual, *AVERAGED) if name in chosen), None)
    if first is None and len(chosen) > 1:
        named = ", ".join(chosen[:6])
        raise WeightsError(f"several networks are in it ({named}), expected one; save one of them alone")
    name = first if first is not None else chosen[0]
    return name, (name in averaged) if averaged else None


def describe(name: str, averaged: bool | None, others: Sequence[str]) -> str:
    """What is said to the user. `averaged` as in `pick`."""
    beside = f"; {', '.join(others[:6])} {'was' if len(others) == 1 else 'were'} left out" if others else ""
    if averaged is None:
        return f"the weights are those of {name} in the checkpoint{beside}"
    if averaged:
        return f"the weights are those of {name}, averaged during training{beside}{' (--no-ema)' if others else ''}"
    return f"the weights are those of {name} as trained, not averaged{beside}"
