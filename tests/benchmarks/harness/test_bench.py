"""`mvit-export bench` as a user runs it, on a tiny network: what is measured, refused, flagged and compared."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvit_export.artifact import read_artifact
from mvit_export.benchmarks.devices.local import Local
from mvit_export.benchmarks.devices.probe import RunnerProbe
from mvit_export.benchmarks.devices.worker import RunError, Worker
from mvit_export.benchmarks.harness import bench as bench_module
from mvit_export.benchmarks.harness.baseline import Baseline
from mvit_export.benchmarks.harness.bench import RESTLESS, doubts
from mvit_export.benchmarks.harness.configurations import check_runtime, plan_settings
from mvit_export.benchmarks.harness.roofline import SIDE, measure_roofline, reader_of, weights
from mvit_export.benchmarks.harness.timing import Series
from mvit_export.errors import ArtifactError, DeviceError, UsageError
from mvit_export.results.latency import LatencyReport, Measurement
from mvit_export.runner.__main__ import Runner

QUICK = ("--budget", "0.5", "--no-roofline")
COMPARED = ("--budget", "2", "--no-roofline")  # enough rounds for a verdict on a busy machine
CONTRACT = {
    "path", "format", "precision", "runtime", "device", "threads", "load_ms", "first_ms", "median_ms", "p90_ms",
    "p99_ms", "samples_ms", "peak_rss_mb", "macs", "params", "bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def artifacts(tiny_artifact, tmp_path_factory) -> Path:
    """A folder of its own with both formats, since bench writes into artifacts."""
    folder = tmp_path_factory.mktemp("bench")
    for fmt in ("onnx", "tflite"):
        shutil.copytree(tiny_artifact(fmt), folder / f"{fmt}-fp32")
    return folder


RUNNER = [sys.executable, "-m", "mvit_export.runner"]


def start(**options) -> subprocess.Popen[bytes]:
    return subprocess.Popen(RUNNER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.fixture(scope="module")
def measured(cli, artifacts):
    return cli("bench", artifacts, "--threads", "1,2", "--budget", "1", "--json")


def test_every_artifact_and_thread_count_is_measured(measured, artifacts):
    rows = measured.json["results"]
    assert measured.code == 0, measured.err
    assert [(Path(row["path"]).name, row["threads"]) for row in rows] == [
        ("onnx-fp32", 1), ("tflite-fp32", 1), ("onnx-fp32", 2), ("tflite-fp32", 2),
    ]  # fmt: skip
    for row in rows:
        assert row.keys() >= CONTRACT
        assert row["min_ms"] <= row["median_interval_ms"][0] <= row["median_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["median_ms"] == pytest.approx(float(np.median(row["samples_ms"])))
        assert len(row["samples_ms"]) == row["rounds"] * row["samples_per_round"]
        assert row["macs"] == read_artifact(Path(row["path"])).manifest.model.macs
        assert 0 < row["load_ms"] < 10_000 and 0 < row["load_warm_ms"] < 10_000 and 0 < row["first_ms"] < 10_000
        assert 0 < row["roofline"]["peak_share"] < 1.2
        assert row["roofline"]["ceiling_ms"] < row["median_ms"]


def test_ratios_stand_inside_one_group(measured):
    rows = measured.json["results"]
    assert [row["ratio"] is None for row in rows] == [True, False, True, False]
    for base, row in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert base["path"] in row["ratio"]["to"]
        assert row["ratio"]["interval"][0] <= row["ratio"]["median"] <= row["ratio"]["interval"][1]
        assert row["ratio"]["median"] == pytest.approx(row["median_ms"] / base["median_ms"], rel=0.5)


def test_rows_are_kept_in_the_artifact(measured, artifacts):
    stored = json.loads((artifacts / "tflite-fp32" / "latency.json").read_text())
    assert stored["results"] == [row for row in measured.json["results"] if "tflite" in row["path"]]
    assert stored["environment"]["cpu"] == measured.json["environment"]["cpu"]


def test_people_read_medians_with_intervals(cli, artifacts):
    done = cli("bench", artifacts / "onnx-fp32", *QUICK)
    assert done.code == 0, done.err
    assert "median" in done.out and "ms [" in done.out and "1x3x64x64, 1 thread, onnxruntime" in done.out


def test_core_ml_latency_is_not_run_off_macos(cli, tiny_artifact, tmp_path):
    if sys.platform == "darwin":
        pytest.skip("Core ML runs here")
    place = shutil.copytree(tiny_artifact("coreml", "fp16"), tmp_path / "coreml-fp16")
    done = cli("bench", place, "--json", *QUICK)
    (row,) = done.json["results"]
    assert done.code == 3
    assert row["status"] == "not-run" and "macOS only" in row["reason"]
    assert row["median_ms"] is None and row["samples_ms"] == []


def test_pytorch_is_measured_once_for_all_files_of_a_model(cli, artifacts):
    done = cli("bench", artifacts, "--runtime", "pytorch,onnxruntime,litert", "--json", *QUICK)
    assert [row["runtime"].split()[0] for row in done.json["results"]] == ["torch", "onnxruntime", "ai-edge-litert"]


def test_litert_without_xnnpack_runs_other_kernels(cli, artifacts):
    done = cli("bench", artifacts / "tflite-fp32", "--runtime", "litert,litert:builtin", "--json", *QUICK)
    names = [row["runtime"] for row in done.json["results"]]
    assert "XNNPACK" in names[0] and "builtin" in names[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--runtime", "onnxruntime:xnnpack"), "has no XnnpackExecutionProvider, only"),
        (("--runtime", "onnxruntime:cuda"), "expected one of cpu, xnnpack, coreml, nnapi, qnn"),
        (("--runtime", "tensorrt"), "expected one of onnxruntime, litert, coreml, pytorch"),
        (("--runtime", "litert:delegate=/nowhere/libgpu.so"), "/nowhere/libgpu.so does not load"),
        (("--runtime", "coreml:cpuOnly"), "takes coreml files, given: onnx, tflite"),
        (("--threads", "0"), "--threads is '0', expected positive numbers"),
        (("--threads", "99"), "99 threads were asked for, this process may use"),
        (("--batch", "4"), "takes batches of 1 only"),
        (("--batch", ""), "--batch is '', expected positive numbers"),
        (("--budget", "inf"), "'--budget': "),
        (("--image-size", "96"), "takes 64x64 only"),
        (("--max-slowdown", "10%"), "name one"),
        (("--max-slowdown", "lots", "--baseline", "x.json"), "expected a share such as 10%"),
        (("--max-slowdown", "", "--baseline", "x.json"), "expected a share such as 10%"),
        (("--baseline", "nowhere.json"), "nowhere.json is not a result of bench --json"),
        (("--device", "arm64"), "emulat"),
        (("--device", "toaster"), "expected one of local"),
    ],
)
def test_what_cannot_be_had_is_one_line_and_no_figure(cli, artifacts, arguments, words):
    done = cli("bench", artifacts, *QUICK, *arguments)
    assert done.code == 2
    assert words in done.err
    assert done.out == "" and len(done.err.splitlines()) == 1


def test_changed_file_is_not_measured(cli, artifacts, tmp_path):
    place = shutil.copytree(artifacts / "onnx-fp32", tmp_path / "onnx-fp32")
    next(place.glob("*.onnx")).open("ab").write(b"x")
    done = cli("bench", place, *QUICK)
    assert done.code == 2 and "was changed after the export" in done.err


def telemetry_allowed(scratch):
    """Variables under which ONNX Runtime would report, and write to `scratch`; CI alone would stop it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    return {**kept, "TMPDIR": str(scratch)}


