"""The benchmark of clean-ups after export: each leaves another file, and none is timed that computes something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mvit_export.benchmarks.tables import onnx_cleanup


def run(artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[dict]:
    monkeypatch.setattr("sys.argv", ["onnx_cleanup", str(artifact), "--budget", "0.2"])
    onnx_cleanup.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_each_clean_up_leaves_another_file(
    tiny_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, slimmed, offline, ort_format = run(tiny_artifact("onnx", input="image"), monkeypatch, capsys)
    assert (own["file"], own["inference_ratio"], own["opening_ratio"]) == ("as exported", *["1.000 [1.000, 1.000]"] * 2)
    assert slimmed["operators"] <= own["operators"]
    assert offline["operators"] < slimmed["operators"], "ONNX Runtime joins operators"
    assert ort_format["operators"] is None and ort_format["bytes"] != offline["bytes"]


def test_what_computes_something_else_is_not_timed(
    tiny_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(source: Path, path: Path) -> None:
        import onnx

        model = onnx.load(str(source))
        weight = next(w for w in model.graph.initializer if w.data_type == onnx.TensorProto.FLOAT and len(w.dims) == 4)
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + 1, weight.name))
        onnx.save(model, path)

    monkeypatch.setattr(onnx_cleanup, "CLEANED", {"spoilt": ("spoilt.onnx", spoil)})
    with pytest.raises(SystemExit, match=r"spoilt changes an output by .* of its scale, expected at most 1e-05"):
        run(tiny_artifact("onnx"), monkeypatch, capsys)
    with pytest.raises(SystemExit):
        onnx_cleanup.check_equal("NaN", [np.array([[np.nan]])], [np.ones((1, 1))])


def test_another_format_is_refused(
    tiny_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"tiny\.mlpackage is fp16, expected a \.onnx file in fp32$"):
        run(tiny_artifact("coreml", "fp16"), monkeypatch, capsys)
