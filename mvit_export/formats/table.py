"""The available formats. To add one: its row here, its converter, its reader, and an extra in pyproject."""

from __future__ import annotations

from collections.abc import Callable

from mvit_export.formats.base import Format, Precision
from mvit_export.formats.coreml import COREML
from mvit_export.formats.onnx import ONNX
from mvit_export.formats.tflite import TFLITE

FORMATS: dict[str, Format] = {row.name: row for row in (COREML, ONNX, TFLITE)}


def precisions_that(fits: Callable[[Precision], bool]) -> tuple[str, ...]:
    """Names of the precisions of any format for which `fits` is true, those with most bits first."""
    found = [precision for row in FORMATS.values() for precision in row.precisions.values() if fits(precision)]
    return tuple(dict.fromkeys(p.name for p in sorted(found, key=lambda p: -p.bits)))


FULL = precisions_that(lambda precision: precision.full)
WITH_RECIPE = precisions_that(lambda precision: precision.with_recipe)
TIMED = tuple(row.name for row in FORMATS.values() if not row.needs_macos)  # what a benchmark can time on any system
