"""`arm64`: real ARM kernels under qemu. The root is built by the tests unless the user's cache has it already."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, run_cli, swap_weights, unavailable

from mvit_export import export
from mvit_export.artifact import read_artifact
from mvit_export.benchmarks.devices import arm64
from mvit_export.benchmarks.devices.arm64 import Arm64
from mvit_export.benchmarks.devices.worker import Worker
from mvit_export.checks.parity import verify
from mvit_export.errors import DeviceError
from mvit_export.formats.table import FORMATS
from mvit_export.results.parity import ParityResult

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="qemu's user emulation exists on Linux only"),
    pytest.mark.skipif(platform.machine() == "aarch64", reason="an ARM machine needs no emulation"),
]
FORMS = [(fmt, form) for fmt in ("onnx", "tflite") for form in FORMATS[fmt].forms]
TARGETS = [("onnx", "fp32"), ("tflite", "fp32"), ("tflite", "fp16")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ARM system, at a place where the command line finds it if XDG_CACHE_HOME is its grandparent."""
    if arm64.emulator() is None:
        unavailable("qemu is not installed: apt-get install qemu-user-static")
    if arm64.read_versions(arm64.default_root()) is not None:
        return arm64.default_root()
    try:
        return arm64.setup(tmp_path_factory.mktemp("cache") / "mvit-export/arm64")
    except DeviceError as error:
        unavailable(str(error))


@pytest.fixture
def on_arm(root: Path) -> Callable[..., Finished]:
    """The command line, which finds the root in the user's cache."""
    return lambda *arguments: run_cli(*arguments, env={"XDG_CACHE_HOME": str(root.parent.parent)})


@pytest.fixture
def check(root: Path) -> Callable[[Path], ParityResult]:
    """Verify one artifact on the device, in this process."""

    def verify_there(place: Path) -> ParityResult:
        with Arm64(root) as device:
            (result,) = verify(place, device=device.name, sessions=lambda artifact: (device.open,))
        assert not Path(device.scratch).exists()
        return result

    return verify_there


# The root


def test_root_is_whole_small_and_on_record(root: Path) -> None:
    record = json.loads((root / "manifest.json").read_text())
    assert (record["recipe"], record["machine"]) == (arm64.RECIPE, "aarch64")
    assert set(record["runtimes"]) == {"numpy", "onnxruntime", "ai-edge-litert"}
    assert not (root / "apt").exists()
    assert not list(root.parent.glob(".*"))
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink()) < 250e6


def test_a_second_setup_leaves_it_alone(root: Path) -> None:
    steps: list[str] = []
    before = (root / "manifest.json").stat().st_mtime_ns
    assert arm64.setup(root, steps.append) == root
    assert steps == []
    assert (root / "manifest.json").stat().st_mtime_ns == before


def test_doctor_shows_it(on_arm: Callable[..., Finished], root: Path) -> None:
    done = on_arm("doctor", "--setup", "arm64")
    assert done.code == 0, done.err
    assert done.out.startswith(f"arm64 is ready in {root}\n")
    assert re.search(
        r"^device   arm64 +yes  emulated: Python 3\.11\.\d+, numpy 2\.[\d.]+, onnxruntime 1\.", done.out, re.M
    )
    assert re.search(rf"^device   local +yes  Linux {platform.machine()}$", done.out, re.M)


def test_wheels_are_those_that_the_project_admits() -> None:
    lines = {line.split(";")[0].strip() for line in requires("mvit-export") or ()}
    admitted = {frozenset(re.split(r"(?=[<>])|,", line)) for line in lines}
    for wheel in arm64.WHEELS:
        assert frozenset(re.split(r"(?=[<>])|,", wheel)) in admitted, wheel


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arm64, "install_packages", lambda root: (root / "usr").mkdir())
    monkeypatch.setattr(arm64, "WHEELS", ("there-is-no-such-package==1",))
    place = tmp_path / "cache/mvit-export/arm64"
    with pytest.raises(DeviceError, match=r"^arm64: .* failed \(exit code 1\): .*there-is-no-such-package"):
        arm64.setup(place)
    assert not list(tmp_path.iterdir())


