"""README, CONTRIBUTING and docs/: links lead somewhere, commands exist, and what a page shows runs as printed."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from conftest import ROOT
from pages import INLINE, MANUAL, OTHERS, RUNNABLE, Block, anchors, blocks, commands, links, prose

from mvit_export.artifact import SETTINGS, FileInfo, Manifest, ModelInfo, TensorSpec, WeightsInfo
from mvit_export.cli.main import app
from mvit_export.data.preprocessing import Preprocessing
from mvit_export.formats.base import Tolerance
from mvit_export.formats.targets import Target
from mvit_export.results.accuracy import ArtifactAccuracy, Gate, ReferenceAccuracy
from mvit_export.results.latency import Measurement, OpTime, Ratio, Roofline, Slowdown
from mvit_export.results.parity import Located, Metrics, Overflow, ParityResult
from mvit_export.tasks.table import TASKS

MOST_README_LINES = 150
LANGUAGES = (*RUNNABLE, "yaml", "toml", "json", "text", "diff")
DEFAULT_COMMAND = "export"
BENCHMARKS = "mvit_export.benchmarks"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", MANUAL, ids=name_of)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < MOST_README_LINES


def test_index_names_every_page() -> None:
    index = ROOT / "docs/README.md"
    pages = {page.name for page in MANUAL if page.parent == index.parent} - {index.name}
    assert pages <= set(links(index))


@pytest.mark.parametrize("page", [*MANUAL, *OTHERS], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(place), f"{target}: no such heading"


# Commands


def options_of(command: Any) -> set[str]:
    names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return {*names, *command.context_settings.get("help_option_names", ("--help",))}


@pytest.fixture(scope="module")
def group() -> Any:
    return typer.main.get_command(app)


def unknown_options(words: list[str], known: set[str]) -> list[str]:
    given = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    return [option for option in given if option not in known]


def check_mvit_export(words: list[str], group: Any) -> list[str]:
    name = words[0] if words and words[0] in group.commands else DEFAULT_COMMAND
    known = options_of(group.commands[name]) | (options_of(group) if name == DEFAULT_COMMAND else set())
    return unknown_options(words, known)


def check_module(module: str, words: list[str]) -> list[str]:
    """A benchmark's parser stands in its source: the options are the strings of its calls of add_argument."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return [module]
    source = Path(found.origin)
    source = source.with_name("__main__.py") if source.name == "__init__.py" else source
    return unknown_options(words, declared(source.read_text(encoding="utf-8")))