def test_runner_lets_no_runtime_report_or_leave_files(artifacts, tmp_path):
    with Worker(start(env=telemetry_allowed(tmp_path)), where="local") as worker:
        worker.ask("open", model=str(next(artifacts.glob("onnx*/*.onnx"))), runtime="onnxruntime", threads=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_bench_leaves_no_record(cli, artifacts, tmp_path, how):
    place = shutil.copytree(artifacts / "onnx-fp32", tmp_path / "onnx-fp32")
    (place / "latency.json").unlink(missing_ok=True)
    endless = ["--budget", "60", "--precision", "0.0001%"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "mvit_export", "bench", str(place), *endless],
        env=telemetry_allowed(scratch),
    )
    while not list(scratch.glob("*/runner.pyz")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(how)
    assert process.wait(20) == 130
    assert not (place / "latency.json").exists()
    assert not list(scratch.iterdir())


def test_too_many_threads_are_refused_before_anything_is_measured(monkeypatch, artifacts):
    monkeypatch.setattr(Local, "probe", None)  # nothing may be opened
    with pytest.raises(UsageError, match=r"^99 threads were asked for, local has \d+ cores"):
        bench_module.run_bench([artifacts], threads=[1, 99])


def test_artifact_given_twice_is_measured_once(cli, artifacts):
    place = artifacts / "onnx-fp32"
    done = cli("bench", place, artifacts / "." / ".." / artifacts.name / "onnx-fp32", "--json", *QUICK)
    assert len(done.json["results"]) == 1
    assert len(plan_settings([read_artifact(place)], threads=[1, 1])) == 1


def with_batch(artifact, batch):
    manifest = artifact.manifest
    spec = replace(manifest.inputs[0], shape=(batch, *manifest.inputs[0].shape[1:]))
    return replace(artifact, manifest=replace(manifest, inputs=(spec,)))


def test_macs_are_those_of_the_batch(artifacts):
    """The manifest counts them at the exported batch, which is 1 where any is taken."""
    whole = read_artifact(artifacts / "onnx-fp32")
    macs = whole.manifest.model.macs
    for exported, batches, expected in ((1, [], macs), (4, [], macs), (4, [4], macs), (None, [3], 3 * macs)):
        (setting,) = plan_settings([with_batch(whole, exported)], batches=batches)
        assert bench_module.blank_row(setting, Local()).macs == expected
    with pytest.raises(UsageError, match="takes batches of 4 only"):
        plan_settings([with_batch(whole, 4)], batches=[1])


def test_model_that_fails_while_it_runs_is_an_error_in_one_line(artifacts):
    (setting,) = plan_settings([read_artifact(artifacts / "onnx-fp32")])
    other = replace(setting, input_shape=(1, 3, 8, 8))
    with Local() as device, pytest.raises(ArtifactError, match="onnx fails in onnxruntime at 'feed': "):
        bench_module.Bench(device, bench_module.Options(roofline=False)).run([other])


def test_peak_that_cannot_be_had_does_not_lose_the_figures(monkeypatch, artifacts):
    def fail(*_):
        raise RunError("out of memory")

    monkeypatch.setattr(bench_module, "measure_roofline", fail)
    options = bench_module.Options(bench_module.Plan(budget_s=0.3))
    with Local() as device:
        settings = plan_settings([read_artifact(artifacts / "onnx-fp32")])
        (row,) = bench_module.Bench(device, options).run(settings).results
    assert row.status == "measured" and "no roofline: out of memory" in row.warnings


# Baselines


@pytest.fixture
def report(measured):
    """A real report with samples of a quiet machine, as many as make an interval."""
    made = copy.deepcopy(measured.json)
    for row in made["results"]:
        samples = np.random.default_rng(0).normal(10, 0.1, 100)
        row.update(samples_ms=list(samples), cpu_samples_ms=list(samples), samples_per_round=5, rounds=20)
        row.update(cpu_median_ms=10.0, involuntary_per_s=0.0)
    return made


def read(document):
    return LatencyReport.from_json(document)


def slower(report, factor):
    changed = copy.deepcopy(report)
    for row in changed["results"]:
        for times in ("samples_ms", "cpu_samples_ms"):
            row[times] = [factor * sample for sample in row[times]]
    return changed


@pytest.mark.parametrize(("factor", "status"), [(1.0, "pass"), (0.8, "pass"), (1.5, "fail")])
def test_baseline_fails_only_where_the_interval_says_so(report, tmp_path, factor, status):
    file = tmp_path / "old.json"
    file.write_text(json.dumps(report))
    new = Baseline.read(file, 0.1).judge(read(slower(report, factor)))
    assert new.status == status
    assert {row.baseline.status for row in new.results} == {status}


@pytest.mark.parametrize(
    "changes",
    [
        {"samples_per_round": 0},
        {"samples_per_round": None},
        {"samples_ms": [1.0, 2.0, 3.0], "samples_per_round": 2},
        {"samples_ms": ["a", "b"], "samples_per_round": 1},
        {"samples_ms": [0.0, 1.0], "samples_per_round": 1},
        {"samples_ms": [float("nan")], "samples_per_round": 1},
        {"samples_ms": 5},
        {"cpu_samples_ms": [1.0]},
        {"cpu_samples_ms": [0.0] * 100},
        {"runtime": None},
    ],
)
def test_damaged_baseline_is_refused_before_anything_is_measured(report, tmp_path, changes):
    old = copy.deepcopy(report)
    old["results"][0].update(changes)
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old))
    with pytest.raises(ArtifactError, match=r"old.json is not a result of bench --json \(.*\); measure it again$"):
        Baseline.read(file, 0.1)


