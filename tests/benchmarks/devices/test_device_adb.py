"""Android phones: adb's steps against a stand-in that executes for real, and the benchmark tool's printed words."""

from __future__ import annotations

import functools
import json
import os
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_adb import STUB

from mvit_export.artifact import Artifact, TensorSpec, load_golden, read_artifact
from mvit_export.benchmarks.devices import adb as adb_module
from mvit_export.benchmarks.devices.adb import Adb, explain, parse_devices
from mvit_export.benchmarks.devices.benchmark_model import (
    BenchmarkOptions,
    BenchmarkTool,
    Round,
    benchmark,
    check_binary,
    check_delegate,
    check_flags,
    open_session,
    parse_round,
    run_model,
    split_outputs,
    summarise,
)
from mvit_export.benchmarks.devices.table import open_device
from mvit_export.benchmarks.harness.configurations import plan_settings
from mvit_export.checks.comparison import judge_outcomes, run_cases
from mvit_export.checks.reference import Pair
from mvit_export.errors import ArtifactError, DeviceError, RuntimeUnavailable, UsageError
from mvit_export.formats.base import SAME_ARITHMETIC
from mvit_export.readers.tflite import open_tflite
from mvit_export.tasks.classification import CLASSIFICATION

SERIAL = "29091FDH2004VX"


class FakePhone:
    """The folder behind fake_adb.py."""

    def __init__(self, root: Path) -> None:
        self.root, self.tmp = root, root / "tmp"
        self.tmp.mkdir(parents=True)
        self.set(devices={SERIAL: "device"}, abi="arm64-v8a", fault="", gpu="full")

    def set(self, **changes: Any) -> None:
        file = self.root / "phone.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | changes))

    @property
    def left(self) -> list[str]:
        """What lies on the phone."""
        return sorted(path.name for path in self.tmp.iterdir())

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.root / "calls.txt").read_text().splitlines()]


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePhone:
    """`adb` on the PATH is the stand-in."""
    client = tmp_path / "bin" / "adb"
    client.parent.mkdir()
    client.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("fake_adb.py")} "$@"\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_ADB_ROOT", str(tmp_path / "phone"))
    return FakePhone(tmp_path / "phone")


def elf(path: Path, machine: int = 183) -> Path:
    """An ELF header for `machine` (183 is AArch64), and nothing that a processor could run."""
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, machine) + bytes(44) + STUB)
    return path


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    return elf(tmp_path / "android_aarch64_benchmark_model")


@pytest.fixture
def artifact(tiny_artifact: Callable[..., Path]) -> Artifact:
    return read_artifact(tiny_artifact("tflite"))


# Files and commands


@pytest.mark.slow
def test_files_come_back_as_they_went_and_nothing_stays(phone: FakePhone, tmp_path: Path) -> None:
    sent = tmp_path / "a file's name.bin"
    sent.write_bytes(bytes(range(256)) * 100)
    with Adb(SERIAL) as device:
        assert device.name == f"adb:{SERIAL}"
        place = device.put(sent, "it's here.bin")
        assert device.run(["wc", "-c", place], timeout=10).split()[0] == "25600"
        device.run(["cp", place, "copy.bin"], timeout=10)  # commands start in the scratch folder
        device.get("copy.bin", tmp_path / "back.bin")
        assert len(phone.left) == 1 and phone.left[0].startswith("mvit-export-")
    assert (tmp_path / "back.bin").read_bytes() == sent.read_bytes()
    assert phone.left == []


def test_two_uses_at_once_do_not_share_a_folder(phone: FakePhone) -> None:
    with Adb(SERIAL) as one, Adb(SERIAL) as other:
        assert one.scratch != other.scratch
        assert len(phone.left) == 2
    assert phone.left == []


def test_the_only_device_needs_no_serial(phone: FakePhone) -> None:
    with Adb(None) as device:
        assert device.name == f"adb:{SERIAL}"
        assert device.phone == adb_module.Phone("Pixel 7", "15", "arm64-v8a", os.cpu_count())
    assert all(call[:2] == ["-s", SERIAL] for call in phone.calls[1:])


def test_every_character_of_a_command_arrives(phone: FakePhone) -> None:
    words = ["a b", "$HOME", "it's", "`id`", "*", "", "semi;colon", 'quo"te']
    with Adb(SERIAL) as device:
        assert device.run(["printf", "%s\n", *words], timeout=10).splitlines() == words