def declared(source: str) -> set[str]:
    """First words of calls: `parser.add_argument("--out", …)`, or `add("--out", …)`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    words = [call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)]
    return {word for word in words if isinstance(word, str) and word.startswith("-")}


def unknown_to_example(script: Path, words: list[str]) -> list[str]:
    """An example may make its parser of anything: an option is taken as known where its name stands in the source."""
    if not script.is_file():
        return [script.name]
    names = {"--" + name.replace("_", "-") for name in re.findall(r"\b[a-z_]+\b", script.read_text(encoding="utf-8"))}
    return unknown_options(words, names)


def faults(words: list[str], group: Any) -> list[str]:
    """What a command names that is not there."""
    if words[0] == "mvit-export":
        return check_mvit_export(words[1:], group)
    if words[:2] == ["python", "-m"] and words[2].startswith(BENCHMARKS):
        return check_module(words[2].rstrip("…"), words[3:])
    if words[0] == "python" and len(words) > 1 and words[1].startswith("examples/"):
        return unknown_to_example(ROOT / words[1], words[2:])
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [word for word in words[1:] if word not in targets]
    return []


@every_page
def test_commands_and_options_exist(page: Path, group: Any) -> None:
    wrong = {" ".join(words): found for words in commands(page) if (found := faults(words, group))}
    assert wrong == {}


@every_page
def test_options_in_sentences_exist(page: Path, group: Any) -> None:
    """`--form` in a sentence is an option of some command or benchmark."""
    known = options_of(group).union(*(options_of(command) for command in group.commands.values()))
    known = known.union(*(declared(path.read_text()) for path in (ROOT / "benchmarks").rglob("*.py")))
    named = [inline["text"].split()[0] for inline in INLINE.finditer(prose(page)) if inline["text"].startswith("--")]
    assert unknown_options(named, known) == []


@pytest.mark.parametrize(
    "line",
    [
        "mvit-export --to onnx --wieghts my.pt",
        "mvit-export verify a --budget 3",
        "python -m mvit_export.benchmarks.tables.absent",
        "python -m mvit_export.benchmarks.tables.latency --absent",
        "python examples/absent.py",
        "make absent",
    ],
)
def test_a_command_that_is_not_there_is_found(line: str, group: Any) -> None:
    assert len(faults(line.split(), group)) == 1


@every_page
def test_workflows_use_inputs_of_the_action(page: Path) -> None:
    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    for block in blocks(page):
        for step in yaml.safe_load(block.text) if block.language == "yaml" else []:
            if "mvit-export@" in step["uses"]:
                assert set(step["with"]) <= set(inputs)


# JSON


@pytest.mark.parametrize(
    ("section", "records"),
    [
        ("manifest.json", (Manifest, ModelInfo, WeightsInfo, Preprocessing, TensorSpec, Target, FileInfo)),
        ("parity.json", (ParityResult, Metrics, Tolerance, Overflow, Located)),
        ("latency.json", (Measurement, Ratio, Roofline, OpTime, Slowdown)),
        ("accuracy.json", (ArtifactAccuracy, ReferenceAccuracy, Gate)),
    ],
)
def test_every_field_of_the_json_is_described(section: str, records: tuple[Any, ...]) -> None:
    text = (ROOT / "docs/artifact.md").read_text(encoding="utf-8")
    _, _, after = text.partition(f"\n## {section}\n")
    described = {inline["text"] for inline in INLINE.finditer(after.partition("\n## ")[0])}
    fields = {name for record in records for name in record.__dataclass_fields__}
    if ModelInfo in records:  # its settings are written out
        fields = fields - {"settings"} | set(SETTINGS)
    if Metrics in records:  # so are the figures of every task
        fields = fields - {"of_task"} | {figure.name for task in TASKS.values() for figure in task.figures}
    assert fields - described == set()


# Running


@every_page
def test_every_block_runs_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"line {block.line}: name the language, one of {LANGUAGES}"
        assert block.runs or block.reason or block.language not in RUNNABLE


def run_page(page: Path, folder: Path) -> None:
    """Every block in order, in one folder; a block that fails is named with its line and what it printed."""
    (folder / "examples").symlink_to(ROOT / "examples")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for block in blocks(page):
        if block.runs:
            done = subprocess.run(
                command_of(block), cwd=folder, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=900,
            )  # fmt: skip
            assert done.returncode == 0, f"{name_of(page)}:{block.line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def command_of(block: Block) -> list[str]:
    if block.language == "python":
        return [sys.executable, "-c", block.text]
    return ["bash", "-euxo", "pipefail", "-c", block.text]


def runs_anything(page: Path) -> bool:
    return any(block.runs for block in blocks(page))


# One page stands for all in `make test`: it exports, so it takes seconds. `make docs` runs them all, a minute or
# two each.
SAMPLE = "docs/devices.md"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=[] if name_of(page) == SAMPLE else [pytest.mark.docs])
        for page in MANUAL
        if runs_anything(page)
    ],
)
@pytest.mark.slow
def test_a_page_runs_as_printed(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)


@pytest.mark.parametrize("text", ["```sh\ntrue\nfalse\ntrue\n```\n", "```python\nassert False\n```\n"])
def test_a_block_that_fails_is_found(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "\n" + text)
    with pytest.raises(AssertionError, match=r"page\.md:2"):
        run_page(ROOT / "page.md", tmp_path)