def test_too_few_rounds_are_no_evidence(report, tmp_path):
    short = copy.deepcopy(report)
    for row in short["results"]:
        row.update(samples_ms=[10.0] * 3, cpu_samples_ms=[10.0] * 3, samples_per_round=1, rounds=3)
    file = tmp_path / "old.json"
    file.write_text(json.dumps(short))
    new = Baseline.read(file, 0.1).judge(read(slower(short, 2)))
    assert new.status == "not-run"
    assert "3 rounds are too few" in new.results[0].baseline.reason


def test_rows_that_only_the_path_tells_apart(report, tmp_path):
    old, new = copy.deepcopy(report), copy.deepcopy(report)
    twin = copy.deepcopy(old["results"][0]) | {"path": "elsewhere"}
    twin["samples_ms"] = [0.1 * sample for sample in twin["samples_ms"]]
    old["results"].insert(0, twin)
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old))
    assert Baseline.read(file, 1.0).judge(read(new)).results[0].baseline.status == "pass"
    new["results"][0]["path"] = "a third place"
    assert "several such rows" in Baseline.read(file, 1.0).judge(read(new)).results[0].baseline.reason


def sampled(path, ms, *, fmt="onnx", precision="fp32", shape=(1, 3, 64, 64)):
    samples = tuple(np.random.default_rng(0).normal(ms, 0.01 * ms, 20))
    return Measurement(
        path=path, model="net", format=fmt, precision=precision, runtime=f"runtime of {fmt}", threads=1,
        input_shape=shape, status="measured", samples_ms=samples, samples_per_round=1,
    )  # fmt: skip


