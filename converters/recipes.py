"""Which recipe a target gets: a named one of its format, or a user's file."""

from __future__ import annotations

from pathlib import Path

from mvit_export.formats import WITH_RECIPE, Target, choose
from mvit_export.named_recipes import RECIPES
from mvit_export.recipes import NAMED, Recipe, read_recipe


def recipe_name(recipe: str | Path) -> str:
    """The name of a recipe that the user gave: one of NAMED, or a file's own."""
    path = Path(recipe)
    return read_recipe(path).name if path.suffix == ".toml" else choose(str(recipe), NAMED, what="--recipe")


def find_recipe(target: Target, recipe: str | Path | None) -> Recipe | None:
    """The recipe of a target, None where its precision takes none. Raises UsageError for an unknown one."""
    if target.precision not in WITH_RECIPE:
        return None
    path = Path(recipe) if recipe is not None else None
    if path is not None and path.suffix == ".toml":
        return read_recipe(path)
    assert target.recipe is not None
    return RECIPES[target.format, target.recipe]
