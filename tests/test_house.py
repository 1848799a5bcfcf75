"""What may import what, and how large a module, a function and a folder may be, read from the package as installed."""

from __future__ import annotations

import ast
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

# Rooms from the top to the bottom: one may import from lines below its own.
LAYERS = (
    ("cli",),
    ("benchmarks", "converters", "report"),
    ("doctor", "checks"),
    ("families", "readers", "tasks", "runner"),
    ("models", "mil", "results"),
    ("artifact",),
    ("formats", "data"),
    ("system", "errors"),
)
# Rooms of one line that know each other, in this direction alone.
SIDEWAYS = {
    "data": ("formats",),
    "doctor": ("checks",),
    "families": ("tasks",),
    "readers": ("runner", "tasks"),
    "runner": ("families",),
    "system": ("errors",),
}
PUBLIC = "mvit_export"  # the package itself: its names are imported when they are first used
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_FILES = 400, 40, 16
# Functions that may be longer, and why.
LONG_FUNCTIONS: Mapping[str, str] = {
    "cli.export.export": "its signature is the table of the command's options",
    "cli.tune.tune": "its signature is the table of the command's options",
    "cli.bench.bench": "its signature is the table of the command's options",
    "cli.evaluate.evaluate": "its signature is the table of the command's options",
    "cli.report.report": "its signature is the table of the command's options",
    "cli.verify.verify": "its signature is the table of the command's options",
    "converters.export.export": "its signature and docstring are the Python API's",
    "checks.parity.verify": "its signature and docstring are the Python API's",
}

Sources = Mapping[str, str]  # module: its text


@pytest.fixture(scope="module")
def sources(wheel: Path) -> Sources:
    """Every module of the wheel, by its dotted name."""
    with zipfile.ZipFile(wheel) as packed:
        files = [name for name in packed.namelist() if name.endswith(".py")]
        return {dotted(name): packed.read(name).decode() for name in files}


def dotted(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(name: str, text: str, known: Sources) -> Iterator[str]:
    """The modules of the package that a module imports, in functions too; what is for type checkers alone left out."""
    waiting: list[ast.AST] = [ast.parse(text)]
    package = name if any(other.startswith(f"{name}.") for other in known) else name.rpartition(".")[0]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            inner = [f"{base}.{alias.name}" for alias in node.names]
            yield from (full if full in known else base for full in inner if full in known or base in known)


def room(module: str) -> str:
    """`mvit_export.checks.parity` -> checks; the package itself -> "mvit_export"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PUBLIC


def graph(sources: Sources) -> dict[str, set[str]]:
    return {name: set(imports(name, text, sources)) - {name} for name, text in sources.items()}


def climbing(sources: Sources) -> list[str]:
    """Imports from a higher line, or sideways where the table has no such direction."""
    height = {name: len(LAYERS) - index for index, line in enumerate(LAYERS) for name in line}
    found = []
    for name, others in graph(sources).items():
        own = room(name)
        if own in (PUBLIC, "__main__"):
            continue
        for other in others:
            its = room(other)
            sideways = height.get(its) == height[own] and its not in SIDEWAYS.get(own, ())
            if its not in (own, PUBLIC) and (height.get(its, 99) > height[own] or sideways):
                found.append(f"{name} imports {other}")
    return sorted(found)


def circles(sources: Sources) -> list[set[str]]:
    """Groups of modules that reach each other: what is left when modules without open imports are taken away."""
    edges = {name: {other for other in others if other != PUBLIC} for name, others in graph(sources).items()}
    reach = {name: reachable(name, edges) for name in edges}
    groups = [{other for other in reach[name] if name in reach[other]} for name in edges if name in reach[name]]
    return [group for index, group in enumerate(groups) if group not in groups[:index]]


def reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += edges.get(name, ())
    return seen


@pytest.mark.slow
def test_every_room_has_its_line(sources: Sources) -> None:
    placed = {name for line in LAYERS for name in line}
    assert {room(module) for module in sources} - {PUBLIC, "__main__"} == placed


def test_no_import_climbs(sources: Sources) -> None:
    assert climbing(sources) == []


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("checks.locate", "from mvit_export.converters.export import export"),
        ("checks.locate", "from mvit_export.converters import export"),
        ("converters.export", "import mvit_export.benchmarks.harness.bench"),
        ("benchmarks.harness.bench", "from mvit_export.converters.jobs import choose_jobs"),
        ("formats.targets", "from mvit_export.artifact import Manifest"),
        ("tasks.class_scores", "def late():\n    from mvit_export.families.load import load_model"),
    ],
)
def test_an_import_that_climbs_is_found(sources: Sources, module: str, statement: str) -> None:
    name = f"mvit_export.{module}"
    assert len(climbing({**sources, name: f"{sources[name]}\n{statement}\n"})) == 1


def test_no_circle(sources: Sources) -> None:
    assert circles(sources) == []


def test_a_circle_is_found(sources: Sources) -> None:
    name = "mvit_export.checks.figures"
    changed = {**sources, name: f"{sources[name]}\nfrom mvit_export.checks.parity import verify\n"}
    assert {"mvit_export.checks.figures", "mvit_export.checks.parity"} <= circles(changed)[0]


def test_no_module_is_long(sources: Sources) -> None:
    lines = {name: len(text.splitlines()) for name, text in sources.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_no_function_is_long_without_a_reason(sources: Sources) -> None:
    found = set()
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno
                if node.end_lineno - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION:
                    found.add(f"{name.removeprefix('mvit_export.')}.{node.name}")
    assert found == set(LONG_FUNCTIONS)


def test_no_folder_is_full(sources: Sources) -> None:
    packages = {name for name in sources if any(other.startswith(f"{name}.") for other in sources)}
    folders = Counter(name if name in packages else name.rpartition(".")[0] for name in sources)
    assert {name: count for name, count in folders.items() if count > MOST_FILES} == {}