def test_exit_codes_pass_even_where_the_client_drops_them(phone: FakePhone) -> None:
    phone.set(fault="crlf")
    with Adb(SERIAL) as device:
        assert device.shell(["sh", "-c", "echo one; echo two >&2; exit 3"], timeout=10) == adb_module.Finished(
            3, "one\ntwo\n"
        )
        message = rf"^adb:{SERIAL}: ls ended with exit code 2: ls: .*nothing.*No such file or directory$"
        with pytest.raises(DeviceError, match=message):
            device.run(["ls", "nothing"], timeout=10)


def test_folder_goes_when_the_work_fails(phone: FakePhone) -> None:
    with pytest.raises(ZeroDivisionError), Adb(SERIAL) as device:
        device.run(["touch", "something"], timeout=10)
        raise ZeroDivisionError
    assert phone.left == []


@pytest.mark.slow
def test_a_command_that_outlives_its_time_is_ended_on_the_phone(phone: FakePhone) -> None:
    """The stand-in's commands go on when the client is gone, as a phone's do."""
    began = time.monotonic()
    message = r"^running sleep gave no answer within 1 s; is the device awake"
    with pytest.raises(DeviceError, match=message), Adb(SERIAL) as device:
        try:
            device.run(["sleep", "611"], timeout=1)
        finally:
            (pid_file,) = phone.tmp.glob("*/.pid")
            pid = int(pid_file.read_text())
            assert sleeping(pid)
    assert time.monotonic() - began < 20
    wait_for_the_end(pid)
    assert phone.left == []


