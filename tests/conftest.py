"""Shared by all tests: a tiny network, its exports (made once a session), and the command line as a user runs it."""

from __future__ import annotations

import atexit
import functools
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from attack_table import print_table
from command_server import CommandServer
from filelock import FileLock

from mvit_export.artifact import write_json
from mvit_export.formats.targets import plan_targets

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PARTS = ("mvit_export", "converters", "benchmarks")  # the folders that are installed
TINY = f"{TESTS / 'tiny.py'}:tiny"
SMALL = f"{TESTS / 'small.py'}:small"
LABELS = tuple(f"digit {i}" for i in range(10))
DEVICE_PACKAGES = ("tflite-runtime==2.14.*", "numpy==1.26.*", "safetensors>=0.5")
NEEDS_TFLITE_RUNTIME = [
    pytest.mark.skipif(sys.version_info >= (3, 12), reason="tflite-runtime 2.14 has no wheel for Python 3.12 or newer"),
    pytest.mark.skipif(sys.platform != "linux", reason="tflite-runtime 2.14 has wheels for Linux only"),
]
TARGETS = [(fmt, precision) for fmt in ("coreml", "onnx", "tflite") for precision in ("fp32", "fp16")]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # so that sums repeat
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # workers share the cores already
        os.environ.setdefault(name, "1")
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
        # What a manifest may name is remembered there, by the processes of the tests as well.
        os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="mvit-export-state-")
        atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
    let_children_be_interrupted()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes an export is slow, even where others have made it already in a whole run."""
    for item in items:
        if "tiny_artifact" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    print_table(terminalreporter)


def let_children_be_interrupted() -> None:
    """`nohup make test &` ignores SIGHUP and SIGINT, and what is ignored is inherited; a handler is not.

    So the tests go on being deaf to them, while the processes that they start and interrupt are not.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """coremltools searches for garbage at every conversion, which takes long if torch is part of the search."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Finished:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@functools.cache
def command_server() -> CommandServer:
    """Started when it is first used; one for each worker."""
    server = CommandServer()
    atexit.register(server.close)
    return server


def run_cli(*args: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> Finished:
    """`mvit-export ARGS` in a process of its own, whose imports are made already."""
    if any(name.startswith("PYTHON") for name in env or ()):  # which is for an interpreter that starts
        return run_module(*args, cwd=cwd, env=env)
    return Finished(*command_server().run([*map(str, args)], cwd=cwd or Path.cwd(), env={**os.environ, **(env or {})}))


def run_module(*args: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> Finished:
    """`python -m mvit_export ARGS` from the start."""
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
def small_model() -> Any:
    """Where a test is about one layer, or about what is around a file: it converts in a quarter of the time."""
    from mvit_export import load_model

    return load_model(model=SMALL, input_shape=(1, 3, 16, 16))


@pytest.fixture(scope="session")
def tiny_artifact(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_artifact("onnx", "fp32")` -> its artifact directory, unverified; made once, so do not change it.

    Without a form it has the default one of its format and precision. pytest-xdist's workers, whose own folders lie
    side by side, export what one of them needs once, and take copies.
    """
    from mvit_export import export

    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    shared.mkdir(exist_ok=True)

    def make(fmt: str, precision: str = "fp32", input: str = "tensor", form: str | None = None) -> Path:
        (target,) = plan_targets(fmt, precision=precision, input=input, form=form)
        kind = f"{input}-{form or 'default'}"  # a default that was asked for is exported as such
        options = {"precision": precision, "input": input, "form": form}
        original, place = (folder / kind / "tiny" / target.name for folder in (shared, own / "exported"))
        if not place.exists():
            with FileLock(shared / f"{kind}-{target.name}.lock"):
                if not original.exists():  # an export appears whole or not at all
                    export(tiny_model, to=fmt, **options, out=shared / kind, verify=False)  # type: ignore[arg-type]
            place.parent.mkdir(parents=True, exist_ok=True)
            Path(shutil.copytree(original, own / "partial", dirs_exist_ok=True)).rename(place)
        return place

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


def unavailable(reason: str) -> NoReturn:
    """Skip where something cannot be had; CI installs everything, so there it is a failure."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def rehash(place: Path) -> None:
    """Make the manifest vouch for an artifact's files as they are now."""
    manifest = json.loads((place / "manifest.json").read_text())
    for info in manifest["files"]:
        content = (place / info["path"]).read_bytes()
        info.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    write_json(place / "manifest.json", manifest)


@pytest.fixture
def copy(tiny_artifact: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`copy("tflite", "fp16")` -> an artifact directory of the test's own, without what others found out about it."""
    records = shutil.ignore_patterns("parity*.json", "latency*.json", "accuracy*.json")
    return lambda *kind: Path(shutil.copytree(tiny_artifact(*kind), tmp_path / "-".join(kind), ignore=records))


def swap_weights(place: Path) -> None:
    """Give two classes of the tiny network each other's weights, in the fp32 file itself."""
    from tiny import tiny

    weight = tiny().classifier.weight.detach()
    swapped = weight[torch.tensor([1, 0, *range(2, 10)])]
    (file,) = place.glob("tiny.*")
    content = file.read_bytes()
    assert content.count(weight.numpy().tobytes()) == 1
    file.write_bytes(content.replace(weight.numpy().tobytes(), swapped.numpy().tobytes()))
    rehash(place)


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own; nothing of ours leaks in."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin/python")

    def run(self, *command: str | Path, source: Path | None = None) -> Finished:
        path = {"PYTHONPATH": str(source)} if source else {}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        program, *arguments = map(str, command)
        done = subprocess.run(
            [str(self.folder / "bin" / program), *arguments],
            cwd=self.folder,
            env={**clean, **path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def installed(self) -> set[str]:
        code = "from importlib.metadata import distributions as d; print(*{x.metadata['Name'].lower() for x in d()})"
        return set(self.run("python", "-c", code).out.split())


def fetch(environment: Environment, into: Environment, *requirements: str) -> None:
    done = environment.run("pip", "--python", into.python, "install", "-q", *requirements)
    if done.code:
        unavailable(f"pip cannot fetch {', '.join(requirements)}: {done.err.strip().splitlines()[-1]}")


@pytest.fixture(scope="session")
def device_environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """What a small device has: numpy 1, safetensors and tflite-runtime alone."""
    environment = Environment(tmp_path_factory.mktemp("device"))
    venv.create(environment.folder, with_pip=True)
    fetch(environment, environment, *DEVICE_PACKAGES)
    return environment
