"""What is installed, what an import brings along, and what the names of the package promise."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from conftest import PARTS, ROOT, build, source_tree

import mvit_export
from mvit_export import errors

HEAVY = (
    "ai_edge_litert", "litert_quantizer", "coremltools", "huggingface_hub", "jinja2", "litert_torch", "matplotlib",
    "numpy", "onnx", "onnxruntime", "onnxscript", "PIL", "safetensors", "tflite_runtime", "timm", "torch",
    "torchvision", "transformers",
)  # fmt: skip


def modules_in_repository() -> set[str]:
    """Module files by the path they have in a wheel."""
    found = set()
    for part in PARTS:
        inside = part if part == "mvit_export" else f"mvit_export/{part}"
        for path in (ROOT / part).rglob("*.py"):
            found.add(f"{inside}/{path.relative_to(ROOT / part).as_posix()}")
    return found


def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as packed:
        (name,) = [name for name in packed.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(packed.read(name).decode())


def test_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = contents(wheel)
    outside = {name for name in names if not name.startswith(("mvit_export/", "mvit_export-"))}
    assert outside == set(), "other distributions own these names"
    assert {name for name in names if name.endswith(".py")} == modules_in_repository()
    assert "mvit_export/converters/onnx/convert.py" in names


def test_wheel_holds_photos_templates_and_licences(wheel: Path) -> None:
    names = contents(wheel)
    assert {
        "mvit_export/photos/chelsea.jpg",
        "mvit_export/photos/coffee.jpg",
        "mvit_export/photos/LICENSE.txt",
    } <= names
    assert {"mvit_export/report/page.html", "mvit_export/report/style.css"} <= names
    licences = {name.split("/licenses/")[1] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "mvit_export/photos/LICENSE.txt"}


def test_wheel_metadata(wheel: Path) -> None:
    found = metadata(wheel)
    assert (found["Name"], found["Version"]) == ("mvit-export", mvit_export.__version__)
    assert found["License-Expression"] == "MIT"
    assert sorted(found["Requires-Python"].split(",")) == ["<3.14", ">=3.10"]
    with zipfile.ZipFile(wheel) as packed:
        (name,) = [name for name in packed.namelist() if name.endswith(".dist-info/entry_points.txt")]
        assert packed.read(name).decode().split("\n")[:2] == [
            "[console_scripts]",
            "mvit-export = mvit_export.__main__:main",
        ]


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = build(source_tree(tmp_path / "tree"), "--sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as packed:
        packed.extractall(tmp_path / "unpacked")
    (tree,) = (tmp_path / "unpacked").iterdir()
    again = build(tree, "--wheel", tmp_path / "again")
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(again) as theirs:
        assert {i.filename: i.CRC for i in ours.infolist()} == {i.filename: i.CRC for i in theirs.infolist()}


# Extras


def requirements(wheel: Path, extra: str) -> list[str]:
    """What one extra adds, without markers, e.g. `torch<2.14,>=2.9`."""
    lines = metadata(wheel).get_all("Requires-Dist") or []
    return [line.split(";")[0].strip() for line in lines if f'extra == "{extra}"' in line.replace("'", '"')]


def test_extras(wheel: Path) -> None:
    assert sorted(metadata(wheel).get_all("Provides-Extra") or []) == [
        "all",
        "coreml",
        "dev",
        "examples",
        "hub",
        "onnx",
        "report",
        "tflite",
        "transformers",
    ]
    (everything,) = requirements(wheel, "all")
    names = everything.removeprefix("mvit-export[").removesuffix("]").split(",")
    assert sorted(names) == ["coreml", "hub", "onnx", "report", "tflite"]
    assert "mvit-export[all]" in requirements(wheel, "dev")


@pytest.mark.parametrize("extra", ["onnx", "coreml", "tflite"])
def test_each_target_s_extra_brings_torch(wheel: Path, extra: str) -> None:
    assert any(line.startswith(("torch<", "torch>")) for line in requirements(wheel, extra))


@pytest.mark.slow
def test_error_for_a_missing_module_names_an_extra_that_brings_it(wheel: Path) -> None:
    calls = [
        (path, call)
        for part in PARTS
        for path in (ROOT / part).rglob("*.py")
        for call in ast.walk(tree_of(path))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "require"
    ]
    assert calls
    for path, call in calls:
        module = ast.literal_eval(call.args[0]).split(".")[0].replace("_", "-")
        extra = next(ast.literal_eval(word.value) for word in call.keywords if word.arg == "extra")
        extras = ["onnx", "coreml", "tflite", "hub"] if extra == "all" else [extra]
        lines = [line.replace("_", "-") for name in extras for line in requirements(wheel, name)]
        assert any(re.match(rf"{module}[<>=]", line) for line in lines), f"{path}: {module} is not in [{extra}]"


# Names


@pytest.mark.parametrize("name", ["converters", "benchmarks"])
def test_folders_are_no_packages_of_their_own(name: str) -> None:
    """At the repository's root `import converters` would find the folder, under a name that is not ours."""
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: import mvit_export.{name}: this folder is not a package of its own (pip install -e .)"
    )
    assert importlib.import_module(f"mvit_export.{name}").__name__ == f"mvit_export.{name}"


