"""A converter that gives up: the operator, the module and the line of the network's code, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mvit_export import export, load_model
from mvit_export.errors import ConversionError

pytestmark = pytest.mark.slow

GAPS = Path(__file__).parent / "gaps.py"
SWITCHED = "the network's course depends on values of a tensor (Eq(u0, 1))"
LINES = {
    "extremes": "return self.pool(self.conv(x))  # a line of this file",
    "switch": "return y * 2 if x.mean() > 0.5 else y - 1  # the fork",
    "leaving": "return x * float(x.detach().numpy().mean())  # leaves PyTorch",
    "bicubic": "return functional.interpolate(self.conv(x), size=(9, 11), mode=self.mode)",
}


def place(name: str) -> str:
    number = next(i for i, line in enumerate(GAPS.read_text().splitlines(), 1) if line.strip() == LINES[name])
    return f"at {GAPS}:{number} `{LINES[name]}`"


@pytest.mark.parametrize(
    ("name", "fmt", "what"),
    [
        ("extremes", "onnx", "ONNX fp32: the converter failed: no ONNX function for the operator "
                             "aten.adaptive_max_pool2d, in the module pool"),
        ("extremes", "tflite", "TFLite fp32: the converter failed: no TFLite lowering for the operator "
                               "aten.adaptive_max_pool2d.default, in the module pool"),
        ("switch", "onnx", f"ONNX fp32: the converter failed: {SWITCHED}"),
        ("switch", "tflite", f"TFLite fp32: the converter failed: {SWITCHED}"),
        ("leaving", "tflite", "TFLite fp32: the converter failed: .numpy() is not supported for tensor subclasses, "
                              "in the module blocks.1"),
        ("bicubic", "coreml", "Core ML fp16: the converter failed: no Core ML conversion of the operator "
                              "upsample_bicubic2d"),
    ],
)  # fmt: skip
def test_the_reason_and_the_place(name: str, fmt: str, what: str, tmp_path: Path) -> None:
    model = load_model(model=f"{GAPS}:{name}", image_size=32)
    with pytest.raises(ConversionError) as caught:
        export(model, to=fmt, out=tmp_path)
    assert str(caught.value) == f"{what}, {place(name)}; -v shows more"


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({}, "; it may take --form plain, this was patches"),
        ({"form": "plain"}, ""),
        ({"precision": "int8-weight"}, ""),  # which has no other form
    ],
)
def test_another_form_is_named_where_there_is_one(
    options: dict[str, str], hint: str, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: Any, **__: Any) -> None:
        raise RuntimeError("invalid output rank")

    monkeypatch.setattr("litert_torch.convert", give_up)
    with pytest.raises(ConversionError) as caught:
        export(tiny_model, to="tflite", out=tmp_path, **options)
    message = str(caught.value)
    assert "the converter failed: invalid output rank" in message
    assert message.endswith(f"{hint}; -v shows more") and ("--form" in message) == bool(hint)
