"""The comparison with other exporters: same weights, equal files, and nothing timed or left out without a word."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import randomize
from tiny import tiny

from mvit_export import load_model
from mvit_export.artifact import read_artifact
from mvit_export.benchmarks.harness.timing import Plan
from mvit_export.benchmarks.peers import __main__ as peers_main
from mvit_export.benchmarks.peers import files as peer_files
from mvit_export.benchmarks.peers.exports import MISSING, PEERS, Export, error_line, export_onnx
from mvit_export.benchmarks.peers.files import File, Making, Source, export_peer, failed, forms_of, judge, prepare, wrap
from mvit_export.benchmarks.peers.markdown import file_table, latency_table, summary_table
from mvit_export.benchmarks.peers.networks import build_network, check_same_logits, state_of
from mvit_export.benchmarks.tables.process_cost import TIMED_OUT, Cost, cost_of
from mvit_export.errors import ArtifactError, UsageError, WeightsError
from mvit_export.families.mobilevit.names import FAMILIES, map_state
from mvit_export.families.mobilevit.network import VARIANTS, create_mobilevit
from mvit_export.results.latency import LatencyReport, Measurement


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """XXS with random weights; its logits were found equal in timm and transformers, or this raises."""
    return prepare("xxs", tmp_path_factory.mktemp("source"), 64)


# Weights


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_go_back_and_forth(variant: str, family: str) -> None:
    model = randomize(create_mobilevit(variant))
    there = state_of(model.state_dict(), family, model.config)
    back = map_state(there, family, model.config)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["timm", "hf"])
@pytest.mark.parametrize("variant", ["xs", "s"])
def test_peers_networks_have_our_logits(variant: str, family: str, tmp_path: Path) -> None:
    model = randomize(create_mobilevit(variant))
    peer_files.save_state(state_of(model.state_dict(), family, model.config), tmp_path / "weights.safetensors")
    check_same_logits(model, build_network(family, variant, tmp_path / "weights.safetensors"), 64)


def test_other_logits_are_refused(source: Source) -> None:
    assert source.refusals == {}
    network = build_network("timm", "xxs", source.weights["timm"])
    with torch.no_grad():
        network.head.fc.bias[0] += 0.01
    with pytest.raises(WeightsError, match="the peer's logits are off by"):
        check_same_logits(randomize(create_mobilevit("xxs")), network, 64)


def test_the_weights_are_those_that_our_export_loads(source: Source) -> None:
    loaded = load_model(weights=source.weights["mvit-export"], image_size=64)
    expected = randomize(create_mobilevit("xxs")).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.module.state_dict().items())


# Files


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user's own call of the ONNX exporter leaves of the tiny network: weights lie beside the graph."""
    folder = tmp_path_factory.mktemp("bare")
    export_onnx(Export(tiny().eval(), torch.rand(1, 3, 64, 64), folder / "tiny.onnx"))
    return folder


@pytest.fixture
def wrapped(bare: Path, tiny_artifact: Callable[..., Path], tmp_path: Path) -> Callable[..., File]:
    """`wrapped("name")` -> the bare file as a peer's, judged; `change` alters a copy of it first."""

    def make(name: str, change: Callable[[Path], None] = lambda folder: None) -> File:
        raw = Path(shutil.copytree(bare, tmp_path / f"raw-{name}"))
        change(raw)
        artifact = wrap(raw, read_artifact(tiny_artifact("onnx")), tmp_path / name, {"torch": torch.__version__})
        return judge(File("tiny", "onnx", name, ours=False, place=str(artifact.path)))

    return make


def swap_classes(folder: Path) -> None:
    """Give two classes each other's weights."""
    weight = tiny().classifier.weight.detach()
    old, new = (w.numpy().tobytes() for w in (weight, weight[[1, 0, *range(2, 10)]]))
    (file,) = (file for file in folder.iterdir() if old in file.read_bytes())
    file.write_bytes(file.read_bytes().replace(old, new))


