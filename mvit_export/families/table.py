"""The families of networks, one row each, and which of them a model belongs to."""

from __future__ import annotations

from mvit_export.families.base import Family
from mvit_export.families.given import GIVEN
from mvit_export.families.mobilevit.family import MOBILEVIT
from mvit_export.families.python_file import PYTHON_FILE
from mvit_export.families.timm import TIMM
from mvit_export.families.transformers.family import TRANSFORMERS

FAMILIES = (MOBILEVIT, GIVEN, TIMM, TRANSFORMERS, PYTHON_FILE)  # the last one owns every source that no other does
OF_CHECKPOINTS = (TRANSFORMERS, MOBILEVIT)  # read checkpoints whose model nobody named; the last, what none claims
VARIANTS = {variant: family for family in FAMILIES for variant in family.variants}
OPTIONS = {name: option for family in FAMILIES for name, option in family.options.items()}


def family_of(source: str) -> Family:
    """The family of a model, by `ModelInfo.source`."""
    return next(family for family in FAMILIES if family.owns(source))


def titles(*, having: str) -> str:
    """The families that have something, e.g. `variants` or `forms`, as named in messages."""
    return " or ".join(family.title for family in FAMILIES if getattr(family, having))
