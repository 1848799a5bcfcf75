"""What a family of networks is made of. A row holds data and functions; torch is imported when they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mvit_export.artifact import ModelInfo
from mvit_export.models.loaded import LoadedModel

if TYPE_CHECKING:
    from mvit_export.models.stored import StoredWeights


@dataclass(frozen=True)
class Request:
    """The model that a user asks for: a `variant` of a family, a `model` by its source, or what `weights` contains.

    `options` are the family's own, by name, those that were given. `ema` says which set to read where a checkpoint has
    the weights as trained and an average of them, see `find_entry`. `stored` is what lies at `weights`, if it was read.
    """

    variant: str | None = None
    model: str | None = None
    weights: str | Path | None = None
    pretrained: bool = False
    num_classes: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    ema: bool | None = True
    stored: StoredWeights | None = None


@dataclass(frozen=True)
class FamilyOption:
    """A setting that only one family has: its name in messages, and its values."""

    title: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One row of `FAMILIES`: how its networks are named, built and rebuilt.

    `owns` decides by `ModelInfo.source` whether a model is of this family. `load` returns the module, its weights and
    preprocessing; input shapes and output names are filled in afterwards.
    """

    title: str
    owns: Callable[[str], bool]
    load: Callable[[Request], LoadedModel]
    variants: tuple[str, ...] = ()  # empty: its models are named by `--model`
    counts_classes: bool = False  # whether its networks are built for a number of classes that the user names
    options: Mapping[str, FamilyOption] = field(default_factory=dict)
    smallest_image: int = 1  # pixels of a side
    # Whether another process builds the same model from its name and weights: a user's file may set globals, read the
    # environment or define classes anywhere, which we must not repeat.
    repeatable: bool = True
    prepare: Callable[[], object] | None = None  # what another process must call before it can be sent a network
    claims: Callable[[StoredWeights], bool] = lambda stored: False  # a checkpoint whose model nobody named
    forms: str | None = None  # the module that rewrites its blocks, see families/forms.py
    code: Callable[[str], Path] | None = None  # the user's file that a source runs; None if it runs only installed code

    def settings_of(self, info: ModelInfo) -> dict[str, str]:
        """The options that a model was built with."""
        return {name: info.settings[name] for name in self.options if info.settings.get(name) is not None}