def test_a_peers_file_is_proven_as_ours_is(wrapped, bare: Path) -> None:
    file = wrapped("peer")
    assert (file.status, file.reason) == ("pass", "")
    assert file.psnr_db > 100 and file.operators > 100
    assert file.bytes == sum(path.stat().st_size for path in bare.iterdir())
    artifact = read_artifact(Path(file.place))
    assert artifact.manifest.tools == {"torch": torch.__version__}
    assert artifact.manifest.target.opset is None  # ours says nothing of the peer's


def fake_bench(timed: list[str]) -> Callable[..., LatencyReport]:
    def run_bench(paths, *, threads, options) -> LatencyReport:
        timed.extend(path.name for path in paths)
        rows = [bench_row(str(path), count, 10.0 + index) for count in threads for index, path in enumerate(paths)]
        return LatencyReport("pass", {"device": "local"}, tuple(rows))

    return run_bench


def bench_row(path: str, threads: int, ms: float) -> Measurement:
    return Measurement(
        path=path, model="tiny", format="onnx", precision="fp32", status="measured", runtime="onnxruntime 1.0 CPU",
        threads=threads, median_ms=ms, median_interval_ms=(ms, ms), settled=True, rounds=6, samples_per_round=2,
        samples_ms=(ms,) * 12,
    )  # fmt: skip


