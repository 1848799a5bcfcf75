"""Folders and files whose names are in another encoding than UTF-8: they work, or one line says that they do not."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TESTS
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")]
NAME = os.fsdecode(b"caf\xe9")
NOT_UTF8 = "the path has bytes that are not UTF-8, which libraries cannot open; rename the folder or file"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / NAME
    place.mkdir()
    return place


def refused(done: Any, words: str) -> None:
    assert done.code == 2
    assert words in done.err
    assert done.err.startswith("mvit-export: error: ")
    assert done.err.count("\n") == 1
    assert "caf\\udce9" in done.err or "caf?" in done.err, "the folder is named"


def test_what_libraries_must_open_is_refused(cli: Callable[..., Any], copy: Callable[..., Path], folder: Path) -> None:
    model = f"{TESTS / 'tiny.py'}:tiny"
    refused(cli("--to", "onnx", "--model", model, "--out", folder), f"--out {folder.parent}/caf\\udce9: {NOT_UTF8}")
    assert list(folder.iterdir()) == []
    (folder / "w.safetensors").write_bytes(b"")
    refused(cli("--to", "onnx", "--weights", folder / "w.safetensors", "--out", folder.parent), NOT_UTF8)
    shutil.copytree(copy("onnx", "fp32"), folder / "onnx-fp32")
    refused(cli("verify", folder / "onnx-fp32", "--against", "golden"), NOT_UTF8)
    refused(cli("bench", folder / "onnx-fp32", "--budget", 1), "the path has bytes that are not UTF-8; rename")


def test_what_python_reads_itself_works(cli: Callable[..., Any], copy: Callable[..., Path], folder: Path) -> None:
    """Core ML's reference executor, a report, a Python file, labels, and pictures of which one is broken."""
    shutil.copytree(copy("coreml", "fp32"), folder / "coreml-fp32")
    assert cli("verify", folder / "coreml-fp32", "--against", "golden").code in (0, 3)
    record = json.loads((folder / "coreml-fp32/parity.json").read_text())
    assert NAME in record["artifacts"][0]["path"]
    assert cli("report", folder / "coreml-fp32", "-o", folder / "r.html").code in (0, 3)
    assert cli("inspect", folder / "coreml-fp32", "--json").json

    for name in ("tiny.py", "helpers.py"):
        shutil.copy(TESTS / name, folder)
    (folder / "labels.txt").write_text("\n".join("abcdefghij"))
    (folder / f"broken{NAME}.png").write_text("no picture")
    for index in range(8):
        Image.fromarray(np.full((32, 32, 3), 30 * index, np.uint8)).save(folder / f"{index}.png")
    done = cli(
        "--to", "onnx", "--model", f"{folder / 'tiny.py'}:tiny", "--labels", folder / "labels.txt",
        "--precision", "int8", "--calibration", folder, "--out", folder.parent / "out", "--json",
    )  # fmt: skip
    assert "error" not in done.json, done.err
    manifest = json.loads((folder.parent / "out/tiny/onnx-int8/manifest.json").read_text())
    assert any(NAME in warning for warning in manifest["quantization"]["calibration"]["warnings"])