def judged(own, rows):
    report = Baseline(0.1, artifacts=tuple(map(Path, own))).judge(LatencyReport("pass", {}, tuple(rows)))
    return [row.baseline.status for row in report.results]


def test_artifacts_beside_are_compared_with_their_own_kind():
    old = [sampled("old/a", 10), sampled("old/b", 20, fmt="tflite")]
    new = [sampled("new/a", 15), sampled("new/b", 20, fmt="tflite"), sampled("new/c", 1, precision="int8")]
    assert judged(["old/a", "old/b"], [*old, *new]) == ["pass", "pass", "fail", "pass", "not-run"]


def test_one_artifact_beside_is_the_limit_for_every_file_of_the_same_input():
    rows = [sampled("old", 10), sampled("new", 15, precision="int8"), sampled("other", 15, shape=(1, 64, 64, 3))]
    assert judged(["old"], rows) == ["pass", "fail", "not-run"]


def test_slower_within_the_noise_does_not_fail(report, tmp_path):
    noisy = slower(report, 1.0)
    for row in noisy["results"]:
        mood = np.exp(0.4 * np.random.default_rng(0).standard_normal(row["rounds"]))
        row["samples_ms"] = row["cpu_samples_ms"] = list(np.repeat(10 * mood, row["samples_per_round"]))
    file = tmp_path / "old.json"
    file.write_text(json.dumps(noisy))
    new = Baseline.read(file, 0.1).judge(read(slower(noisy, 1.12)))
    assert new.status == "pass"
    assert "not shown to be over" in new.results[0].baseline.reason


def test_another_machine_or_a_missing_row_is_not_compared(report, tmp_path):
    other = copy.deepcopy(report)
    other["environment"]["cpu"] = "Another CPU"
    file = tmp_path / "old.json"
    file.write_text(json.dumps(other))
    found = Baseline.read(file, 0.1).judge(read(report))
    assert found.status == "not-run"
    assert "was measured on Another CPU" in found.results[0].baseline.reason
    other["results"] = []
    file.write_text(json.dumps(other))
    assert "no such row" in Baseline.read(file, 0.1).judge(read(report)).results[0].baseline.reason


