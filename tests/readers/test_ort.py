"""`--ort`: ONNX Runtime's own file of an optimized graph, proven like any other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LABELS, TINY, Finished, swap_weights

from mvit_export import export, load_model
from mvit_export.artifact import read_artifact
from mvit_export.benchmarks.tuning.recipe_search import open_search
from mvit_export.checks.parity import verify
from mvit_export.errors import UsageError
from mvit_export.readers.inspect import inspect_artifact

pytestmark = pytest.mark.slow

HARDWARE = {"ReorderInput", "ReorderOutput"}  # into and out of NCHWc, which x86 alone has


@pytest.fixture(scope="module")
def made(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unverified `.ort` artifact, not to be changed."""
    (result,) = export(tiny_model, to="onnx", ort=True, out=tmp_path_factory.mktemp("ort"), verify=False)
    return result.artifact.path


def test_it_holds_the_optimized_graph(made: Path, tiny_artifact: Callable[..., Path]) -> None:
    assert sorted(path.name for path in made.iterdir()) == ["golden.safetensors", "manifest.json", "tiny.ort"]
    optimized, plain = (inspect_artifact(read_artifact(place)) for place in (made, tiny_artifact("onnx")))
    assert {"FusedMatMul", "QuickGelu"} <= set(optimized["operators"])
    assert not HARDWARE & set(optimized["operators"])
    assert 0 < optimized["operator_count"] < plain["operator_count"]
    manifest = read_artifact(made).manifest
    assert (manifest.format, manifest.target.ort, manifest.form) == ("onnx", True, "flat")
    assert "onnxruntime" in manifest.tools  # which decides where it opens
    assert "onnxruntime" not in read_artifact(tiny_artifact("onnx")).manifest.tools


@pytest.mark.parametrize("options", [{"input": "image"}, {"dynamic_batch": True, "form": "plain"}], ids=str)
def test_it_is_proven_as_it_was_asked_for(tmp_path: Path, options: dict[str, Any]) -> None:
    model = load_model(model=TINY, labels=LABELS)
    (result,) = export(model, to="onnx", ort=True, out=tmp_path, **options)
    assert result.parity is not None
    assert (result.parity.status, result.parity.reason) == ("pass", "")
    assert result.artifact.path.name.endswith("-ort")


def test_wrong_weights_fail(made: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(made, tmp_path / "spoilt"))
    swap_weights(place)
    (result,) = verify(place)
    assert result.status == "fail"
    assert result.reason.startswith("PSNR ")


def test_a_verdict_outlives_a_question_that_cannot_be_asked(made: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(made, tmp_path / "onnx-fp32-ort"))
    verify(place)
    with pytest.raises(UsageError, match=r"^--locate"):
        verify(tmp_path, find_layer=True)
    assert (place / "parity.json").exists()


def test_what_takes_the_graph_as_it_was(made: Path) -> None:
    with pytest.raises(UsageError, match=r"^--locate: .*-ort is a \.ort file, whose layers are fused; export without"):
        verify(made, find_layer=True)
    with pytest.raises(UsageError, match=r"^tune starts from one fp32 artifact, .*-ort is a \.ort file$"):
        open_search(made)


def test_command_makes_and_times_it(cli: Callable[..., Finished], tmp_path: Path) -> None:
    done = cli("--to", "onnx", "--ort", "--variant", "xxs", "--image-size", "32", "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    (row,) = done.json["artifacts"]
    assert row["path"].endswith("/onnx-fp32-ort")
    timed = cli("bench", row["path"], "--budget", "0.5", "--json")
    assert timed.code == 0, timed.err
    assert timed.json["results"][0]["median_ms"] > 0
