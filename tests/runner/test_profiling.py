"""Profiles by op type: whole, of the file that was asked for, and refused in words where there is no profiler."""

from __future__ import annotations

import ast
import ctypes
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import ROOT

from mvit_export.artifact import Artifact, read_artifact
from mvit_export.benchmarks.devices.worker import pack_runner
from mvit_export.formats.table import FORMATS
from mvit_export.readers.inspect import inspect_artifact
from mvit_export.readers.tflite import open_tflite
from mvit_export.runner import profile_ops
from mvit_export.runner.profile_ops import ProfilerUnavailable, Row, make_rows, profile_onnx, profile_tflite

PROFILERS = {"onnx": profile_onnx, "tflite": profile_tflite}
IMAGE = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)


@pytest.fixture
def artifact(tiny_artifact: Callable[..., Path]) -> Callable[[str], Artifact]:
    return lambda fmt: read_artifact(tiny_artifact(fmt))


def by_type(rows: list[Row]) -> dict[str, Row]:
    return {row["type"]: row for row in rows}


@pytest.mark.parametrize("fmt", PROFILERS)
def test_rows_are_whole(artifact: Callable[[str], Artifact], fmt: str) -> None:
    rows = PROFILERS[fmt](str(artifact(fmt).model_path), {"image": IMAGE}, runs=20)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    total = sum(row["ms"] for row in rows)
    assert all(row["share"] == pytest.approx(row["ms"] / total) and row["ms"] >= 0 for row in rows)
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    assert len(by_type(rows)) == len(rows) and by_type(rows)["(runtime)"]["count"] == 0
    json.dumps(rows, allow_nan=False)  # plain numbers


def test_sum_is_about_the_latency_onnx(tmp_path: Path) -> None:
    """On a few heavy nodes, where the profiler's own microseconds do not matter."""
    shape, node = [1, 16, 128, 128], onnx.helper.make_node
    weight = onnx.numpy_helper.from_array(np.random.default_rng(0).random((16, 16, 3, 3), np.float32), "w")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("image", "logits")]
    nodes = [
        node("Conv", ["image", "w"], ["c"], pads=[1] * 4),
        node("Softmax", ["c"], ["s"]),
        node("Erf", ["s"], ["e"]),
    ]
    graph = onnx.helper.make_graph(
        [*nodes, node("Conv", ["e", "w"], ["logits"], pads=[1] * 4)], "g", values[:1], values[1:], [weight]
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)])
    onnx.save(model, tmp_path / "m.onnx")
    feeds = {"image": np.random.default_rng(0).random(shape, np.float32)}
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    before = latency(lambda: session.run(None, feeds))
    rows = profile_onnx(str(tmp_path / "m.onnx"), feeds, runs=20)
    assert by_type(rows)["Conv"]["count"] == 2 and by_type(rows)["Erf"]["ms"] > 0
    check_sum(rows, before, latency(lambda: session.run(None, feeds)))


def test_sum_is_about_the_latency_tflite(artifact: Callable[[str], Artifact]) -> None:
    session = open_tflite(artifact("tflite"))
    before = latency(lambda: session.run(IMAGE))
    rows = profile_tflite(str(artifact("tflite").model_path), {"image": IMAGE}, runs=20)
    check_sum(rows, before, latency(lambda: session.run(IMAGE)))


def latency(run: Callable[[], object]) -> float:
    """The mean of the faster half of 40 runs, in ms, as in a profile."""
    times = []
    for _ in range(40):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.mean(sorted(times)[:20]))


def check_sum(rows: list[Row], *latencies: float) -> None:
    """Loosely: other work on the machine comes and goes, and of a quick model the profiler is a good part."""
    assert 0.2 * min(latencies) < sum(row["ms"] for row in rows) < 5 * max(latencies)


def test_onnx_types_are_those_of_the_optimised_graph(artifact: Callable[[str], Artifact]) -> None:
    rows = by_type(profile_onnx(str(artifact("onnx").model_path), {"image": IMAGE}, runs=3))
    operators = inspect_artifact(artifact("onnx"))["operators"]
    assert rows["Conv"]["count"] == operators["Conv"] and rows["Softmax"]["count"] == operators["Softmax"]
    assert "QuickGelu" in rows and "QuickGelu" not in operators, "x * sigmoid(x), fused"
    assert rows["Conv"]["ms"] > 0


