"""The JSON that 0.1.0 wrote: read and written again byte for byte, or made anew with the same keys, order and types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Finished

from mvit_export.artifact import Manifest, write_json
from mvit_export.results.accuracy import AccuracyReport
from mvit_export.results.latency import LatencyReport

GOLDEN = Path(__file__).parent.parent / "golden"
RECORDS = {
    "latency.json": LatencyReport, "accuracy.json": AccuracyReport,
    "manifest-onnx-fp32.json": Manifest, "manifest-coreml-int8.json": Manifest,
}  # fmt: skip
COUNTS = ("operators", "tools", "opsets")  # keyed by what a converter made and by package: their keys are data


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def skeleton(value: Any, key: str = "") -> Any:
    """Keys in their order and types; of a list what its first entry is."""
    if isinstance(value, dict):
        return "counts" if key in COUNTS else [(name, skeleton(inner, name)) for name, inner in value.items()]
    if isinstance(value, list):
        return [skeleton(inner) for inner in value[:1]]
    return type(value).__name__


@pytest.mark.parametrize("name", RECORDS)
def test_records_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    stored = (GOLDEN / name).read_bytes()
    record: Any = RECORDS[name]
    write_json(tmp_path / name, record.from_json(json.loads(stored)).to_json())
    assert (tmp_path / name).read_bytes() == stored


@pytest.mark.slow
def test_export_prints_and_stores_the_same(cli: Callable[..., Finished], tmp_path: Path) -> None:
    done = cli("export", "--to", "onnx", "--model", TINY, "--out", tmp_path, "--json")
    expected = {**golden("export.json"), "notes": []}
    expected["artifacts"][0]["parity"][0] |= {"reference_dtype": "", "float32_max_rel": 0.5, "noisy_inputs": []}
    assert skeleton(done.json) == skeleton(expected)  # notes and the three figures were added since
    made = json.loads((tmp_path / "tiny/onnx-fp32/manifest.json").read_text())
    stored = golden("manifest-onnx-fp32.json")
    assert skeleton(made) == skeleton(stored)
    same = ("schema_version", "inputs", "outputs", "preprocessing", "target", "capture", "form", "tuning")
    assert {name: made.get(name) for name in same} == {name: stored.get(name) for name in same}


@pytest.mark.parametrize(("fmt", "precision"), [("onnx", "fp32"), ("tflite", "fp32"), ("coreml", "fp16")])
def test_inspect_prints_the_same(
    cli: Callable[..., Finished], tiny_artifact: Callable[..., Path], fmt: str, precision: str
) -> None:
    made = cli("inspect", tiny_artifact(fmt, precision), "--json").json
    assert skeleton(made) == skeleton(golden(f"inspect-{fmt}-{precision}.json"))


def test_doctor_prints_the_same(cli: Callable[..., Finished]) -> None:
    made, stored = cli("doctor", "--json").json, golden("doctor.json")
    assert skeleton(made) == skeleton(stored)
    rows = [[(finding["kind"], finding["name"]) for finding in said["findings"]] for said in (made, stored)]
    assert rows[0] == rows[1]
