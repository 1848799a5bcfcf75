"""parity.json read and written again: the document of `verify --json` is one record for who writes and who reads it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mvit_export.formats.table import FORMATS
from mvit_export.results.parity import Located, Metrics, Overflow, ParityReport, ParityResult

CLASS_FIGURES = {"kl": 1e-3, "top1_agreement": 0.9, "top5_agreement": 1.0, "mean_kl": 1e-4, "delta_p": 0.01}
TOLERANCE = FORMATS["onnx"].precisions["fp16"].tolerance
RAN = ParityResult(
    "a/onnx-fp16", "onnx", "fp16", "fail", "PSNR 31 dB", "onnxruntime", "pytorch", 9,
    Metrics(1.0, 0.1, 31.0, 0.99, 0.2, CLASS_FIGURES), TOLERANCE, "a note", "noise-0",
    Overflow("head", "mul_1", "mul", 7e4), Located("head", "mul_1", "mul", 1e-7, None, True, case="noise-0"),
)  # fmt: skip
DID_NOT_RUN = ParityResult(
    "a/coreml-fp16", "coreml", "fp16", "not-run", "no macOS", None, "golden", 0, None, TOLERANCE, device="ssh:pi"
)
# The document's keys, in their order: what scripts of users read.
KEYS = [
    "path", "format", "precision", "status", "reason", "runtime", "against", "inputs", "metrics", "tolerance", "note",
    "worst_case", "overflow", "located", "device", "reference_dtype", "float32_max_rel", "noisy_inputs",
]  # fmt: skip
FIGURES = [
    "max_abs", "max_rel", "psnr_db", "cosine", "kl", "top1_agreement", "top5_agreement", "max_of_spread", "mean_kl",
    "delta_p",
]  # fmt: skip


def test_document_comes_back_as_it_was() -> None:
    report = ParityReport((RAN, DID_NOT_RUN))
    text = json.dumps(report.to_json())
    assert ParityReport.from_json(json.loads(text)) == report
    assert json.dumps(ParityReport.from_json(json.loads(text)).to_json()) == text


def test_keys_and_their_order() -> None:
    document = ParityReport((RAN, DID_NOT_RUN)).to_json()
    assert list(document) == ["status", "artifacts"]
    assert document["status"] == "fail"
    for row in document["artifacts"]:
        assert list(row) == KEYS
        assert list(row["metrics"]) == FIGURES, "all figures, null where nothing was compared"
    assert set(document["artifacts"][1]["metrics"].values()) == {None}


def test_figures_of_another_task_come_after_those_of_class_scores() -> None:
    found = replace(RAN, metrics=Metrics(1.0, 0.1, 31.0, 0.99, None, {"pixel_agreement": 0.98}))
    row = found.to_json()["metrics"]
    assert list(row) == [*FIGURES, "pixel_agreement"]
    assert (row["kl"], row["pixel_agreement"]) == (None, 0.98)
    (back,) = ParityReport.from_json({"artifacts": [found.to_json()]}).artifacts
    assert back == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "pass", "metrics": None}, "a PASS without figures"),
        ({"reason": ""}, "FAIL without a reason"),
        ({"status": "fine"}, "status is 'fine'"),
        ({"metrics": {"psnr_db": "high"}}, "is null, expected a number|is text, expected a number"),
        ({"inputs": -1}, "inputs is out of range"),
    ],
)
def test_damaged_verdict_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParityReport.from_json({"artifacts": [RAN.to_json() | changes]})