def test_an_older_recipe_is_built_anew(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    for part in ("install_packages", "install_wheels"):
        monkeypatch.setattr(arm64, part, built.append)
    monkeypatch.setattr(arm64, "try_out", lambda staging: {"runtimes": {}})
    (tmp_path / "arm64").mkdir()
    (tmp_path / "arm64/manifest.json").write_text(json.dumps({"recipe": arm64.RECIPE - 1}))
    (tmp_path / "arm64/stale").touch()
    arm64.setup(tmp_path / "arm64")
    assert len(built) == 2
    assert arm64.read_versions(tmp_path / "arm64") is not None
    assert not (tmp_path / "arm64/stale").exists()


# Verification


def test_verify_on_arm_kernels_passes(on_arm: Callable[..., Finished], copy: Callable[..., Path]) -> None:
    places = [copy(*target) for target in TARGETS]
    done = on_arm("verify", "--json", "--device", "arm64", *places)
    assert done.code == 0, done.err
    for place, result in zip(places, done.json["artifacts"], strict=True):
        assert (result["status"], result["inputs"]) == ("pass", 9)
        assert result["runtime"].endswith(" on emulated aarch64 (qemu cortex-a76)")
        assert json.loads((place / "parity.arm64.json").read_text())["artifacts"] == [result]
        assert not (place / "parity.json").exists()


@pytest.mark.parametrize(("fmt", "form"), FORMS)
def test_every_form_passes_on_arm_kernels(
    check: Callable[[Path], ParityResult], copy: Callable[..., Path], fmt: str, form: str
) -> None:
    """What a form computes is settled by algebra, what XNNPACK and MLAS make of it on ARM is not."""
    place = copy(fmt, "fp32", "tensor", form)
    assert read_artifact(place).manifest.form == form
    result = check(place)
    assert (result.status, result.reason, result.device) == ("pass", "", "arm64")
    assert "emulated aarch64" in (result.runtime or "")


def test_ort_file_passes_on_arm_kernels(check: Callable[[Path], ParityResult], tiny_model: Any, tmp_path: Path) -> None:
    """Its graph was optimized here, for whatever processor."""
    (made,) = export(tiny_model, to="onnx", ort=True, out=tmp_path, verify=False)
    result = check(made.artifact.path)
    assert (result.status, result.reason) == ("pass", "")


@pytest.mark.parametrize("fmt", ["onnx", "tflite"])
def test_swapped_weights_fail(check: Callable[[Path], ParityResult], copy: Callable[..., Path], fmt: str) -> None:
    place = copy(fmt, "fp32")
    swap_weights(place)
    result = check(place)
    assert result.status == "fail"
    assert result.reason.startswith("PSNR ")


def test_arm_kernels_add_up_in_fp16(check: Callable[[Path], ParityResult], copy: Callable[..., Path]) -> None:
    """ONNX Runtime casts fp16 to fp32 on x86; on an ARM core with fp16 arithmetic it does not, which costs digits."""
    place = copy("onnx", "fp16")
    (here,) = verify(place)
    there = check(place)
    assert here.metrics and there.metrics
    assert here.metrics.psnr_db - 25 < there.metrics.psnr_db < here.metrics.psnr_db - 6


def test_nothing_of_this_machine_leaks_in(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".local/lib/python3.11/site-packages").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("LD_PRELOAD", "/elsewhere.so")
    python = str(root / "usr/bin/python3.11")
    with Arm64(root) as device:
        code = "import sys, platform; print(platform.machine(), *sys.path)"
        process = device.start(["-c", code])
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, b"")
        machine, *path = out.decode().split()
        assert machine == "aarch64"
        assert all(folder.startswith(str(root)) for folder in path)
        assert device.run([python, "-S", "-c", "print(6 * 7)"], timeout=60) == "42\n"
        with pytest.raises(DeviceError, match=r"^arm64: qemu-aarch64\S* failed \(exit code 1\): ZeroDivisionError"):
            device.run([python, "-S", "-c", "1 / 0"], timeout=60)


def test_a_hanging_program_is_stopped(root: Path) -> None:
    with Arm64(root) as device, Worker(device.start(["-c", "while True: pass"]), where=device.name) as worker:
        with pytest.raises(DeviceError, match=r"^arm64 gave no answer to 'hello' within 1 s; it was stopped$"):
            worker.ask("hello", timeout=1)
        assert worker.process.wait(10) < 0


# What is refused


def test_latency_is_refused(on_arm: Callable[..., Finished], copy: Callable[..., Path]) -> None:
    place = copy("tflite", "fp32")
    done = on_arm("bench", "--device", "arm64", place)
    assert (done.code, done.out, done.err) == (2, "", f"mvit-export: error: {Arm64.latency_refusal}\n")
    assert not list(place.glob("latency*"))


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        DeviceError, match=rf"^no ARM system in {tmp_path}; mvit-export doctor --setup arm64 builds one$"
    ):
        Arm64(tmp_path).__enter__()


def test_a_python_of_another_architecture(root: Path) -> None:
    with pytest.raises(DeviceError, match=rf"^{root} runs a x86_64 Python, expected aarch64; delete it"):
        Arm64(root).describe({"system": "Linux", "machine": "x86_64"})


@pytest.mark.parametrize(
    ("machine", "system", "message"),
    [
        ("aarch64", "Linux", r"^this machine is arm64 already; nothing needs emulation: --device local$"),
        ("arm64", "Darwin", r"^this machine is arm64 already"),
        ("x86_64", "Darwin", r"^arm64 needs qemu's user emulation, which exists on Linux only; this is Darwin$"),
        ("x86_64", "Linux", r"^qemu-aarch64-static is not on the path: apt-get install qemu-user-static$"),
    ],
)
def test_machines_that_cannot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, system: str, message: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setenv("PATH", str(tmp_path))
    for attempt in (lambda: arm64.setup(tmp_path / "arm64"), Arm64(tmp_path).__enter__):
        with pytest.raises(DeviceError, match=message):
            attempt()
    finding = arm64.finding()
    assert not finding.works
    assert re.search(message, finding.detail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tool", ["apt-get", "apt-config", "dpkg-deb"])
def test_setting_up_takes_debian_s_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tool: str) -> None:
    for name in {"apt-get", "apt-config", "dpkg-deb", "qemu-aarch64-static"} - {tool}:
        (tmp_path / name).symlink_to(shutil.which("true") or "/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=rf"^{tool} is not on the path; setting up arm64 needs a Debian or Ubuntu"):
        arm64.setup(tmp_path / "root")
    assert not os.path.exists(tmp_path / "root")


def test_packages_need_debian_s_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arm64, "KEYRING", tmp_path / "keys.gpg")
    with pytest.raises(
        DeviceError, match=r"keys\.gpg, which vouches for packages, is missing: apt-get install debian-archive-keyring$"
    ):
        arm64.check_tools()
