"""The recipes that int8 comes with, for each format: what measured best, and where it was measured."""

from __future__ import annotations

from pathlib import Path

from mvit_export.formats import WITH_RECIPE, Target, choose
from mvit_export.recipes import NAMED, Recipe, Rule, read_recipe

RECIPES: dict[tuple[str, str], Recipe] = {
    ("onnx", "accurate"): Recipe("accurate", (Rule("dynamic", ("linear",)), Rule("weight"))),
    ("onnx", "fast"): Recipe("fast", (Rule("dynamic", ("linear",)), Rule("static", ("conv",)), Rule("weight"))),
    ("onnx", "small"): Recipe("small", (Rule("weight"),)),
    ("tflite", "accurate"): Recipe("accurate", (Rule("static", ("linear", "conv", "conv1x1")), Rule("weight"))),
    ("tflite", "fast"): Recipe(
        "fast", (Rule("static", ("linear", "conv", "conv1x1", "depthwise", "activation")), Rule("weight"))
    ),
    ("tflite", "small"): Recipe("small", (Rule("weight"),)),
    ("coreml", "accurate"): Recipe("accurate", (Rule("static", ("linear", "conv", "conv1x1")), Rule("weight"))),
    ("coreml", "fast"): Recipe(
        "fast",
        (Rule("static", ("linear", "conv", "conv1x1", "depthwise", "attention")), Rule("weight")),
        "speed not measured: that takes a device; fewer values leave int8 between ops",
    ),
    ("coreml", "small"): Recipe("small", (Rule("weight"),)),
}


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
