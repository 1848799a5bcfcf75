"""Which parts of a network lose bits, and how: recipes, in the same words for every format.

    name = "fast"

    [[rules]]                  # the first rule that matches a part decides; what matches none stays float
    kinds = ["linear"]
    modules = "stages.4.*"     # regex on the whole path of the PyTorch module; if left out: every module
    use = "static"

A rule names kinds of work, not a format's operators, so that one file can be tried in all formats; a converter refuses
a `use` that its format does not have for a kind, rather than doing something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvit_export.errors import UsageError, first_line, printable, reason_of
from mvit_export.system.reading import read_toml

# What costs time or bytes in a vision network.
KINDS = {
    "conv": "a dense convolution with a kernel above 1x1",
    "conv1x1": "a pointwise convolution",
    "depthwise": "a depthwise convolution",
    "linear": "a fully connected layer",
    "attention": "the two matrix products of attention, between activations",
    "softmax": "the softmax of attention",
    "norm": "LayerNorm and its like",
    "activation": "SiLU, ReLU, GELU and their like",
    "elementwise": "additions, multiplications and concatenations between modules",
}
WITH_WEIGHTS = ("conv", "conv1x1", "depthwise", "linear")
USES = {
    "float": "as it was",
    "weight": "weights of few bits, arithmetic in float",
    "dynamic": "int8 arithmetic, the range of activations found at each run",
    "static": "int8 arithmetic, the range of activations found by calibration",
}
NAMED = ("accurate", "fast", "small")


@dataclass(frozen=True)
class Rule:
    """What matches: one of `kinds`, in a module whose whole path matches `modules`."""

    use: str
    kinds: tuple[str, ...] = tuple(KINDS)
    modules: str = ".*"

    def __post_init__(self) -> None:
        if self.use not in USES:
            raise UsageError(f"a recipe's use is {self.use!r}, expected one of {', '.join(USES)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(f"a recipe's kind is {kind!r}, expected one of {', '.join(KINDS)}")
        try:
            re.compile(self.modules)
        except (re.error, OverflowError, RecursionError) as error:
            shown = printable(repr(self.modules))
            raise UsageError(f"a recipe's modules {shown} is not a regular expression: {first_line(error)}") from error

    def fits(self, kind: str, module: str) -> bool:
        return kind in self.kinds and re.fullmatch(self.modules, module) is not None


@dataclass(frozen=True)
class Recipe:
    """Rules in order; `note` says where they come from, such as what was measured."""

    name: str
    rules: tuple[Rule, ...]
    note: str = ""

    def use(self, kind: str, module: str) -> str:
        """One of USES for a part of the network; `module` is its PyTorch path, "" if none is known."""
        return next((rule.use for rule in self.rules if rule.fits(kind, module)), "float")

    @property
    def uses(self) -> frozenset[str]:
        return frozenset(rule.use for rule in self.rules)

    def before(self, *rules: Rule) -> Recipe:
        """The same recipe with rules that are tried first."""
        return Recipe(self.name, (*rules, *self.rules), self.note)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises UsageError if it is not one, naming what is wrong."""
    try:
        data = read_toml(path)
        return make_recipe({"name": path.stem, **data})
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--recipe {path} cannot be read: {reason_of(error)}") from error
    except (ValueError, UsageError, TypeError) as error:
        raise UsageError(f"--recipe {path} is not a recipe: {first_line(error)}") from error


def make_recipe(data: Mapping[str, Any]) -> Recipe:
    """A recipe from a mapping, as read from TOML or JSON. Raises UsageError."""
    unknown = data.keys() - {"name", "rules", "note"}
    rules = data.get("rules", ())
    if unknown or not isinstance(rules, (list, tuple)) or not rules:
        raise UsageError(f"found {', '.join(map(repr, data)) or 'nothing'}, expected name, note and [[rules]]")
    return Recipe(str(data["name"]), tuple(map(make_rule, rules)), str(data.get("note", "")))


def make_rule(data: Mapping[str, Any]) -> Rule:
    if not isinstance(data, Mapping):
        raise UsageError(f"a rule is {printable(repr(data))}, expected a table with use")
    unknown = data.keys() - set(Rule.__dataclass_fields__)
    if unknown or "use" not in data:
        raise UsageError(f"a rule has {', '.join(map(repr, data))}, expected use and, optionally, kinds and modules")
    fields = dict(data)
    if "kinds" in fields:
        fields["kinds"] = tuple(fields["kinds"])
    return Rule(**fields)


def write_toml(recipe: Recipe) -> str:
    """The text of a recipe file, which `read_recipe` reads back."""
    lines = [f"name = {quote(recipe.name)}", *([f"note = {quote(recipe.note)}"] if recipe.note else [])]
    for rule in recipe.rules:
        lines += ["", "[[rules]]"]
        if rule.kinds != tuple(KINDS):
            lines.append(f"kinds = [{', '.join(map(quote, rule.kinds))}]")
        if rule.modules != ".*":
            lines.append(f"modules = {quote(rule.modules)}")
        lines.append(f"use = {quote(rule.use)}")
    return "\n".join(lines) + "\n"


def quote(text: str) -> str:
    """A TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def everything(use: str, *, name: str, kinds: Sequence[str] = tuple(KINDS)) -> Recipe:
    return Recipe(name, (Rule(use, tuple(kinds)),))
