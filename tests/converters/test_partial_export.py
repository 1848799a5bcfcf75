"""One target that cannot be made: the others are, and everybody is told which is which."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mvit_export import export, load_model
from mvit_export.converters.onnx import convert as onnx_module
from mvit_export.errors import ConversionError, MvitExportError, PartialExportError, UsageError

pytestmark = pytest.mark.slow

GAPS = Path(__file__).parent / "gaps.py"
REASON = "Core ML fp16: the converter failed: no Core ML conversion of the operator upsample_bicubic2d, at "


@pytest.fixture(scope="module")
def bicubic() -> Any:
    return load_model(model=f"{GAPS}:bicubic", image_size=32)


def test_the_command_makes_what_it_can(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli(
        "--to", "coreml,onnx", "--model", f"{GAPS}:bicubic", "--image-size", 32, "--out", tmp_path, "--json", "-q"
    )
    assert done.code == 2
    assert done.err.startswith(f"mvit-export: error: {REASON}")
    assert done.err.count("\n") == 1
    document = done.json
    assert document["status"] == "error"
    assert document["error"] == {"type": "ConversionError", "message": "coreml-fp16 could not be exported"}
    (failed,) = document["failed"]
    assert (failed["target"], failed["type"]) == ("coreml-fp16", "ConversionError")
    assert failed["message"].startswith(REASON)
    (made,) = document["artifacts"]
    assert made["parity"][0]["status"] == "pass"
    assert [place.name for place in (tmp_path / "bicubic").iterdir()] == ["onnx-fp32"]
    assert (tmp_path / "bicubic/onnx-fp32/parity.json").is_file()


def test_the_error_carries_what_was_made(bicubic: Any, tmp_path: Path) -> None:
    with pytest.raises(
        PartialExportError, match=r"^1 of 2 targets failed, coreml-fp16; coreml-fp16: Core ML"
    ) as caught:
        export(bicubic, to=["coreml", "onnx"], out=tmp_path, verify=False)
    (made,) = caught.value.results
    assert made.artifact.path == tmp_path / "bicubic/onnx-fp32"
    assert str(caught.value.failures["coreml-fp16"]).startswith(REASON)


def test_a_single_target_raises_its_own_error(bicubic: Any, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="upsample_bicubic2d") as caught:
        export(bicubic, to="coreml", out=tmp_path / "out")
    assert type(caught.value) is ConversionError
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_its_converter_refuses_is_one_target(
    bicubic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = onnx_module.convert

    def refuse_half(conversion: Any, path: Path) -> str:
        if conversion.target.precision == "fp16":
            raise UsageError("no half here; leave it out")
        return convert(conversion, path)

    monkeypatch.setattr(onnx_module, "convert", refuse_half)
    with pytest.raises(PartialExportError, match=r"failed, onnx-fp16; onnx-fp16: no half here$"):
        export(bicubic, to="onnx", precision=["fp16", "fp32"], out=tmp_path, verify=False)
    assert [place.name for place in (tmp_path / "bicubic").iterdir()] == ["onnx-fp32"]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), MvitExportError, "not enough space on the disk"),
        (RuntimeError("write failed: No space left on device"), MvitExportError, "not enough space on the disk"),
        (MemoryError(), MvitExportError, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MvitExportError, "not enough memory"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_what_concerns_all_ends_at_once(
    bicubic: Any,
    error: BaseException,
    kind: type[BaseException],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def fail(conversion: Any, path: Path) -> str:
        tried.append(conversion.target.name)
        raise error

    monkeypatch.setattr(onnx_module, "convert", fail)
    with pytest.raises(kind, match=words) as caught:
        export(bicubic, to="onnx", precision=["fp32", "fp16"], out=tmp_path / "out")
    assert type(caught.value) is kind
    assert tried == ["onnx-fp32"]
    assert list(tmp_path.iterdir()) == []
