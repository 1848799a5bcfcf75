"""Files that are no files, and files that are too large: one line, in no time, wherever the program reads."""

from __future__ import annotations

import ast
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARTS, ROOT, Finished
from odd_files import ODD

from mvit_export.system import reading
from mvit_export.system.files import write_whole

pytestmark = pytest.mark.slow

METHODS = {"open", "read_text", "read_bytes", "fromfile", "memmap", "imread", "ZipFile", "is_zipfile", "safe_open",
           "load_file", "read_model", "np.load", "torch.load", "onnx.load", "Image.open"}  # fmt: skip
OF_NO_FILE = ("os", "adapter", "subject", "kind", "runtime", "self.adapter", "interpreter", "device", "session")
# function of a module: why it may read without system/reading.py
ELSEWHERE = {
    "mvit_export/system/reading.py": "it is the reader",
    "mvit_export/system/machine.py:read": "of /proc and /sys alone",
    "mvit_export/runner/machine.py": "of /proc, and the model that was just opened; runs on devices alone",
    "mvit_export/runner/profile_ops.py": "the trace that ONNX Runtime has just written",
    "mvit_export/runner/run_litert.py:packed_labels": "runs on devices alone; the model was opened before",
    "mvit_export/report/page.py": "the package's own template",
    "mvit_export/data/synthetic.py": "the package's own photographs",
    "converters/tflite": "the file that the converter has just written",
    "benchmarks/devices/local.py:get": "a file that our own runner has written into a scratch folder",
    "benchmarks/devices/benchmark_model.py:take_output": "a file that was just fetched into a scratch folder",
    "benchmarks/devices/ssh.py:put_file": "a file of the artifact, which was hashed before",
    "benchmarks/devices/worker.py:pack_runner": "the package's own sources",
    "benchmarks/tables": "not installed commands' own files: tables for the docs",
    "benchmarks/peers": "not installed commands' own files: tables for the docs",
}