def test_ort_file_is_no_slower_onnx_file(report):
    """They are different files; reports of earlier versions do not say which a row is of."""
    old = copy.deepcopy(report)
    for row in old["results"]:
        del row["ort"]
    baseline = Baseline(0.1, report=read(old))
    assert {row.baseline.status for row in baseline.judge(read(report)).results} == {"pass"}
    for row in report["results"]:
        row["ort"] = True
    assert "no such row" in baseline.judge(read(report)).results[0].baseline.reason


def test_baseline_through_the_command(cli, artifacts, report, tmp_path):
    file = tmp_path / "fast.json"
    file.write_text(json.dumps(slower(report, 0.01)))
    done = cli(
        "bench", artifacts / "onnx-fp32", "--baseline", file, "--max-slowdown", "10%", "--judge-by", "cpu", *COMPARED
    )
    assert done.code == 1
    assert "FAIL" in done.out and "times the baseline in CPU time, more than 1.1" in done.out


def test_artifact_as_baseline_is_measured_beside(cli, artifacts):
    done = cli(
        "bench", artifacts / "tflite-fp32", "--baseline", artifacts / "onnx-fp32", "--max-slowdown", "900%", "--json",
        "--judge-by", "cpu", *COMPARED,
    )  # fmt: skip
    assert done.code == 0
    base, other = done.json["results"]
    assert [Path(row["path"]).name for row in (base, other)] == ["onnx-fp32", "tflite-fp32"]
    assert base["baseline"]["reason"] == "the baseline itself"
    assert other["baseline"]["ratio"]["median"] == pytest.approx(
        other["cpu_median_ms"] / base["cpu_median_ms"], rel=0.2
    )


def test_file_of_fewer_bits_that_is_slower_is_flagged(monkeypatch, artifacts):
    """Two settings of one model, the second called fp16 and made slow."""

    class Slow(RunnerProbe):
        def sample(self, count):
            times = super().sample(count)
            return [5 * ms for ms in times] if self.setting.threads == 2 else times

    monkeypatch.setattr(Local, "probe", lambda device, setting, pin: Slow(setting, device, pin=pin))
    monkeypatch.setattr(bench_module, "blank_row", pretend_precision(bench_module.blank_row))
    settings = plan_settings([read_artifact(artifacts / "onnx-fp32")], threads=[1, 2])
    options = bench_module.Options(bench_module.Plan(budget_s=0.5), roofline=False)
    with Local() as device:
        rows = bench_module.Bench(device, options).run_group(settings)
    assert "SLOWER" not in " ".join(rows[0].warnings)
    assert "int8 is SLOWER than its fp32 sibling" in " ".join(rows[1].warnings)


def pretend_precision(blank_row):
    def made(setting, device):
        return replace(blank_row(setting, device), precision="int8" if setting.threads == 2 else "fp32")

    return made


# The runner and its near end


def test_runner_times_with_the_clock_it_is_given():
    ticks = iter(range(100))
    used = iter(range(0, 200, 2))
    runner = Runner(clock=lambda: float(next(ticks)), cpu_clock=lambda: float(next(used)))
    runner.call = lambda array: {}
    found = runner.do_sample(3)
    assert (found["ms"], found["cpu_ms"]) == ([1000.0] * 3, [2000.0] * 3)
    assert found["involuntary"] >= 0


def test_input_is_random_and_of_the_declared_type():
    seen = []
    runner = Runner()
    runner.call = lambda array: seen.append(array) or {}
    runner.do_feed([1, 4, 4, 3], "uint8")
    runner.do_feed([1, 3, 4, 4], "float32")
    assert [array.dtype.name for array in seen] == ["uint8", "float32"]
    assert all(len(np.unique(array)) > 20 for array in seen)


def test_runner_answers_when_its_runtime_has_gone_to_sleep():
    """A runtime's threads that still spin would take a core from the process that is sampled next."""
    spun = []

    def spin():
        start = time.thread_time()
        while time.thread_time() - start < 0.05:
            pass
        spun.append(True)

    def call(array):
        threads.append(threading.Thread(target=spin))
        threads[-1].start()
        return {}

    threads = []
    runner = Runner()
    runner.call = call
    runner.do_sample(1)
    assert spun == [True, True], "an untimed run and a timed one"