def test_xnnpack_shows_its_kernels_not_one_delegate(artifact: Callable[[str], Artifact]) -> None:
    rows = by_type(profile_tflite(str(artifact("tflite").model_path), {"image": IMAGE}, runs=3))
    operators = inspect_artifact(artifact("tflite"))["operators"]
    assert sum(row["count"] for kind, row in rows.items() if kind.startswith("Softmax")) == operators["SOFTMAX"]
    assert rows["Convolution (NHWC, F32) DWConv"]["count"] == operators["DEPTHWISE_CONV_2D"]
    assert any(kind.startswith("Fully Connected") and row["ms"] > 0 for kind, row in rows.items())
    assert not any("elegate" in kind for kind in rows)


def test_without_xnnpack_the_types_are_the_files(artifact: Callable[[str], Artifact]) -> None:
    rows = by_type(profile_tflite(str(artifact("tflite").model_path), {"image": IMAGE}, runs=3, xnnpack=False))
    found = {kind: row["count"] for kind, row in rows.items() if kind != "(runtime)"}
    assert found == inspect_artifact(artifact("tflite"))["operators"]


@pytest.mark.parametrize("form", FORMATS["tflite"].forms)
def test_forced_fp16_leaves_nothing_in_fp32(tiny_artifact: Callable[..., Path], form: str) -> None:
    """What follows an op without fp16 kernel XNNPACK leaves in fp32, and says nothing."""
    path = read_artifact(tiny_artifact("tflite", form=form)).model_path
    rows = profile_tflite(str(path), {"image": IMAGE}, runs=3, fp16=True)
    kinds = " ".join(row["type"] for row in rows)
    assert "F16" in kinds and "F32" not in kinds


def test_only_xnnpack_has_fp16_kernels(artifact: Callable[[str], Artifact]) -> None:
    with pytest.raises(ValueError, match="only XNNPACK has fp16 kernels"):
        profile_tflite(str(artifact("tflite").model_path), {"image": IMAGE}, runs=3, fp16=True, xnnpack=False)


def test_what_is_profiled_is_the_inference_of_that_input(artifact: Callable[[str], Artifact]) -> None:
    """Through the C library comes what the interpreter computes."""
    with ExitStack() as stack:
        model = profile_ops.LiteRtModel(stack, str(artifact("tflite").model_path), threads=1, xnnpack=True, fp16=False)
        model.feed({"image": IMAGE})
        model.profile_run()
        expected, address = open_tflite(artifact("tflite")).run(IMAGE)["logits"], ctypes.c_void_p()
        model._call("LiteRtLockTensorBuffer", model._outputs["logits"], ctypes.byref(address), 0)
        found = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), expected.shape).copy()
    np.testing.assert_array_equal(found, expected)