def test_all_is_importable_and_lazy_names_agree() -> None:
    assert sorted(mvit_export.__all__) == mvit_export.__all__
    assert set(mvit_export.__all__) == set(mvit_export._HOMES)
    for name in mvit_export.__all__:
        value = getattr(mvit_export, name)
        assert value.__name__ == name
        assert value.__module__ == f"mvit_export.{mvit_export._HOMES[name]}", "says where it is defined"
    assert set(mvit_export.__all__) <= set(dir(mvit_export))


def test_all_agrees_with_what_type_checkers_see() -> None:
    (block,) = [node for node in tree_of(ROOT / "mvit_export/__init__.py").body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {name: f"mvit_export.{home}" for name, home in mvit_export._HOMES.items()}


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'mvit_export' has no attribute 'exprot'$"):
        mvit_export.exprot  # noqa: B018
    with pytest.raises(ImportError):
        from mvit_export import exprot  # noqa: F401


def test_version_on_the_command_line(cli) -> None:  # type: ignore[no-untyped-def]
    done = cli("--version")
    assert (done.code, done.out, done.err) == (0, f"mvit-export {mvit_export.__version__}\n", "")


# Imports


@pytest.mark.parametrize(
    "module", ["mvit_export", "mvit_export.cli.main", "mvit_export.errors", "mvit_export.formats.targets"]
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"], ["--version"], ["--to", "onix"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""if True:
        import sys
        from mvit_export.cli.main import main
        try:
            main({arguments})
        finally:
            print("heavy:", *[name for name in {HEAVY} if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "heavy:", done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "artifact",
        "checks.accuracy",
        "checks.inputs",
        "checks.parity",
        "data.folders",
        "data.preprocessing",
        "readers.inspect",
        "readers.session",
        "report",
        "system.staging",
    ],
)
def test_device_modules_import_numpy_at_most(module: str) -> None:
    """What a device without torch needs to verify."""
    heavy = [name for name in HEAVY if name != "numpy"]
    code = f"import sys, mvit_export.{module}; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_no_module_hides_a_package_that_we_use() -> None:
    for part in PARTS:
        for path in (ROOT / part).rglob("*.py"):
            assert path.parent != ROOT / part or path.stem not in HEAVY, (
                f"{path} would be found in place of the real {path.stem}"
            )


# Errors


def test_errors_are_drawn_in_one_tree() -> None:
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    classes = {name: value for name, value in classes.items() if issubclass(value, Exception)}
    assert errors.__doc__ is not None
    lines = errors.__doc__.split("\n\n")[1].splitlines()
    drawn = [line.lstrip("│├└─ ").split()[0] for line in lines]
    assert drawn == list(classes), "in the order of their definition"
    assert lines[0].startswith("MvitExportError")
    for line in lines[1:]:
        assert line.startswith(("├── ", "└── ", "│   └── "))
    parents = {"PartialExportError": errors.ConversionError}  # one step further in
    for name, value in classes.items():
        assert value.__doc__, name
        assert value is errors.MvitExportError or value.__bases__ == (parents.get(name, errors.MvitExportError),)