def wait_for_the_end(pid: int) -> None:
    """What was killed dies when it is its turn, which on a busy machine is not at once."""
    end = time.monotonic() + 30
    while sleeping(pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def sleeping(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_finished_command_leaves_no_process_id(phone: FakePhone) -> None:
    with Adb(SERIAL) as device:
        device.run(["true"], timeout=10)
        assert list(phone.tmp.glob("*/.pid")) == [], "its number may belong to another process by now"


# What can be wrong


def test_no_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"^there is no adb command here, needed to reach Android devices: apt inst"):
        Adb(SERIAL).__enter__()


@pytest.mark.parametrize(
    ("devices", "serial", "message"),
    [
        ({}, None, "adb sees no device: connect one, and switch on USB debugging in its developer options"),
        ({}, "X1", "adb sees no device X1; connected: none"),
        ({"A": "device", "B": "offline"}, None, "several devices are connected (A (device), B (offline)): choose one"),
        ({"A": "device"}, "X1", "adb sees no device X1; connected: A (device)"),
        ({"A": "unauthorized"}, "A", "adb:A is unauthorized: unlock the phone and accept its dialog 'Allow USB debug"),
        ({"A": "offline"}, None, "adb:A is offline: it does not answer: reconnect the cable, or run adb reconnect"),
        (
            {"A": "no permissions (user in plugdev group); see [http://x]"},
            "A",
            "adb:A is no permissions: this user may",
        ),
        ({"A": "recovery"}, "A", "adb:A is recovery: it must be running Android: restart it"),
    ],
)
def test_device_that_cannot_be_used(
    phone: FakePhone, devices: dict[str, str], serial: str | None, message: str
) -> None:
    phone.set(devices=devices)
    with pytest.raises(DeviceError) as caught:
        Adb(serial).__enter__()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert [call[0] for call in phone.calls] == ["devices"]


def test_devices_as_adb_lists_them() -> None:
    listed = (
        "* daemon not running; starting now at tcp:5037\n* daemon started successfully\nList of devices attached\n"
        "emulator-5554          device product:sdk_gphone64 model:sdk_gphone64_x86_64 device:emu64x transport_id:1\n"
        "192.168.1.7:5555       offline\n"
        "0a388e93               no permissions (missing udev rules? user is in the plugdev group); see [http://x]\n\n"
    )
    expected = {"emulator-5554": "device", "192.168.1.7:5555": "offline", "0a388e93": "no permissions"}
    assert parse_devices(listed) == expected
    assert parse_devices("List of devices attached\nA1\tunauthorized\n") == {"A1": "unauthorized"}


def test_disk_full(phone: FakePhone, binary: Path) -> None:
    phone.set(fault="full")
    message = (
        rf"^adb:{SERIAL}: copying {binary.name} failed: failed to copy .* No space left on device; free some storage"
    )
    with pytest.raises(DeviceError, match=message), Adb(SERIAL) as device:
        device.put(binary, "tool")
    assert phone.left == []


def test_copy_that_failed_in_silence(phone: FakePhone, binary: Path) -> None:
    phone.set(fault="silent-push")
    message = rf"^adb:{SERIAL}: 7 of {binary.stat().st_size} bytes of {binary.name} arrived; is its storage full\?$"
    with pytest.raises(DeviceError, match=message), Adb(SERIAL) as device:
        device.put(binary, "tool")
    assert phone.left == []


@pytest.mark.parametrize("call", [2, 3, 4])
def test_device_that_vanishes(phone: FakePhone, binary: Path, call: int) -> None:
    """The folder cannot be removed then, and the message says so."""
    phone.set(fault=f"vanish:{call}")
    with pytest.raises(DeviceError) as caught, Adb(SERIAL) as device:
        device.put(binary, "tool")
        device.run(["true"], timeout=10)
    text = str(caught.value)
    assert f"device '{SERIAL}' not found; the device was lost: check its cable and that it stays awake" in text
    assert text.endswith(f"; {device.scratch} may be left on it")
    assert "\n" not in text


def test_device_that_vanishes_at_the_end(phone: FakePhone) -> None:
    message = rf"^adb:{SERIAL}: cleaning up failed: .*; /data/local/tmp/mvit-export-\w+ may be left on it$"
    with pytest.raises(DeviceError, match=message), Adb(SERIAL):
        phone.set(devices={})


def test_answer_that_breaks_off(phone: FakePhone) -> None:
    message = rf"^adb:{SERIAL} was lost while running echo: its answer was cut off$"
    with pytest.raises(DeviceError, match=message), Adb(SERIAL) as device:
        phone.set(fault="mute")
        try:
            device.run(["echo", "a long text" * 20], timeout=10)
        finally:
            phone.set(fault="")
    assert phone.left == []


@pytest.mark.slow
def test_client_that_hangs(phone: FakePhone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ADB_SLEEP", "600")
    monkeypatch.setattr(adb_module, "STEP_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(DeviceError, match=r"^listing devices gave no answer within 0 s"):
        Adb(SERIAL).__enter__()
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_children_of_a_client_that_hangs_are_ended(phone: FakePhone, tmp_path: Path) -> None:
    """A client may be a script around the real one."""
    (tmp_path / "bin" / "adb").write_text(f"#!/bin/sh\nsleep 612 & echo $! > {tmp_path}/pid; wait\n")
    with pytest.raises(DeviceError, match="gave no answer within 1 s"):
        adb_module.call(["adb"], step="waiting", timeout=1)
    wait_for_the_end(int((tmp_path / "pid").read_text()))


def test_folder_that_was_made_although_the_answer_is_lost(phone: FakePhone) -> None:
    phone.set(fault="mute")
    with pytest.raises(DeviceError, match="was lost while making a folder"):
        Adb(SERIAL).__enter__()
    assert phone.left == []


def test_adbs_complaints_get_advice() -> None:
    assert explain("error: device unauthorized.\n").startswith("device unauthorized; unlock the phone and accept")
    assert explain("error: closed") == "closed; the device was lost: check its cable and that it stays awake"
    assert explain("adb: error: cannot stat 'x'") == "cannot stat 'x'"


# The benchmark binary


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read: No such file or directory$"),
        (
            b"#!/bin/sh\nexec true\n" * 9,
            r"is not an ELF executable; expected TFLite's benchmark_model for Android arm64-v8a$",
        ),
        (b"\x7fELF", r"is not an ELF executable"),
        (62, r"is built for x86_64, the phone is arm64-v8a; use the build for it$"),
        (40, r"is built for armeabi-v7a, the phone is arm64-v8a; use the build for it$"),
        (243, r"is built for ELF machine 243, the phone is arm64-v8a"),
    ],
)
def test_wrong_binary(tmp_path: Path, content: bytes | int | None, message: str) -> None:
    path = tmp_path / "tool"
    if isinstance(content, int):
        elf(path, content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DeviceError, match=message):
        check_binary(path, "arm64-v8a")


def test_binary_is_refused_before_it_is_copied(phone: FakePhone, binary: Path) -> None:
    phone.set(abi="armeabi-v7a")
    with pytest.raises(DeviceError, match="is built for arm64-v8a, the phone is armeabi-v7a"), Adb(SERIAL) as device:
        BenchmarkTool(device, binary)
    assert not [call for call in phone.calls if "push" in call]


def test_binary_that_does_not_start(phone: FakePhone, tmp_path: Path, artifact: Artifact) -> None:
    """The right header, but nothing behind it, as a file cut short by a download."""
    broken = tmp_path / "cut"
    broken.write_bytes(elf(tmp_path / "whole").read_bytes()[:40])
    message = r"^benchmark_model does not start on the phone \(.*\); it must be built for Android$"
    with pytest.raises(DeviceError, match=message), Adb(SERIAL) as device:
        benchmark(device, artifact, BenchmarkOptions(), binary=broken)
    assert phone.left == []


# Latency


def test_options_and_their_flags() -> None:
    def flags(**options: Any) -> str:
        return " ".join(BenchmarkOptions(**options).flags)

    assert flags() == "--num_threads=1 --use_xnnpack=true"
    assert flags(threads=4, fp16=True) == "--num_threads=4 --use_xnnpack=true --xnnpack_force_fp16=true"
    assert flags(xnnpack=False) == "--num_threads=1 --use_xnnpack=false"
    assert flags(gpu=True) == "--num_threads=1 --use_gpu=true --gpu_precision_loss_allowed=false"
    assert flags(nnapi=True, fp16=True, xnnpack=False) == (
        "--num_threads=1 --use_nnapi=true --nnapi_allow_fp16=true --use_xnnpack=false"
    )


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"gpu": True, "nnapi": True}, {"xnnpack": False, "fp16": True}], ids=str
)
def test_options_that_exclude_each_other(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        BenchmarkOptions(**options)


def test_benchmark(phone: FakePhone, binary: Path, artifact: Artifact) -> None:
    with Adb(SERIAL) as device:
        result = benchmark(device, artifact, BenchmarkOptions(threads=2), binary=binary, rounds=2, runs_per_round=20)
    assert result.runtime == "TFLite benchmark_model XNNPACK, Pixel 7 Android 15"
    assert (result.figure, result.delegate, result.memory_mb) == ("median", "XNNPACK", 2.25)
    assert result.runs_per_round == (20, 20)
    assert len(result.samples_ms) == 2 and all(0 < ms < result.first_ms + 100 for ms in result.samples_ms)
    assert result.load_ms > 0 and result.load_warm_ms is not None and result.load_warm_ms > 0
    assert phone.left == []
    starts = [call[-1] for call in phone.calls if "--graph" in call[-1]]
    assert len(starts) == 2 and all("--num_threads=2" in start and "--num_runs=20" in start for start in starts)


def test_two_models_and_options_take_turns_on_one_tool(phone: FakePhone, binary: Path, artifact: Artifact) -> None:
    """As a comparison does; two precisions of a model have one file name, and must not become one file."""
    with Adb(SERIAL) as device:
        tool = BenchmarkTool(device, binary)
        models = [tool.load(artifact), tool.load(artifact)]
        assert models[0].path != models[1].path
        for threads in (1, 2):
            assert all(model.measure(BenchmarkOptions(threads=threads), runs=2).ms > 0 for model in models)
    assert len([call for call in phone.calls if "push" in call]) == 3


def test_gpu(phone: FakePhone, binary: Path, artifact: Artifact) -> None:
    gpu = BenchmarkOptions(gpu=True)
    with Adb(SERIAL) as device:
        model = BenchmarkTool(device, binary).load(artifact)
        assert model.tool.describe(gpu) == "TFLite benchmark_model GPU, Pixel 7 Android 15"
        assert model.measure(gpu, runs=2).delegate == "GPU"
        phone.set(gpu="partial")
        assert model.measure(gpu, runs=2).delegate == "GPU in 3 parts, the rest on the CPU"
        phone.set(gpu="none")
        message = r"^GPU was asked for, but benchmark_model did not apply it: WARN: GPU acceleration is unsupported on"
        with pytest.raises(RuntimeUnavailable, match=message) as caught:
            model.measure(gpu, runs=2)
        assert "Inference timings in us" in str(caught.value.__cause__), "all that the tool printed"
        phone.set(gpu="refused")
        with pytest.raises(
            RuntimeUnavailable, match=r"^the phone's GPU delegate cannot run tiny.tflite: Failed to apply"
        ):
            model.measure(gpu, runs=2)


def test_nnapi_that_falls_back(phone: FakePhone, binary: Path, artifact: Artifact) -> None:
    message = (
        r"^NNAPI was asked for, but .*: INFO: Though NNAPI delegate is explicitly applied, the model graph will not"
    )
    with pytest.raises(RuntimeUnavailable, match=message), Adb(SERIAL) as device:
        benchmark(device, artifact, BenchmarkOptions(nnapi=True), binary=binary)


def test_flag_that_the_tool_does_not_know(phone: FakePhone, binary: Path, artifact: Artifact) -> None:
    """The stand-in has no XNNPACK fp16; the real tool goes on in fp32 with a warning."""
    message = r"^this benchmark_model does not know --xnnpack_force_fp16=true: it was built without that part"
    with pytest.raises(RuntimeUnavailable, match=message), Adb(SERIAL) as device:
        benchmark(device, artifact, BenchmarkOptions(fp16=True), binary=binary)


def test_file_that_the_tool_rejects(phone: FakePhone, binary: Path, artifact: Artifact, tmp_path: Path) -> None:
    model = replace(artifact.manifest.model, name="broken")
    damaged = Artifact(tmp_path, replace(artifact.manifest, model=model))
    damaged.model_path.write_bytes(b"no flatbuffer" * 100)
    message = r"broken.tflite is rejected by benchmark_model: Failed to load model /.*; export again$"
    with pytest.raises(ArtifactError, match=message) as caught, Adb(SERIAL) as device:
        benchmark(device, damaged, BenchmarkOptions(), binary=binary)
    assert "INFO: STARTING!" in str(caught.value.__cause__)


def test_tool_that_hangs(phone: FakePhone, binary: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvit_export.benchmarks.devices.benchmark_model.LOAD_SECONDS", 3.0)
    phone.set(fault="hang")
    with pytest.raises(DeviceError, match=r"^running benchmark_model gave no answer within 6 s"), Adb(SERIAL) as device:
        model = BenchmarkTool(device, binary).load(artifact)
        try:
            model.measure(BenchmarkOptions(), runs=1, max_seconds=1)
        finally:
            pid = int(next(phone.tmp.glob("*/.pid")).read_text())
            assert sleeping(pid)
    wait_for_the_end(pid)
    assert phone.left == []


def test_no_sample_of_a_round_is_lost() -> None:
    rounds = [Round(9.0, 3.0, 2.0, "median", 50, 4.0, "GPU"), Round(5.0, 2.5, 2.2, "median", 50, None, "GPU")]
    whole = summarise("tool", [*rounds, replace(rounds[1], load_ms=6.0, ms=1.9, memory_mb=6.0)])
    assert (whole.load_ms, whole.load_warm_ms, whole.first_ms, whole.memory_mb) == (9.0, 5.5, 3.0, 6.0)
    assert whole.samples_ms == (2.0, 2.2, 1.9)
    assert summarise("tool", rounds[:1]).load_warm_ms is None


# Parity


def test_one_model_run(phone: FakePhone, binary: Path, artifact: Artifact) -> None:
    array = next(iter(load_golden(artifact).values()))["image"]
    with Adb(SERIAL) as device:
        outputs = run_model(device, artifact, array, binary=binary)
    expected = open_tflite(artifact).run(array)
    assert list(outputs) == ["logits"]
    np.testing.assert_array_equal(outputs["logits"], expected["logits"])


def test_verify_on_the_phone(phone: FakePhone, binary: Path, artifact: Artifact) -> None:
    """The session passes parity's own comparison, and fails it when the phone computes something else."""
    pairs = [Pair(case, tensors.pop("image"), tensors) for case, tensors in load_golden(artifact).items()]
    with Adb(SERIAL) as device:
        session = open_session(artifact, BenchmarkTool(device, binary))
        assert session.runtime == "TFLite benchmark_model XNNPACK, Pixel 7 Android 15"
        assert session.labels == artifact.manifest.model.labels
        judge = functools.partial(judge_outcomes, tolerance=SAME_ARITHMETIC, task=CLASSIFICATION)
        right = judge(run_cases(artifact.manifest, session.run, pairs))
        assert right.reasons == []
        assert right.metrics is not None and right.metrics.psnr_db > 100
        moved = [replace(pair, array=pair.array[:, ::-1].copy()) for pair in pairs]
        wrong = judge(run_cases(artifact.manifest, session.run, moved))
        assert wrong.reasons
        assert wrong.metrics is not None and wrong.metrics.psnr_db < 100
        assert phone.left and "output.bin" not in os.listdir(phone.tmp / phone.left[0])
    assert phone.left == []


def test_device_lost_in_a_comparison_is_no_verdict(phone: FakePhone, binary: Path, artifact: Artifact) -> None:
    pairs = [Pair(case, tensors.pop("image"), tensors) for case, tensors in load_golden(artifact).items()]
    with pytest.raises(DeviceError, match="was lost"), Adb(SERIAL) as device:
        session = open_session(artifact, BenchmarkTool(device, binary))
        phone.set(devices={})
        run_cases(artifact.manifest, session.run, pairs)


def test_two_models_of_one_name_stay_apart(phone: FakePhone, binary: Path, artifact: Artifact) -> None:
    (setting,) = plan_settings([artifact])
    with (
        open_device(f"adb:{SERIAL}", binary=binary) as device,
        device.probe(setting) as one,
        device.probe(setting) as other,
    ):
        assert one.model.path != other.model.path
    assert phone.left == []


def test_tool_that_was_not_named_is_asked_for_at_once(phone: FakePhone) -> None:
    message = rf"^--device adb:{SERIAL} needs --benchmark-binary FILE, TFLite's benchmark_model built for Android$"
    with pytest.raises(UsageError, match=message):
        open_device("adb").__enter__()
    assert phone.left == []


@pytest.mark.parametrize("fmt", ["onnx", "coreml"])
def test_formats_that_a_phone_does_not_read(phone: FakePhone, binary: Path, artifact: Artifact, fmt: str) -> None:
    target = replace(artifact.manifest.target, format=fmt)
    other = Artifact(artifact.path, replace(artifact.manifest, format=fmt, target=target))
    message = rf"^Android phones are reached through TFLite's benchmark_model, which does not read {fmt} files$"
    with pytest.raises(RuntimeUnavailable, match=message), Adb(SERIAL) as device:
        open_session(other, BenchmarkTool(device, binary))


def test_delegate_missing_is_known_before_a_comparison(phone: FakePhone, binary: Path, artifact: Artifact) -> None:
    phone.set(gpu="none")
    with pytest.raises(RuntimeUnavailable, match="GPU was asked for"), Adb(SERIAL) as device:
        open_session(artifact, BenchmarkTool(device, binary), options=BenchmarkOptions(gpu=True))


def test_outputs_are_cut_in_the_files_order() -> None:
    specs = (TensorSpec("mask", (1, 2, 2), "float32", ""), TensorSpec("count", (None,), "int32", ""))
    data = np.arange(4, dtype="<f4").tobytes() + np.array([7], "<i4").tobytes()
    outputs = split_outputs(data, specs)
    np.testing.assert_array_equal(outputs["mask"], np.arange(4, dtype=np.float32).reshape(1, 2, 2))
    assert outputs["count"].tolist() == [7] and outputs["count"].dtype == np.int32
    with pytest.raises(RuntimeError, match=r"^the file's outputs are 19 bytes, the manifest's 20$"):
        split_outputs(data[:-1], specs)


# What the real tool prints: lines of runs on phones and boards, as people published them

# TensorFlow 2.20 on a phone (Termux): a default delegate, percentiles
TERMUX = """\
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
VERBOSE: Replacing 2168 out of 2168 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1 partitions for \
subgraph 0.
INFO: The input model file size (MB): 24.6229
INFO: Initialized session in 119.515ms.
INFO: Running benchmark for at least 5 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=9 first=87112 curr=51629 min=51629 max=87112 avg=58147.4 std=11478 p5=51629 median=51962 p95=87112

INFO: Running benchmark for at least 1000 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=1000 first=52162 curr=49785 min=49088 max=686105 avg=63743.2 std=60716 p5=49620 median=51891 p95=68628

INFO: Inference timings in us: Init: 119515, First inference: 87112, Warmup (avg): 58147.4, Inference (avg): 63743.2
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE to the actual \
memory footprint of the model at runtime. Take the information at your discretion.
INFO: Memory footprint delta from the start of the tool (MB): init=55.4961 overall=55.4961
"""
# Texas Instruments' guide to LiteRT on its boards (TensorFlow 2.20): XNNPACK asked for, large numbers in e-notation
BOARD = """\
INFO: XNNPACK delegate created.
INFO: Explicitly applied XNNPACK delegate, and the model graph will be partially executed by the delegate w/ 1 \
delegate kernels.
INFO: Initialized session in 614.333ms.
INFO: count=1 curr=1357602 p5=1357602 median=1357602 p95=1357602

INFO: count=50 first=1249964 curr=1240143 min=1238588 max=1252566 avg=1.24027e+06 std=2565 p5=1238753 median=1239807 \
p95=1247415
INFO: Inference timings in us: Init: 5579, First inference: 1357602, Warmup (avg): 1.3576e+06, Inference (avg): \
1.24027e+06
INFO: Memory footprint delta from the start of the tool (MB): init=6.36328 overall=109.832
"""
# 2020, a GPU with operator profiling: no "INFO: ", no percentiles, other words for memory, profiles that also count
OLD_GPU = """\
Applied GPU delegate, and the model graph will be completely executed w/ the delegate.
Initialized session in 1451.51ms.
count=56 first=11147 curr=8146 min=7055 max=12036 avg=8779.68 std=1115

count=110 first=8325 curr=10016 min=7863 max=10688 avg=8680.33 std=591

Inference timings in us: Init: 1451507, First inference: 11147, Warmup (avg): 8779.68, Inference (avg): 8680.33
Peak memory footprint (MB): init=63.4883 overall=63.4883
Timings (microseconds): count=110 first=8317 curr=10006 min=7854 max=10679 avg=8671.49 std=590
Memory (bytes): count=0
"""


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (TERMUX, Round(119.515, 87.112, 51.891, "median", 1000, 55.4961, "none")),
        (BOARD, Round(5.579, 1357.602, 1239.807, "median", 50, 109.832, "XNNPACK in 1 parts, the rest on the CPU")),
        (OLD_GPU, Round(1451.507, 11.147, 8.68033, "average", 110, 63.4883, "GPU")),
    ],
    ids=["termux", "board", "old-gpu"],
)
def test_real_output(output: str, expected: Round) -> None:
    assert parse_round(output) == expected