def test_every_run_is_counted_alone(artifact: Callable[[str], Artifact]) -> None:
    """LiteRT's summary adds up from run to run; ours does not."""
    with ExitStack() as stack:
        model = profile_ops.LiteRtModel(stack, str(artifact("tflite").model_path), threads=1, xnnpack=False, fp16=False)
        runs = [model.profile_run() for _ in range(30)]
    sums = [sum(ms for ms, _ in run.values()) for run in runs]
    assert min(sums[20:]) < 3 * min(sums[:10])


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"picture": IMAGE}, r"^the file's inputs are \['image'\], given: \['picture'\]$"),
        ({"image": IMAGE[:, :, :32]}, r"^image takes 49152 bytes, given: 24576 \(\(1, 3, 32, 64\)\)$"),
    ],
)
def test_wrong_feeds(artifact: Callable[[str], Artifact], feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile_tflite(str(artifact("tflite").model_path), feeds, runs=1)


# The arithmetic


def test_rest_of_the_latency_is_the_runtimes() -> None:
    rows = make_rows([{"Conv": (3.0, 2), "Add": (1.0, 5)}] * 4, [5.0, 5.0, 90.0, 80.0])
    assert rows == [
        {"type": "Conv", "ms": 3.0, "share": 0.6, "count": 2},
        {"type": "(runtime)", "ms": 1.0, "share": 0.2, "count": 0},
        {"type": "Add", "ms": 1.0, "share": 0.2, "count": 5},
    ]


def test_disturbed_runs_do_not_count() -> None:
    quiet = [{"Conv": (3.0, 1), "Add": (1.0, 1)}, {"Conv": (2.0, 1), "Add": (1.0, 1)}]
    disturbed = [{"Conv": (3.0, 1), "Add": (100.0, 1)}, {"Conv": (300.0, 1), "Add": (1.0, 1)}]
    rows = by_type(make_rows([disturbed[0], *quiet, disturbed[1]], [3.0]))
    assert (rows["Conv"]["ms"], rows["Add"]["ms"], rows["(runtime)"]["ms"]) == (2.5, 1.0, 0.0)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


@pytest.mark.parametrize("per_run", [[], [{}], [{}, {"Conv": (1.0, 1)}]], ids=["no run", "no op", "a run without ops"])
def test_profile_of_nothing_is_refused(per_run: list[profile_ops.OpTimes]) -> None:
    with pytest.raises(ProfilerUnavailable, match=r"^the profiler reported no op at all$"):
        make_rows(per_run, [1.0])


def test_onnx_events_belong_to_their_run() -> None:
    def event(name: str, start: int, length: int, op: str = "", category: str = "Node") -> dict[str, object]:
        return {"cat": category, "name": name, "ts": start, "dur": length, "args": {"op_name": op}}

    events = [
        event("model_loading_uri", 0, 90, category="Session"),
        event("a_kernel_time", 110, 20, "Conv"),
        event("b_kernel_time", 140, 30, "Conv"),
        event("b_fence_after", 171, 5, "Conv"),
        event("model_run", 100, 100, category="Session"),
        event("a_kernel_time", 310, 5, "Add"),
        event("model_run", 300, 50, category="Session"),
    ]
    assert profile_ops.onnx_op_times(events) == [{"Conv": (0.05, 2)}, {"Add": (0.005, 1)}]


# No profiler


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (
            None,
            r"^per-op times of TFLite files come from ai-edge-litert, which is not installed \(tflite-runtime has no",
        ),
        ("2.4.1", r"^the profiler of ai-edge-litert 2.4.1 is not known here, only that of 2.3$"),
        ("1.4.0", r"^the profiler of ai-edge-litert 1.4.0 is not known here"),
    ],
)
def test_runtime_without_profiler(
    artifact: Callable[[str], Artifact], monkeypatch: pytest.MonkeyPatch, version: str | None, message: str
) -> None:
    def find(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    path = str(artifact("tflite").model_path)
    monkeypatch.setattr(importlib.metadata, "version", find)
    with pytest.raises(ProfilerUnavailable, match=message):
        profile_tflite(path, {"image": IMAGE})


def test_wheel_without_the_c_library(
    artifact: Callable[[str], Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ai_edge_litert

    path = str(artifact("tflite").model_path)
    monkeypatch.setattr(ai_edge_litert, "__path__", [str(tmp_path)])
    with pytest.raises(ProfilerUnavailable, match=r"^ai-edge-litert 2.3\S* came without its C library, libLiteRt$"):
        profile_tflite(path, {"image": IMAGE})


def test_file_that_the_library_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "bad.tflite").write_bytes(b"no flatbuffer" * 100)
    with pytest.raises(
        ProfilerUnavailable, match=r"does not work with this file: LiteRtCreateModelFromFile gave error \d+$"
    ):
        profile_tflite(str(tmp_path / "bad.tflite"), {"image": IMAGE})


def test_no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProfilerUnavailable, match=r"^onnxruntime does not import "):
        profile_onnx("model.onnx", {"image": IMAGE})


@pytest.mark.parametrize("summary", ["", "===== Summary by node type =====\n", "another table\nConv 3 0.5 100%\n"])
def test_summary_of_another_form(summary: str) -> None:
    with pytest.raises(ProfilerUnavailable, match=r"^the summary of LiteRT's profiler has another form"):
        profile_ops.tflite_op_times(summary)


# On a device


def test_file_works_alone(artifact: Callable[[str], Artifact], tmp_path: Path) -> None:
    """It may be copied to where there is no mvit_export, and leaves no trace file there."""
    shutil.copy(ROOT / "mvit_export/runner/profile_ops.py", tmp_path)
    code = f"""if True:
        import json, sys, numpy, profile_ops
        feeds = {{"image": numpy.zeros((1, 3, 64, 64), "float32")}}
        one = profile_ops.profile_onnx({str(artifact("onnx").model_path)!r}, feeds, runs=1)
        other = profile_ops.profile_tflite({str(artifact("tflite").model_path)!r}, feeds, runs=1)
        print(json.dumps([len(one) > 5, len(other) > 5, "mvit_export" in sys.modules]))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, True, False]
    assert sorted(path.name for path in tmp_path.iterdir()) in (["__pycache__", "profile_ops.py"], ["profile_ops.py"])


@pytest.mark.parametrize("file", sorted((ROOT / "mvit_export/runner").glob("*.py")), ids=lambda file: file.name)
def test_files_read_as_python_3_8(file: Path) -> None:
    ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_runner_starts_from_one_file_without_the_package(tmp_path: Path) -> None:
    """As it does on a device: isolated from this folder and from installed packages."""
    packed = pack_runner(tmp_path)
    question = '{"do": "open", "model": "m", "runtime": "coreml", "threads": 1}\n'
    done = subprocess.run(
        [sys.executable, "-IS", packed], input=question, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["error"]["message"].startswith("numpy is not installed beside ")