def functions(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of functions, and of what stands outside of them."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            yield getattr(node, "name", "lambda"), node


def called(node: ast.AST) -> set[str]:
    """What a function calls that may read a file: methods, with their owner where others share the name, and `open`.

    `read_text(...)` without an owner is the reader's own.
    """
    names = set()
    for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
        function = call.func
        if isinstance(function, ast.Attribute):
            owner = ast.unparse(function.value)
            names |= {function.attr, f"{owner}.{function.attr}"} if owner not in OF_NO_FILE else set()
            if function.attr == "open" and '"wb"' in ast.unparse(call).replace("'", '"'):
                names -= {"open", f"{owner}.open"}
        elif isinstance(function, ast.Name) and '"wb"' not in ast.unparse(call).replace("'", '"'):
            names.add(function.id if function.id not in ("read_text", "read_bytes") else "open_regular")
    return names


def unguarded() -> list[str]:
    """Functions that read a file by other means, and do not check it in the same place."""
    found = []
    for part in PARTS:
        for file in sorted((ROOT / part).rglob("*.py")):
            place = file.relative_to(ROOT).as_posix()
            for name, node in functions(ast.parse(file.read_text(encoding="utf-8"))):
                reads, checks = called(node) & METHODS, called(node) & {"check_regular", "open_regular"}
                known = any(place.startswith(key) or f"{place}:{name}" == key for key in ELSEWHERE)
                if reads and not checks and not known:
                    found.append(f"{place}:{name} calls {', '.join(sorted(reads))}")
    return found


def test_every_read_is_of_a_regular_file() -> None:
    assert unguarded() == []


@pytest.mark.parametrize("kind", ODD)
def test_the_reader_refuses(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    ODD[kind](path)
    for read in (lambda: reading.read_bytes(path, 100), lambda: reading.sha256_file(path)):
        with pytest.raises((OSError, ValueError)) as raised:
            read()
        assert isinstance(raised.value, OSError)
    if kind not in ("proc",):
        with pytest.raises(OSError, match=r".+"):
            reading.check_regular(path, 100)


@pytest.mark.parametrize(
    "kind", [kind for kind in ODD if kind != "proc"]
)  # a link to what counts as a regular file, and is replaced
def test_the_writer_leaves_what_is_no_file(kind: str, tmp_path: Path) -> None:
    """`report -o /dev/stdout` must not put a file in its place."""
    path = tmp_path / "odd"
    ODD[kind](path)
    before = os.lstat(path)
    with pytest.raises(OSError, match=r"no regular file|symbolic links"):
        write_whole(path, b"text")
    assert os.path.samestat(before, os.lstat(path))
    assert os.listdir(tmp_path) == ["odd"]


def test_the_reader_refuses_a_name_with_a_nul() -> None:
    for read in (reading.read_bytes, reading.check_regular):
        with pytest.raises(reading.Unreadable, match="has a name with a NUL in it"):
            read("a\0b", 100)


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert reading.read_bytes(path, 100) == b"x" * 100
    with pytest.raises(reading.Unreadable, match="has 100 bytes, expected at most 99 bytes"):
        reading.read_bytes(path, 99)
    with pytest.raises(reading.Unreadable, match="has more than 5 bytes"):
        reading.read_bytes("/proc/self/status", 5)
    with pytest.raises(ValueError, match="nested too deep"):
        reading.parse_json("[" * 100_000)
    path.write_text("a = " + "[" * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        reading.read_toml(path)


Cli = Callable[..., Finished]


def commands(place: Path, odd: Path) -> dict[str, tuple[str | Path, ...]]:
    """A command for each kind of file that a user may name or that an artifact may hold; `odd` stands in its place."""
    report = ("report", place, "--format", "markdown")
    like = ("--to", "onnx", "--out", place.parent / "out")
    return {
        "manifest.json": ("inspect", place), "golden.safetensors": ("verify", place, "--against", "golden"),
        "tiny.onnx": ("verify", place), "parity.json": report,
        "latency.json": report, "accuracy.json": report,
        "latency.ssh-x.json": report,
        "labels": (*like, "--variant", "xxs", "--labels", odd), "weights": (*like, "--weights", odd),
        "recipe": (*like, "--variant", "xxs", "--precision", "int8", "--recipe", f"{odd}.toml"),
        "calibration": (*like, "--variant", "xxs", "--precision", "int8", "--calibration", f"{odd}.npz"),
        "data": ("eval", place, "--data", f"{odd}.npz"), "model": (*like, "--model", f"{odd}.py:net"),
        "baseline": ("bench", place, "--baseline", f"{odd}.json"),
        "binary": ("verify", place, "--device", "adb", "--benchmark-binary", odd),
        "picture": ("eval", place, "--data", place.parent / "folder"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "loop"])
@pytest.mark.parametrize("what", commands(Path("x"), Path("y")))
def test_commands_refuse(what: str, kind: str, cli: Cli, copy: Callable[..., Path], tmp_path: Path) -> None:
    place, odd = copy("onnx"), tmp_path / "odd"
    arguments = commands(place, odd)[what]
    if "." in what:
        path = place / what
        path.unlink(missing_ok=True)
    elif what == "picture":
        (tmp_path / "folder/a").mkdir(parents=True)
        path = tmp_path / "folder/a/x.png"
    else:
        (path,) = [Path(str(word).removesuffix(":net")) for word in arguments if str(word).startswith(str(odd))]
    ODD[kind](path)
    done = cli(*arguments)
    assert done.code == (0 if arguments[0] == "report" and what != "manifest.json" else 2) or done.code == 3, done.err
    assert "internal error" not in done.err and "Traceback" not in done.err
    assert done.err.count("\n") == (1 if done.code == 2 else 0), done.err


def test_arrays_that_unpack_to_too_much(cli: Cli, tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
        packed.open("images.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 64, 64, 3)}
        )
        zeros = bytes(1 << 24)
        for _ in range(300):
            file.write(zeros)
    done = cli("eval", tiny_artifact("onnx"), "--data", path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "unpacks to 5.03 GB, expected at most 4 GB" in done.err


def test_a_checkpoint_that_unpacks_to_too_much(cli: Cli, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        with target.open(zipfile.ZipInfo("archive/data/9"), "w", force_zip64=True) as file:
            pass
        info = zipfile.ZipInfo("archive/data/8")
        info.compress_type = zipfile.ZIP_DEFLATED
        with target.open(info, "w", force_zip64=True) as file:
            for _ in range(130):
                file.write(bytes(1 << 23))
    done = cli("--to", "onnx", "--weights", tmp_path / "bomb.pt", "--out", tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "unpacks to 1.09 GB, expected at most 1 GB" in done.err
