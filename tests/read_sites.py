"""Where the code reads files through system/reading.py: what tests/test_reading.py ties to cases of the attack."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import PARTS, ROOT

READER = "mvit_export.system.reading"
PARSERS = {"parse_json", "size_text"}  # of what was read already


def read_sites() -> set[str]:
    """`mvit_export/artifact.py:read_manifest`, ...: every function that calls one of the reader's functions."""
    files = [file for part in PARTS for file in (ROOT / part).rglob("*.py")]
    return {site for file in files if file.name != "reading.py" or file.parent.name != "system" for site in sites(file)}


def sites(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    readers = set(imported(tree))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and any(calls(node, readers) for node in ast.walk(function)):
            yield f"{file.relative_to(ROOT).as_posix()}:{function.name}"


def imported(tree: ast.AST) -> Iterator[str]:
    """Names that the reader's functions have in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == READER:
            yield from (alias.asname or alias.name for alias in node.names if alias.name not in PARSERS)
        elif isinstance(node, ast.ImportFrom) and node.module == READER.rpartition(".")[0]:
            yield from (alias.asname or alias.name for alias in node.names if alias.name == "reading")


def calls(node: ast.AST, readers: set[str]) -> bool:
    if not isinstance(node, ast.Call):
        return False
    owner = node.func.value if isinstance(node.func, ast.Attribute) else node.func
    return isinstance(owner, ast.Name) and owner.id in readers and not owner.id.isupper()
