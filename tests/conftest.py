"""Shared by all tests: a tiny network, its exports (made once a session), and the command line as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PARTS = ("mvit_export", "converters", "benchmarks")  # the folders that are installed
TINY = f"{TESTS / 'tiny.py'}:tiny"
LABELS = tuple(f"digit {i}" for i in range(10))
TARGETS = [(fmt, precision) for fmt in ("coreml", "onnx", "tflite") for precision in ("fp32", "fp16")]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # so that sums repeat


@dataclass(frozen=True)
class Finished:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_cli(*args: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> Finished:
    """`python -m mvit_export ARGS` in a process of its own."""
    command = [sys.executable, "-m", "mvit_export", *map(str, args)]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=600
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Finished]:
    return run_cli


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    from mvit_export import load_model

    return load_model(model=TINY)


@pytest.fixture(scope="session")
def tiny_artifact(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_artifact("onnx", "fp32")` -> its artifact directory, unverified; made once, so do not change it."""
    from mvit_export import export

    made: dict[tuple[str, ...], Path] = {}

    def make(fmt: str, precision: str = "fp32", input: str = "tensor") -> Path:
        key = (fmt, precision, input)
        if key not in made:
            out = tmp_path_factory.mktemp("artifacts")
            (result,) = export(tiny_model, to=fmt, precision=precision, input=input, out=out, verify=False)
            made[key] = result.artifact.path
        return made[key]

    return make


def source_tree(place: Path) -> Path:
    """Copy to `place` what a build reads, so that the build leaves nothing in the repository."""
    place.mkdir()
    for part in PARTS:
        shutil.copytree(ROOT / part, place / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    return place


def build(tree: Path, kind: str, out: Path) -> Path:
    """`kind` is --wheel or --sdist; the file that was made in `out`."""
    command = [sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is installed from a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    return build(source_tree(folder / "tree"), "--wheel", folder / "out")
