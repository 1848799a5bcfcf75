"""What a user asked for, as targets: one file each, refused before any work if impossible."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mvit_export.errors import MissingDependencyError, UsageError
from mvit_export.formats.base import Format, Option, Precision
from mvit_export.formats.choices import choose, split_list
from mvit_export.formats.recipes import NAMED, Recipe, read_recipe
from mvit_export.formats.table import FORMATS, FULL, WITH_RECIPE

DEFAULT_RECIPE = "accurate"
INPUT_KINDS = ("tensor", "image")


@dataclass(frozen=True)
class Target:
    """One file to make: a format in a precision, with the options of that format."""

    format: str
    precision: str
    input: str = "tensor"
    opset: int | None = None  # ONNX only
    dynamic_batch: bool = False  # ONNX only
    ort: bool = False  # ONNX only: as ONNX Runtime's own file
    deployment_target: str | None = None  # Core ML only
    recipe: str | None = None  # its name, if the precision uses one
    form: str | None = None  # the requested one, if any; the manifest says which was used

    @property
    def row(self) -> Format:
        """All that is known about the format."""
        return FORMATS[self.format]

    @property
    def precision_row(self) -> Precision:
        """All that is known about the precision in this format."""
        return self.row.precisions[self.precision]

    @property
    def taken(self) -> list[Option]:
        """The options of the format that this target uses."""
        return [option for name, option in self.row.options.items() if getattr(self, name)]

    @property
    def name(self) -> str:
        """The artifact's directory name, e.g. `coreml-fp16`, `tflite-int8-fast`, `onnx-fp32-plain-ort`."""
        recipe = f"-{self.recipe}" if self.recipe not in (None, DEFAULT_RECIPE) else ""
        form = f"-{self.form}" if self.form not in (None, self.default_form) else ""
        return f"{self.format}-{self.precision}{recipe}{form}{''.join(option.tag for option in self.taken)}"

    @property
    def suffix(self) -> str:
        """The suffix of the model's file name."""
        return next((option.suffix for option in self.taken if option.suffix), self.row.suffix)

    @property
    def packages(self) -> Mapping[str, str]:
        """distribution: module of what writing needs."""
        packages = dict(self.row.packages)
        for option in self.taken:
            packages |= option.packages
        return packages

    @property
    def default_form(self) -> str:
        """The form of a MobileViT if none was requested."""
        return self.row.forms[0] if self.precision_row.full else self.row.few_bits_form


def plan_targets(
    to: str | Sequence[str],
    *,
    precision: str | Sequence[str] | None = None,
    input: str = "tensor",
    opset: int | None = None,
    dynamic_batch: bool = False,
    ort: bool = False,
    deployment_target: str | None = None,
    recipe: str | None = None,
    form: str | None = None,
) -> tuple[Target, ...]:
    """Turn what a user asked for into targets, refusing every impossible combination before any work.

    `precision` None means each format's default. Options of one format are refused when it is not among the targets.
    """
    formats = choose_formats(to)
    given = {"opset": opset, "dynamic_batch": dynamic_batch, "ort": ort, "deployment_target": deployment_target}
    check_format_options(formats, given)
    input = choose(input, INPUT_KINDS, what="input kind")
    if recipe is not None and not set(split_list(precision or ())) & set(WITH_RECIPE):
        raise UsageError(f"--recipe is for --precision {', '.join(WITH_RECIPE)}; the others have one way each")
    targets = []
    for fmt in formats:
        wanted = split_list(precision) if precision else list(fmt.precisions)[:1]
        for name in wanted:
            p = fmt.precisions[choose(name, fmt.precisions, what=f"{fmt.title} precision")]
            chosen = None if form is None else choose_form(form, fmt, p)
            options = {key: option.choose(given[key], p, chosen) for key, option in fmt.options.items()}
            named = (recipe or DEFAULT_RECIPE) if p.with_recipe else None
            targets.append(Target(fmt.name, p.name, input, recipe=named, form=chosen, **options))
    return tuple(targets)


def choose_formats(to: str | Sequence[str]) -> list[Format]:
    """The rows of the named formats, or of all."""
    names = split_list(to)
    if "all" in names:
        names = tuple(FORMATS)
    formats = [FORMATS[choose(name, [*FORMATS, "all"], what="format")] for name in names]
    if not formats:
        raise UsageError(f"--to names no format, expected one or more of {', '.join(FORMATS)}, or all")
    return formats


def check_installed(targets: Iterable[Target]) -> None:
    """Refuse targets whose packages are absent, naming the command that installs them. Imports nothing."""
    for target in targets:
        for distribution, module in target.packages.items():
            if importlib.util.find_spec(module) is None:
                raise MissingDependencyError(
                    f"{distribution} is not installed, needed to write {target.row.title} files: "
                    f"pip install 'mvit-export[{target.format}]'"
                )


def check_format_options(formats: Sequence[Format], given: Mapping[str, object]) -> None:
    """Refuse an option that none of the chosen formats has, naming the formats that do."""
    for option, value in given.items():
        takers = [f.name for f in FORMATS.values() if option in f.options]
        if value not in (None, False) and not any(option in f.options for f in formats):
            flag = "--" + option.replace("_", "-")
            chosen = ", ".join(f.name for f in formats)
            raise UsageError(f"{flag} does not apply to {chosen}; only {', '.join(takers)} takes it")


def check_size_count(targets: Iterable[Target], count: int) -> None:
    """Refuse more image sizes than one of the formats can hold in a file, naming the formats that can."""
    for fmt in dict.fromkeys(target.row for target in targets):
        if count > fmt.max_sizes:
            most = "one --image-size" if fmt.max_sizes == 1 else f"at most {fmt.max_sizes} image sizes"
            takers = [f.name for f in FORMATS.values() if f.max_sizes >= count]
            hint = f"; {', '.join(takers)} takes several" if takers else ""
            raise UsageError(f"{fmt.title} takes {most}, {count} given{hint}")


def choose_form(asked: str, fmt: Format, precision: Precision) -> str:
    """The requested form. Refuses one that the format does not have, or that was not tried with fewer bits."""
    form = choose(asked, fmt.forms, what=f"{fmt.title} form")
    if not precision.full:
        names = " and ".join(FULL)
        raise UsageError(f"--form is for {names}, not for {precision.name}, whose form is fixed; leave it out")
    return form


def recipe_name(recipe: str | Path) -> str:
    """The name of a recipe that the user gave: one of NAMED, or a file's own."""
    path = Path(recipe)
    return read_recipe(path).name if path.suffix == ".toml" else choose(str(recipe), NAMED, what="--recipe")


def find_recipe(target: Target, recipe: str | Path | None) -> Recipe | None:
    """The recipe of a target, None if its precision has none. Raises UsageError for an unknown one."""
    if not target.precision_row.with_recipe:
        return None
    path = Path(recipe) if recipe is not None else None
    if path is not None and path.suffix == ".toml":
        return read_recipe(path)
    assert target.recipe is not None
    return target.row.recipes[target.recipe]