def test_a_wrong_weight_is_found_and_not_timed(wrapped, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = wrapped("right"), wrapped("wrong", swap_classes)
    assert wrong.status == "fail" and "max error" in wrong.reason
    timed: list[str] = []
    monkeypatch.setattr(peers_main, "run_bench", fake_bench(timed))
    (first, second), environment = peers_main.time_files([right, wrong], [1], Plan())
    assert (timed, environment) == (["right"], {"device": "local"})
    assert (first.status, first.median_ms) == ("pass", 10.0)
    assert (second.status, second.reason, second.median_ms) == ("fail", wrong.reason, None)


def test_a_file_that_the_runtime_rejects_fails(wrapped) -> None:
    file = wrapped("damaged", lambda folder: (folder / "tiny.onnx").write_bytes(b"no model"))
    assert file.status == "fail" and "is rejected by ONNX Runtime" in file.reason


def test_files_of_an_earlier_run_are_judged_again(wrapped, tmp_path: Path) -> None:
    record = tmp_path / "onnx.json"
    rows = [asdict(wrapped("kept")) | {"status": "fail"}, asdict(File("tiny", "onnx", "none", False, reason="gone"))]
    record.write_text(json.dumps(rows))
    kept, none = peer_files.kept_files(record)
    assert (kept.status, none.status, none.reason) == ("pass", "not-run", "gone")
    with pytest.raises(ArtifactError, match="run once without --no-export"):
        list(peer_files.kept_files(tmp_path / "nothing.json"))


# What cannot be had


def test_a_missing_library_is_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_artifact: Callable[..., Path]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # an import of it fails
    source = prepare("xxs", tmp_path, 64)
    assert source.refusals.keys() == {"timm"}
    file = export_peer(PEERS[0], source, read_artifact(tiny_artifact("onnx")), Making())
    assert (file.name, file.status) == ("timm -> torch.onnx", "not-run")
    assert "timm does not import" in file.reason
    (timing,), _ = peers_main.time_files([file], [1], Plan())
    assert (timing.status, timing.reason) == (file.status, file.reason)


def test_a_missing_exporter_is_not_run(source: Source, tmp_path: Path, tiny_artifact: Callable[..., Path]) -> None:
    python = tmp_path / "python"  # of an environment that has no onnx2tf
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    peer = next(peer for peer in PEERS if peer.tool == "onnx2tf")
    file = export_peer(peer, source, read_artifact(tiny_artifact("onnx")), Making(onnx2tf_python=str(python)))
    assert file.status == "not-run"
    assert file.reason.startswith("onnx2tf is not in this environment")


def test_an_export_that_breaks_fails() -> None:
    blank = File("xxs", "onnx", "peer", ours=False)
    trace = "Traceback (most recent call last):\n  File ...\ntorch.SomeError: no such op\n\nmore words"
    broken = failed(blank, Cost(1, 1.0, 1.0, "", trace))
    assert (broken.status, broken.reason) == ("fail", "the export failed: torch.SomeError: no such op")
    assert failed(blank, Cost(MISSING, 1.0, 1.0, "", "x is not installed\n")).status == "not-run"
    assert error_line("") == "it said nothing"


# Forms


def test_forms_of_a_format() -> None:
    assert forms_of("onnx", ["default", "tflite:winograd", "onnx:flat"]) == ["default", "flat"]
    assert forms_of("coreml", ["onnx:flat"]) == ["default"]


def test_a_form_goes_to_the_exporter(monkeypatch: pytest.MonkeyPatch, source: Source) -> None:
    asked: list[dict[str, Any]] = []
    result = SimpleNamespace(artifact=SimpleNamespace(path="place"))
    monkeypatch.setattr(peer_files, "export", lambda model, **options: asked.append(options) or [result])
    file = peer_files.export_ours(source, "onnx", "flat", 1)
    assert (file.name, file.place, asked[0]["form"]) == ("mvit-export (flat)", "place", "flat")

    def refuse(model, **options):
        raise UsageError("no such form")

    monkeypatch.setattr(peer_files, "export", refuse)
    file = peer_files.export_ours(source, "onnx", "flat", 1)
    assert (file.status, file.reason) == ("not-run", "no such form")


def test_the_default_form_is_the_commands_own(monkeypatch: pytest.MonkeyPatch, source: Source) -> None:
    asked: list[list[str]] = []
    seconds = iter([3.0, 1.0, 2.0, 6.0, 4.0, 5.0])
    out = json.dumps({"artifacts": [{"path": "place"}]})
    finished = lambda command: asked.append(command) or Cost(0, next(seconds), 1.0, out, "")  # noqa: E731
    monkeypatch.setattr(peer_files, "cost_of", finished)
    file = peer_files.export_ours(source, "onnx", "default", 3)
    assert (file.place, file.export_s, file.verified_s) == ("place", 2.0, 5.0)
    assert ["--no-verify" in command for command in asked] == [True] * 3 + [False] * 3
    assert not any("form" in word for command in asked for word in command)
    monkeypatch.setattr(peer_files, "cost_of", lambda command: Cost(2, 1.0, 1.0, "", "error: no disk"))
    assert peer_files.export_ours(source, "onnx", "default", 1).reason == "the export failed: error: no disk"


# What it costs


@pytest.mark.slow
def test_cost_is_that_of_the_command_alone() -> None:
    ballast = bytearray(200_000_000)  # of this process, which must not count
    small = cost_of([sys.executable, "-c", "print('said')"])
    large = cost_of([sys.executable, "-c", "x = b'1' * 80_000_000; raise SystemExit(7)"])
    del ballast
    assert (small.code, small.out, small.peak_rss_mb < 60) == (0, "said\n", True)
    assert large.code == 7 and 80 < large.peak_rss_mb < 140
    late = cost_of([sys.executable, "-c", "import time; time.sleep(60)"], limit=0.5)
    assert late.code == TIMED_OUT and 0.5 <= late.seconds < 30


# Tables


def rows_of(*milliseconds: float | None) -> list[dict[str, Any]]:
    """Timings of ours and of peers that take so long; None for one that failed."""
    files = [
        File("xxs", "onnx", "mvit-export" if index == 0 else f"peer {index}", ours=index == 0,
             status="fail" if ms is None else "pass", reason="wrong | weights" if ms is None else "")
        for index, ms in enumerate(milliseconds)
    ]  # fmt: skip
    rows = {file.name: bench_row(file.name, 1, ms) for file, ms in zip(files, milliseconds, strict=True) if ms}
    return [timing.to_json() for timing in peers_main.time_rows(files, 1, rows)]


def test_ratios_are_to_the_fastest_peer() -> None:
    ours, slow, fast = rows_of(8.0, 16.0, 10.0)
    assert [row["best_peer"] for row in (ours, slow, fast)] == [False, False, True]
    assert ours["to_best"]["median"] == 0.8 and ours["ours_to_it"] is None
    assert slow["to_best"]["median"] == 1.6 and slow["ours_to_it"]["median"] == 0.5
    assert fast["to_best"] is None and fast["ours_to_it"]["interval"] == [0.8, 0.8]


def test_latency_table() -> None:
    lines = latency_table(rows_of(8.0, None, 10.0)).splitlines()
    assert lines[0].startswith("| variant | runtime | threads | file |")
    assert lines[2:] == [
        "| xxs | onnxruntime 1.0 | 1 | mvit-export | 8.00 [8.00, 8.00] | 0.800 [0.800, 0.800] | - |",
        "| xxs | onnx | 1 | peer 1 | FAIL: wrong / weights | - | - |",
        "| xxs | onnxruntime 1.0 | 1 | peer 2 | 10.00 [10.00, 10.00] | 1 | 0.800 [0.800, 0.800] |",
    ]


def test_summary_has_ours_beside_the_fastest_peer() -> None:
    twice, wrong = ([row | {"threads": 2} for row in rows_of(ms, 9.0)] for ms in (8.0, None))
    lines = summary_table([*rows_of(8.0, 16.0, 10.0), *twice, *wrong]).splitlines()
    assert lines[2:] == [
        "| xxs | onnxruntime 1.0 | 1 | mvit-export | 8.00 | 0.800 [0.800, 0.800] | peer 2 | 10.00 |",
        "| xxs | onnxruntime 1.0 | 2 | mvit-export | 8.00 | 0.889 [0.889, 0.889] | peer 1 | 9.00 |",
        "| xxs | onnx | 2 | mvit-export | FAIL: wrong / weights | - | - | - |",
    ]
    assert summary_table(rows_of(8.0, None)).splitlines()[2:] == [
        "| xxs | onnxruntime 1.0 | 1 | mvit-export | 8.00 | - | - | - |"
    ]


def test_latency_table_without_ours_or_without_peers() -> None:
    assert rows_of(None, 10.0)[1]["ours_to_it"] is None
    assert rows_of(8.0, None)[0]["to_best"] is None
    assert "FAIL" in latency_table(rows_of(None, None))


def test_file_table() -> None:
    measured = File(
        "xxs", "onnx", "mvit-export", True, "pass", "", "place", 130.04, 5_210_000, 387, 12.34, 456.7, 15.0, 480.0
    )
    missing = File("xxs", "tflite", "timm -> onnx2tf", False, reason="not installed")
    assert file_table([asdict(measured), asdict(missing)]).splitlines()[2:] == [
        "| xxs | onnx | mvit-export | PASS | 130.0 dB | 5.21 MB | 387 | 12.3 s | 457 MB | 15.0 s | 480 MB |",
        "| xxs | tflite | timm -> onnx2tf | NOT-RUN: not installed | - | - | - | - | - | - | - |",
    ]


# The command


def test_no_export_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers_main.main(["--no-export"])
    assert "--no-export needs the FOLDER of an earlier run" in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--variants", "xxs", "--formats", "onnx", "--threads", "1", "--budget", "1", "--size", "64"]
    peers_main.main([str(tmp_path), *options])
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    names = ["mvit-export", "timm -> torch.onnx", "transformers -> torch.onnx"]
    assert [file["name"] for file in document["files"]] == names
    assert all(file["status"] == "pass" and file["export_s"] > 1 < file["export_mb"] for file in document["files"])
    assert [timing["name"] for timing in document["timings"]] == names
    assert document["timings"][0]["to_best"]["median"] > 0
    assert sum(timing["best_peer"] for timing in document["timings"]) == 1
    peers_main.main([str(tmp_path), *options, "--no-export", "--json", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())
    assert [file["export_s"] for file in again["files"]] == [file["export_s"] for file in document["files"]]