def test_one_run_has_a_figure_too() -> None:
    """`count=1 curr=...` before the percentiles came; the average of one is that one."""
    output = (
        "count=1 curr=900\ncount=1 curr=805\n"
        "Inference timings in us: Init: 4, First inference: 900, Warmup (avg): 900, Inference (avg): 805\n"
    )
    assert parse_round(output) == Round(0.004, 0.9, 0.805, "average", 1, None, "none")


@pytest.mark.parametrize("lines", [0, 4, 9, 10])
def test_truncated_output(lines: int) -> None:
    kept = TERMUX.splitlines()[:lines]
    last = (kept or ["nothing"])[-1][:50]
    with pytest.raises(DeviceError) as caught:
        parse_round("\n".join(kept))
    assert str(caught.value).startswith(f"benchmark_model printed no timings; its last line: {last}")


@pytest.mark.parametrize("bad", ["nan", "-nan", "inf", "0", "-5", "12ab"])
def test_figure_that_is_no_time(bad: str) -> None:
    output = OLD_GPU.replace("Inference (avg): 8680.33", f"Inference (avg): {bad}")
    message = rf"^benchmark_model printed '{bad}' for its average, expected microseconds; did it run at all\?$"
    with pytest.raises(DeviceError, match=message):
        parse_round(output)


def test_litert_s_other_benchmark_tool_is_named() -> None:
    """litert/tools has a tool of the same name, with neither input files nor a word on delegates."""
    output = "========== BENCHMARK RESULTS ==========\nModel initialization: 3.65 ms\nInference (avg):      2.10 ms"
    with pytest.raises(DeviceError, match=r"^--benchmark-binary is LiteRT's CompiledModel tool; expected TFLite's"):
        parse_round(output)


def test_delegates_are_believed_only_when_applied() -> None:
    check_delegate(OLD_GPU, "GPU")
    check_delegate(BOARD, "XNNPACK")
    check_delegate(TERMUX, None)
    for output, wanted in ((BOARD, "GPU"), (OLD_GPU, "XNNPACK"), (TERMUX, "XNNPACK")):
        with pytest.raises(RuntimeUnavailable, match=f"^{wanted} was asked for, but benchmark_model did not apply it"):
            check_delegate(output, wanted)


def test_flags_left_over() -> None:
    check_flags(TERMUX)
    with pytest.raises(RuntimeUnavailable, match="does not know --allow_fp16: it was built without that part"):
        check_flags("STARTING!\nUnconsumed cmdline flags: --allow_fp16\nLog parameter values verbosely: [0]\n")