def test_runner_says_that_its_runtime_never_sleeps(monkeypatch):
    """The process's own time is told, not taken: on a busy machine a thread that spins may get none."""
    monkeypatch.setattr("mvit_export.runner.__main__.IDLE_TIMEOUT", 0.05)
    runner = Runner()
    runner.call = lambda array: {}
    monkeypatch.setattr("mvit_export.runner.__main__.time.process_time", time.monotonic)  # a core is never given back
    assert runner.do_sample(1)["restless"] is True
    monkeypatch.setattr("mvit_export.runner.__main__.time.process_time", lambda: 1.0)
    assert "restless" not in runner.do_sample(1)


def test_restless_runtime_is_told_in_its_row():
    class Restless:
        single_runs, restless = True, True

    series = Series(((1.0,),) * 30, settled=True, warmup=1)
    assert list(doubts(Restless(), series)) == [RESTLESS]


def test_runner_gives_what_the_runtime_gives(artifacts):
    artifact = read_artifact(artifacts / "onnx-fp32")
    array = np.random.default_rng(0).standard_normal((1, 3, 64, 64), dtype=np.float32)
    import onnxruntime

    (expected,) = onnxruntime.InferenceSession(artifact.model_path).run(None, {"image": array})
    with Worker(start(), where="local") as worker:
        worker.ask("open", model=str(artifact.model_path), runtime="onnxruntime", threads=1)
        assert np.array_equal(worker.run(array)["logits"], expected)


def test_runner_refuses_a_file_that_its_runtime_rejects(tmp_path):
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"no model")
    with Worker(start(), where="local") as worker, pytest.raises(ArtifactError, match="is rejected by onnxruntime"):
        worker.ask("open", model=str(file), runtime="onnxruntime", threads=1)


def test_failing_run_is_told_from_a_lost_runner(artifacts):
    model = str(read_artifact(artifacts / "onnx-fp32").model_path)
    with Worker(start(), where="local") as worker:
        worker.ask("open", model=model, runtime="onnxruntime", threads=1)
        with pytest.raises(RunError):
            worker.run(np.zeros((1, 3, 8, 8), np.float32))
        worker.process.kill()
        with pytest.raises(DeviceError, match="local was lost at 'hello'"):
            worker.ask("hello")


@pytest.mark.slow
def test_silent_runner_is_stopped():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdin=-1, stdout=-1, stderr=-1)
    with Worker(process, where="ssh:pi") as worker, pytest.raises(DeviceError, match="ssh:pi gave no answer"):
        worker.ask("hello", timeout=0.5)
    assert process.poll() is not None


@pytest.mark.parametrize("answer", ["Welcome!", "5", "null", '["ok"]', '"ok"', '{"error": 1}', "{}"])
def test_what_is_no_answer_is_an_error(answer):
    code = f"input(); print({answer!r}, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1)
    with Worker(process, where="ssh:pi") as worker, pytest.raises(DeviceError, match="expected the runner's JSON"):
        worker.ask("hello")


def test_runner_ends_with_its_input():
    assert subprocess.run(RUNNER, input=b"", timeout=60, check=True).returncode == 0


def test_forced_fp16_rounds_sums_that_fp32_does_not(artifacts):
    model = str(read_artifact(artifacts / "tflite-fp32").model_path)
    array = np.random.default_rng(0).standard_normal((1, 3, 64, 64), dtype=np.float32)
    outputs = []
    for runtime in ("litert", "litert:fp16"):
        with Worker(start(), where="local") as worker:
            worker.ask("open", model=model, runtime=runtime, threads=1)
            outputs.append(worker.run(array)["logits"])
    error = np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max()
    assert 1e-5 < error < 2e-2


def test_profile_names_op_types(cli, artifacts):
    done = cli("bench", artifacts, "--profile", "--json", *QUICK)
    for row, types in zip(done.json["results"], ({"Conv", "Softmax"}, {"Softmax (NC, F32)"}), strict=True):
        assert {op["type"] for op in row["profile"]} >= types
        assert sum(op["share"] for op in row["profile"]) == pytest.approx(1)


