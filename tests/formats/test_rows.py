"""A format is its row and its own files: nothing else names it, and every row is whole."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PARTS, ROOT

from mvit_export.formats.base import Format
from mvit_export.formats.table import FORMATS
from mvit_export.runner.__main__ import ADAPTERS

# Other files in which a format's name stands as a string, and why.
ELSEWHERE = {
    "mvit_export/doctor.py": "the extras and runtimes to install",
    "mvit_export/mil/package.py": "the extra to install",
    "mvit_export/runner/__main__.py": "a runtime of that name",
    "mvit_export/runner/run_onnxruntime.py": "an execution provider of that name",
    "mvit_export/readers/ort.py": "the extra to install",
    "mvit_export/readers/tflite_graph.py": "the extra to install",
    "benchmarks/harness/configurations.py": "a runtime and an execution provider of that name",
    "benchmarks/peers/exports.py": "what each of the other exporters writes",
    "benchmarks/tables/fidelity.py": "other exporters' files, which are opened without this package",
}


def strings(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def owns(file: Path, name: str) -> bool:
    """`formats/onnx.py`, `readers/onnx.py`, `converters/onnx/…`."""
    relative = file.relative_to(ROOT)
    return file.stem == name or relative.parts[:2] == ("converters", name)


def test_nothing_else_names_a_format() -> None:
    found = {
        str(file.relative_to(ROOT))
        for part in PARTS
        for file in (ROOT / part).rglob("*.py")
        for text in strings(file)
        if text in FORMATS and not owns(file, text)
    }
    assert found == set(ELSEWHERE)


def test_nothing_asks_which_format_it_has() -> None:
    """No `if artifact.format == …`: what differs stands in the rows."""
    found = []
    for part in PARTS:
        for file in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Compare):
                    sides = [node.left, *node.comparators]
                    if any(isinstance(side, ast.Constant) and side.value in FORMATS for side in sides):
                        found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert found == []


@pytest.mark.parametrize("row", FORMATS.values(), ids=list(FORMATS))
def test_rows_are_whole(row: Format) -> None:
    assert FORMATS[row.name] is row
    assert list(inspect.signature(importlib.import_module(row.converter).convert).parameters) == ["conversion", "path"]
    reader = importlib.import_module(row.reader)
    assert reader.openers() and callable(reader.read_contents)
    assert row.runtimes and set(row.runtimes) <= set(ADAPTERS)
    for precision in row.precisions.values():
        assert precision.tolerance.reason, f"{precision.name} has bounds without a reason"
        assert not precision.with_recipe or row.recipes, f"{precision.name} has no recipes"


def test_rows_differ_where_they_are_told_apart() -> None:
    for name in ("title", "suffix", "colours", "marker", "shape"):
        values = [getattr(row, name) for row in FORMATS.values()]
        assert len(set(values)) == len(values), name