def test_threads_pin_the_process(artifacts):
    model = str(read_artifact(artifacts / "onnx-fp32").model_path)
    with Worker(start(), where="local") as worker:
        opened = worker.ask("open", model=model, runtime="onnxruntime", threads=1, pin=True)
    if sys.platform == "linux":
        assert len(opened["cpus"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["onnx", "tflite"])
def test_peak_is_that_of_a_product_the_runtime_really_computes(fmt, tmp_path):
    path = tmp_path / f"product.{fmt}"
    reader_of(fmt).write_product(path, weights())
    runtime = {"onnx": "onnxruntime", "tflite": "litert"}[fmt]
    x = np.random.default_rng(1).standard_normal((SIDE, SIDE), dtype=np.float32)
    with Worker(start(), where="local") as worker:
        worker.ask("open", model=str(path), runtime=runtime, threads=1)
        y = worker.run(x)["y"]

    expected = x @ (weights() if fmt == "onnx" else weights().T)
    assert np.abs(y - expected).max() < 1e-3
    with Local() as device:
        found = measure_roofline(runtime, fmt, 1, device)
    assert 0.1 < found.peak_gmacs < 1e4 and 0.1 < found.bandwidth_gbs < 1e4


def test_core_ml_runner_says_what_it_planned(monkeypatch):
    """The macOS path through a stand-in for coremltools: options reach it, and its plan is counted."""
    from types import SimpleNamespace as Namespace

    from mvit_export.runner import run_coreml

    class NeuralEngine: ...

    class Cpu: ...

    seen = {}
    usages = {"conv": NeuralEngine(), "softmax": Cpu(), "linear": NeuralEngine(), "const": None}
    block = Namespace(operations=list(usages))
    program = Namespace(functions={"main": Namespace(block=block)})

    class Plan:
        model_structure = Namespace(program=program)

        @staticmethod
        def load_from_path(path, compute_units):
            seen["plan"] = path, compute_units
            return Plan()

        def get_compute_device_usage_for_mlprogram_operation(self, operation):
            device = usages[operation]
            return device and Namespace(preferred_compute_device=device)

    class Model:
        def __init__(self, path, compute_units):
            seen["model"] = path, compute_units

        def get_spec(self):
            return Namespace(description=Namespace(input=[Namespace(name="image")], metadata=Namespace(userDefined={})))

        def predict(self, inputs):
            return {"logits": inputs["image"].sum()}

        def get_compiled_model_path(self):
            return "/compiled"

    units = Namespace(CPU_AND_NE="ane", ALL="all")
    fake = Namespace(models=Namespace(MLModel=Model, compute_plan=Namespace(MLComputePlan=Plan)), ComputeUnit=units)
    monkeypatch.setitem(sys.modules, "coremltools", fake)
    monkeypatch.setattr(run_coreml.platform, "system", lambda: "Darwin")
    runner_object = Runner()
    opened = runner_object.do_open(model="/m.mlpackage", runtime="coreml:cpuAndNeuralEngine", threads=1)
    assert seen["model"] == ("/m.mlpackage", "ane") and "cpuAndNeuralEngine" in opened["runtime"]
    assert runner_object.do_feed([1, 3, 4, 4], "float32")["first_ms"] >= 0
    assert runner_object.do_placement() == {"NeuralEngine": 2, "Cpu": 1}
    assert seen["plan"] == ("/compiled", "ane")


def test_runtime_names_are_checked():
    assert check_runtime("LiteRT:delegate=/a/b.so") == "litert:delegate=/a/b.so"
    for wrong in ("litert:delegate", "litert:delegate=", "pytorch:cuda", "litert:builtin=1"):
        with pytest.raises(UsageError, match="expected one of"):
            check_runtime(wrong)


IDLE_DELEGATE = """
typedef struct { void *data; int (*prepare)(void *, void *); void *other[3]; long flags; void *last; } Delegate;
static int prepare(void *context, void *delegate) { return 0; }
static Delegate idle = {0, prepare};
void *tflite_plugin_create_delegate(char **keys, char **values, unsigned long n, void (*report)(const char *)) {
  return &idle;
}
void tflite_plugin_destroy_delegate(void *delegate) {}
"""


def test_delegate_that_takes_no_op_is_an_error_not_a_cpu_run(cli, artifacts, tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a delegate with")
    library, source = tmp_path / "libidle.so", tmp_path / "idle.c"
    source.write_text(IDLE_DELEGATE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    done = cli("bench", artifacts / "tflite-fp32", "--runtime", f"litert:delegate={library}", *QUICK)
    assert done.code == 2
    assert "takes none of the model's ops" in done.err
