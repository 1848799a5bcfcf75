"""`ssh:HOST` against a real sshd on a loopback port, whose account's Python has numpy and tflite-runtime alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    LABELS,
    NEEDS_TFLITE_RUNTIME,
    ROOT,
    Environment,
    Finished,
    rehash,
    run_cli,
    swap_weights,
    unavailable,
)

from mvit_export.artifact import read_artifact
from mvit_export.benchmarks.devices import ssh
from mvit_export.benchmarks.devices.local import Local
from mvit_export.benchmarks.devices.ssh import Ssh
from mvit_export.benchmarks.devices.table import open_device
from mvit_export.benchmarks.devices.worker import Worker
from mvit_export.checks.parity import verify
from mvit_export.errors import ArtifactError, DeviceError, UsageError
from mvit_export.formats.table import FORMATS
from mvit_export.results.parity import ParityResult

pytestmark = [pytest.mark.slow, *NEEDS_TFLITE_RUNTIME]
PATIENCE = 10.0  # seconds for the far end to notice and clean up
NAP = f"98765.{os.getpid()}"  # seconds to sleep, told from other runs' by the fraction
ODD_NAMES = ("plain.bin", "with space.bin", 'quote\'s "$(touch x)" `y` \\.bin', "-rf", "ümlaut-日本.bin", "a/b/c.bin")


@dataclass
class Server:
    """An sshd of our own: no port 22, no keys and no configuration of the machine's."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def scratch(self) -> Path:
        """The account's TMPDIR, in which every scratch folder is made."""
        return self.folder / "tmp"

    def start(self, *extra: str) -> None:
        config = self.folder / "sshd_config"
        config.write_text("\n".join([*extra, *self.lines]) + "\n")
        log = (self.folder / "sshd.log").open("ab")
        self.process = subprocess.Popen([sshd_path(), "-D", "-e", "-f", str(config)], stdout=log, stderr=log)
        log.close()
        wait_for(lambda: accepts(self.port), "sshd listens")

    def stop(self) -> None:
        """Kill the listener and every connection, as a power cut would."""
        assert self.process is not None
        self.drop()
        self.process.kill()
        self.process.wait()

    def drop(self) -> None:
        """Kill the connections alone, not what they run."""
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        for pid in descendants(self.process.pid):
            if b"sshd" in command_of(pid).split(b"\0")[0]:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def client(self, **changes: str) -> Path:
        """A client's configuration file with the host `box`."""
        options = {
            "HostName": "127.0.0.1", "Port": str(self.port), "IdentityFile": str(self.folder / "user_key"),
            "IdentitiesOnly": "yes", "IdentityAgent": "none", "UserKnownHostsFile": str(self.folder / "known_hosts"),
            "GlobalKnownHostsFile": "/dev/null", **changes,
        }  # fmt: skip
        file = self.folder / f"client-{len(list(self.folder.glob('client-*')))}"
        file.write_text("Host box\n" + "".join(f"  {name} {value}\n" for name, value in options.items()))
        return file


def sshd_path() -> str:
    path = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    return path or unavailable("sshd is not installed: apt-get install openssh-server")


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        time.sleep(0.05)


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def running(word: str) -> list[int]:
    """Processes with this word among their arguments."""
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if word.encode() in command_of(int(p.name)).split(b"\0")]


def descendants(pid: int) -> list[int]:
    """Of a process that may end at any time."""
    found = []
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return found
    for child in children:
        found += [int(child), *descendants(int(child))]
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sshd")
    server = Server(folder, free_port())
    server.scratch.mkdir()
    for name in ("host_key", "user_key", "stranger_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {key}")
    server.lines = [
        f"Port {server.port}", "ListenAddress 127.0.0.1", f"HostKey {folder / 'host_key'}", "PidFile none",
        f"AuthorizedKeysFile {folder / 'authorized_keys'}", "StrictModes no", "UsePAM no",
        "PasswordAuthentication no", "KbdInteractiveAuthentication no", f"SetEnv TMPDIR={server.scratch}",
    ]  # fmt: skip
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's, made by its service at boot
    server.start()
    yield server
    server.stop()


@pytest.fixture
def box(server: Server, device_environment: Environment) -> Iterator[Callable[..., Ssh]]:
    """`box()` -> the device, not entered yet. Afterwards nothing is left on it, whatever the test did."""

    def make(python: str = device_environment.python, **changes: str) -> Ssh:
        return Ssh("box", python=python, options=["-F", str(server.client(**changes))])

    yield make
    wait_for(lambda: not list(server.scratch.iterdir()), "the scratch folder is removed")


@pytest.fixture
def ssh_command(server: Server, tmp_path: Path) -> dict[str, str]:
    """Variables with which `ssh` is a client of our server for processes that find it on the path."""
    wrapper = tmp_path / "bin/ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {server.client()} "$@"\n')
    wrapper.chmod(0o755)
    return {"PATH": f"{wrapper.parent}:{os.environ['PATH']}"}


@pytest.fixture
def on_box(
    ssh_command: dict[str, str], device_environment: Environment, server: Server
) -> Iterator[Callable[..., Finished]]:
    """`mvit-export verify ... --device ssh:box` as a user runs it."""
    python = ["--device", "ssh:box", "--device-python", device_environment.python]
    yield lambda *arguments: run_cli("verify", *arguments, *python, env=ssh_command)
    wait_for(lambda: not list(server.scratch.iterdir()), "the scratch folder is removed")


@pytest.fixture
def check(box: Callable[..., Ssh]) -> Callable[[Path], ParityResult]:
    """Verify one artifact on the device, in this process."""

    def verify_there(place: Path) -> ParityResult:
        with box() as device:
            (result,) = verify(place, device=device.name, sessions=lambda artifact: (device.open,))
            return result

    return verify_there


# Files and programs


def test_files_of_any_name_and_content_go_there_and_back(box: Callable[..., Ssh], tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000 + b"\n\r\n\0"
    (tmp_path / "sent").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"")
    with box() as device:
        for name in ODD_NAMES:
            assert device.put(tmp_path / "sent", name) == f"{device.scratch}/{name}"
            assert Path(device.scratch, name).read_bytes() == content
            device.get(name, tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == content
        device.put(tmp_path / "empty", "empty")
        device.get("empty", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b""
        assert Path(device.scratch).stat().st_mode & 0o077 == 0
        assert device._socket.stat().st_mode & 0o077 == 0
    assert not Path(device.scratch).exists()
    assert not device._socket.exists()


def test_a_folder_goes_there_whole(box: Callable[..., Ssh], tmp_path: Path) -> None:
    (tmp_path / "net.mlpackage/Data/weights").mkdir(parents=True)
    (tmp_path / "net.mlpackage/Manifest.json").write_text("{}")
    (tmp_path / "net.mlpackage/Data/weights/weight.bin").write_bytes(b"\1\2")
    with box() as device:
        place = Path(device.put(tmp_path / "net.mlpackage", "net.mlpackage"))
        assert (place / "Manifest.json").read_text() == "{}"
        assert (place / "Data/weights/weight.bin").read_bytes() == b"\1\2"


def test_programs_run_there(box: Callable[..., Ssh]) -> None:
    with box() as device:
        assert device.run(["echo", "a  b", "$HOME", "'"], timeout=20) == "a  b $HOME '\n"
        with pytest.raises(DeviceError, match=r"^ssh:box: ls failed \(exit code 2\): ls: cannot access '/none'"):
            device.run(["ls", "/none"], timeout=20)


def test_steps_share_one_connection(box: Callable[..., Ssh], server: Server) -> None:
    with box() as device:
        before = (server.folder / "sshd.log").read_text().count("Accepted publickey")
        for _ in range(5):
            device.run(["true"], timeout=20)
        assert (server.folder / "sshd.log").read_text().count("Accepted publickey") == before


def test_a_runner_answers_from_there(box: Callable[..., Ssh]) -> None:
    with box() as device, device.start_runner() as worker:
        hello = worker.ask("hello")
        assert hello["runtimes"] == {"numpy": "1.26.4", "tflite-runtime": "2.14.0"}
        assert device.describe(hello) == f"ssh:box (Linux {os.uname().machine})"


# Verification


def test_verify_over_ssh_passes(on_box: Callable[..., Finished], copy: Callable[..., Path]) -> None:
    places = [copy("tflite", "fp32"), copy("tflite", "fp32", "image")]
    done = on_box("--json", *places)
    assert done.code == 0, done.err
    runtime = f"tflite-runtime 2.14.0 CPU XNNPACK on ssh:box (Linux {os.uname().machine})"
    for place, result in zip(places, done.json["artifacts"], strict=True):
        assert (result["status"], result["device"], result["runtime"]) == ("pass", "ssh:box", runtime)
        assert result["inputs"] == 9
        assert json.loads((place / "parity.ssh-box.json").read_text())["artifacts"] == [result]
        assert not (place / "parity.json").exists(), "which is this machine's own"


def test_what_has_no_runtime_there_is_not_run(on_box: Callable[..., Finished], copy: Callable[..., Path]) -> None:
    onnx, coreml = copy("onnx"), copy("coreml")
    done = on_box(onnx, coreml)
    assert (done.code, done.err) == (3, "")
    lines = done.out.splitlines()
    assert lines[0] == (
        f"NOT-RUN {onnx}  onnxruntime does not import (No module named 'onnxruntime'): pip install onnxruntime"
    )
    assert lines[1].startswith(f"NOT-RUN {coreml}  Core ML runs on macOS only, this is Linux")
    assert json.loads((onnx / "parity.ssh-box.json").read_text())["status"] == "not-run"


def test_swapped_weights_fail_over_ssh(check: Callable[[Path], ParityResult], copy: Callable[..., Path]) -> None:
    place = copy("tflite")
    assert check(place).status == "pass"
    swap_weights(place)
    assert check(place).reason.startswith("PSNR ")
    assert json.loads((place / "parity.ssh-box.json").read_text())["status"] == "fail"


def test_labels_are_those_of_the_file_there(check: Callable[[Path], ParityResult], copy: Callable[..., Path]) -> None:
    place = copy("tflite")
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["model"]["labels"] = LABELS
    (place / "manifest.json").write_text(json.dumps(manifest))
    assert check(place).reason == "the file carries no labels, the manifest 10 labels"
    with zipfile.ZipFile(place / "tiny.tflite", "a") as packed:
        packed.writestr("labels.txt", "\n".join(LABELS))
    rehash(place)
    assert check(place).status == "pass"


def test_a_file_that_the_runtime_rejects_is_an_error(
    check: Callable[[Path], ParityResult], copy: Callable[..., Path]
) -> None:
    place = copy("tflite")
    check(place)
    (place / "tiny.tflite").write_bytes(b"no flatbuffer at all")
    rehash(place)
    with pytest.raises(ArtifactError, match=r"tiny\.tflite is rejected by tflite-runtime: "):
        check(place)
    assert not (place / "parity.ssh-box.json").exists(), "what was true of another file"


def test_locate_is_refused(on_box: Callable[..., Finished], copy: Callable[..., Path]) -> None:
    done = on_box(copy("tflite"), "--locate")
    assert (done.code, done.err) == (
        2, "mvit-export: error: --locate looks into files with the runtimes of this machine; leave out --device\n",
    )  # fmt: skip


def test_bench_over_ssh(
    ssh_command: dict[str, str], device_environment: Environment, copy: Callable[..., Path]
) -> None:
    place = copy("tflite")
    options = ["--device", "ssh:box", "--device-python", device_environment.python, "--budget", "1", "--no-roofline"]
    done = run_cli("bench", place, "--json", *options, env=ssh_command)
    assert done.code == 0, done.err
    (row,) = done.json["results"]
    assert (row["status"], row["device"]) == ("measured", "ssh:box")
    assert row["runtime"] == "tflite-runtime 2.14.0 CPU XNNPACK"
    assert 0 < row["min_ms"] <= row["median_ms"] <= row["p99_ms"]
    assert json.loads((place / "latency.ssh-box.json").read_text())["results"] == [row]


def test_tune_latency_over_ssh(ssh_command: dict[str, str], server: Server, copy: Callable[..., Path]) -> None:
    """Each form is proven there and here, timed there, and the kept one says where it was chosen."""
    place = copy("onnx")
    options = ["--latency", "--device", "ssh:box", "--device-python", sys.executable, "--budget", "1.5"]
    done = run_cli("tune", place, "--json", *options, env=ssh_command)
    assert done.code == 0, done.err
    assert (done.json["device"], done.json["machine"]["machine"]) == ("ssh:box", os.uname().machine)
    assert len(done.json["forms"]) == len(FORMATS["onnx"].forms)
    for form in done.json["forms"]:
        assert [check["device"] for check in form["checks"]] == ["ssh:box", "local"]
        assert {check["status"] for check in form["checks"]} == {"pass"}
        assert form["checks"][0]["runtime"].endswith(f" on ssh:box (Linux {os.uname().machine})")
        assert form["median_ms"] > 0
    kept = read_artifact(place.with_name("onnx-tuned"))
    assert kept.manifest.tuning["device"] == "ssh:box"
    assert kept.manifest.form == done.json["chosen"]
    for record in ("parity.json", "parity.ssh-box.json", "latency.ssh-box.json"):
        assert str(kept.path) in (kept.path / record).read_text()
    assert not list(place.glob("*.ssh-box.json")), "the artifact itself is left alone"
    wait_for(lambda: not list(server.scratch.iterdir()), "the scratch folder is removed")


# What goes wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Port": "1"}, r"cannot be reached: ssh: connect to host 127.0.0.1 port 1: Connection refused; is it on"),
        ({"IdentityFile": "{folder}/stranger_key"}, r"cannot be reached: permission denied; .* ssh-copy-id box"),
        ({"UserKnownHostsFile": "/dev/null"}, r"cannot be reached: its host key is not known here; run `ssh box` once"),
        ({"UserKnownHostsFile": "{folder}/changed"}, r"cannot be reached: its host key is not the one on record"),
        ({"HostName": "box.invalid"}, r"cannot be reached: no host of that name; check it"),
    ],
)
def test_hosts_that_do_not_let_us_in(
    box: Callable[..., Ssh], server: Server, changes: dict[str, str], message: str
) -> None:
    stranger = (server.folder / "stranger_key.pub").read_text()
    (server.folder / "changed").write_text(f"[127.0.0.1]:{server.port} {stranger}")
    device = box(**{name: value.format(folder=server.folder) for name, value in changes.items()})
    with pytest.raises(DeviceError, match=rf"^ssh:box {message}") as error, device:
        pass
    assert "\n" not in str(error.value)
    assert not device._socket.exists()


def test_nothing_prompts(box: Callable[..., Ssh], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even through a desktop's dialogue, which ssh turns to where it has no terminal."""
    askpass = tmp_path / "askpass"
    askpass.write_text(f"#!/bin/sh\ntouch {tmp_path / 'asked'}\n")
    askpass.chmod(0o755)
    monkeypatch.setenv("SSH_ASKPASS", str(askpass))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    with pytest.raises(DeviceError, match=r"its host key is not known here"):
        box(UserKnownHostsFile="/dev/null").__enter__()
    assert not (tmp_path / "asked").exists()


def test_a_host_that_does_not_answer(box: Callable[..., Ssh], monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that takes connections and says nothing."""
    assert int(ssh.OPTIONS["ConnectTimeout"]) <= 15
    monkeypatch.setitem(ssh.OPTIONS, "ConnectTimeout", "1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(DeviceError, match=r"^ssh:box cannot be reached: Connection .* timed out"):
            box(Port=str(silent.getsockname()[1])).__enter__()


def test_an_error_of_the_device_is_one_line_and_exit_2(copy: Callable[..., Path], ssh_command: dict[str, str]) -> None:
    place = copy("tflite")
    done = run_cli("verify", place, "--device", "ssh:box", "--device-python", "/none/python", env=ssh_command)
    assert (done.code, done.out, done.err) == (
        2, "", "mvit-export: error: ssh:box has no /none/python; install it there, or name one: --device-python\n",
    )  # fmt: skip
    assert not list(place.glob("parity*"))


def test_no_ssh_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/none")
    with pytest.raises(DeviceError, match=r"^ssh is not on the path; install OpenSSH's client"):
        Ssh("box").__enter__()


def test_a_full_disk(box: Callable[..., Ssh], tmp_path: Path) -> None:
    """/dev/full refuses as a full disk does."""
    (tmp_path / "model.bin").write_bytes(bytes(100_000))
    with box() as device:
        target = Path(device.scratch, "model.bin")
        target.symlink_to("/dev/full")
        with pytest.raises(DeviceError) as error:
            device.put(tmp_path / "model.bin", "model.bin")
        assert re.fullmatch(
            rf"ssh:box: copying model\.bin to {device.scratch} failed \(exit code 1\): .*No space left on device; "
            "make room there",
            str(error.value),
        )
        assert not os.path.lexists(target)
        device.put(tmp_path / "model.bin", "model.bin")  # there is room again
        assert target.stat().st_size == 100_000


def test_a_step_that_hangs_is_stopped_and_ended_there(box: Callable[..., Ssh]) -> None:
    with box() as device:
        with pytest.raises(DeviceError, match=r"^ssh:box: sleep did not end within 1 s and was stopped$"):
            device.run(["sleep", NAP], timeout=1)
        assert running(NAP), "without a terminal sshd tells it nothing"
    wait_for(lambda: not running(NAP), "the keeper ends it")


def test_a_runner_that_hangs_is_stopped_and_ended_there(box: Callable[..., Ssh], tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nwhile True: pass\n"
    )
    with box() as device:
        script = device.put(tmp_path / "stuck.py", "stuck.py")
        with Worker(device.start([script]), where=device.name) as worker:
            wait_for(lambda: running(script), "it runs")
            with pytest.raises(DeviceError, match=r"^ssh:box gave no answer to 'hello' within 1 s; it was stopped$"):
                worker.ask("hello", timeout=1)
    wait_for(lambda: not running(script), "the keeper ends it")


def test_a_connection_that_dies_half_way(box: Callable[..., Ssh], server: Server) -> None:
    with box() as device:
        script = f"import time\ntime.sleep({NAP})"
        stuck = device.start(["-c", script])
        wait_for(lambda: running(script), "it runs")
        server.drop()
        assert stuck.wait(PATIENCE) == ssh.LOST
        stuck.communicate()
        with pytest.raises(DeviceError, match=r"^ssh:box was lost while fetching anything: .*closed"):
            device.get("anything", Path("/none"))
    wait_for(lambda: not running(script), "the keeper ends it")


def test_a_server_killed_while_it_verifies(box: Callable[..., Ssh], server: Server, copy: Callable[..., Path]) -> None:
    place = copy("tflite")
    seen = []

    def pull_the_plug(done: int, total: int) -> None:
        seen.append(done)
        server.drop()

    lost = pytest.raises(DeviceError, match=r"^ssh:box was lost at 'run' \(exit code 255\): ")
    with lost, box() as device:
        verify(place, on_case=pull_the_plug, device="ssh:box", sessions=lambda artifact: (device.open,))
    assert seen == [1]
    assert not list(place.glob("parity*")), "no verdict of half a check"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_stays_where_we_are_killed(
    server: Server, device_environment: Environment, how: signal.Signals, tmp_path: Path
) -> None:
    """Our own process dies between two steps, while a program runs there."""
    code = f"""if True:
        import sys, time
        from mvit_export.benchmarks.devices.ssh import Ssh
        device = Ssh("box", python={device_environment.python!r}, options=["-F", {str(server.client())!r}])
        with device:
            device.start(["-c", "import time; time.sleep({NAP})"])
            print(device.scratch, device._socket, flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    assert process.stdout
    scratch, socket = map(Path, process.stdout.readline().decode().split())
    wait_for(lambda: running(f"import time; time.sleep({NAP})"), "the program runs")
    assert scratch.is_dir() and socket.is_socket()
    process.send_signal(how)
    process.communicate()
    wait_for(lambda: not scratch.exists(), "the keeper removes the folder")
    wait_for(lambda: not running(f"import time; time.sleep({NAP})"), "the keeper ends the program")
    wait_for(lambda: not socket.exists(), "the connection takes its socket away")


@pytest.fixture
def forced(server: Server, device_environment: Environment) -> Iterator[Callable[..., Ssh]]:
    """`forced(COMMAND)` -> a device whose account runs COMMAND around whatever it is asked."""
    others = []

    def make(command: str, python: str = device_environment.python) -> Ssh:
        lines = [line for line in server.lines if not line.startswith("Port")]
        other = Server(server.folder, free_port(), lines=lines)
        with (server.folder / "known_hosts").open("a") as known:
            known.write(f"[127.0.0.1]:{other.port} {(server.folder / 'host_key.pub').read_text()}")
        other.start(f"Port {other.port}", f"ForceCommand {command}")
        others.append(other)
        return Ssh("box", python=python, options=["-F", str(other.client())])

    yield make
    for other in others:
        other.stop()
    wait_for(lambda: not list(server.scratch.iterdir()), "the scratch folder is removed")


def test_a_login_script_that_prints(forced: Callable[..., Ssh], tmp_path: Path) -> None:
    greeting = 'echo Welcome; eval "$SSH_ORIGINAL_COMMAND"'
    (tmp_path / "sent").write_bytes(b"1234")
    with forced(greeting) as device:
        device.put(tmp_path / "sent", "sent")
        with pytest.raises(DeviceError, match=r"^ssh:box: fetching sent: it has 4 bytes, 12 arrived; does a login"):
            device.get("sent", tmp_path / "back")
        assert not (tmp_path / "back").exists()
    with pytest.raises(DeviceError, match=r"^ssh:box has no nopython; "), forced(greeting, python="nopython"):
        pass


def test_a_copy_that_is_cut_short(forced: Callable[..., Ssh], tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(b"1234")
    cut = pytest.raises(DeviceError, match=r"^ssh:box: copying sent to .*: 4 bytes were sent, 3 arrived; try again$")
    with forced('head -c 3 | eval "$SSH_ORIGINAL_COMMAND"') as device, cut:
        device.put(tmp_path / "sent", "sent")


def test_a_link_that_goes_silent(box: Callable[..., Ssh], server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a cable is pulled: nothing is closed, nothing arrives."""
    assert int(ssh.OPTIONS["ServerAliveInterval"]) <= 5
    monkeypatch.setitem(ssh.OPTIONS, "ServerAliveInterval", "1")
    with box() as device:
        server.signal(signal.SIGSTOP)
        try:
            with pytest.raises(DeviceError, match=r"^ssh:box was lost while sleep: Timeout, server .* not responding"):
                device.run(["sleep", NAP], timeout=60)
        finally:
            server.signal(signal.SIGCONT)
    wait_for(lambda: not running(NAP), "the keeper ends it")


def test_settings_of_the_user_s_do_not_get_in_the_way(box: Callable[..., Ssh], server: Server, tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(b"1\n2\r\n")
    settings = {
        "ControlMaster": "auto", "ControlPath": str(server.folder / "%C"), "ControlPersist": "yes", "LogLevel": "QUIET",
        "RequestTTY": "force", "RemoteCommand": "bash -l", "LocalForward": f"127.0.0.1:{server.port} localhost:1",
        "ExitOnForwardFailure": "yes", "StrictHostKeyChecking": "ask",
    }  # fmt: skip
    with box(**settings) as device:
        device.put(tmp_path / "sent", "sent")
        device.get("sent", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b"1\n2\r\n", "no terminal is between"
    everything = b"".join(command_of(int(process.name)) for process in Path("/proc").glob("[0-9]*"))
    assert str(device._socket).encode() not in everything, "no connection stays behind"
    refused = pytest.raises(DeviceError, match=r"permission denied")
    with refused, box(**settings, IdentityFile=str(server.folder / "stranger_key")):
        pass


# What a user may write


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("ssh:pi", "ssh:pi"),
        ("ssh:user@10.0.0.2", "ssh:user@10.0.0.2"),
        ("ssh:ssh://user@pi:2222", "ssh://user@pi:2222"),
        ("ssh://user@pi:2222", "ssh://user@pi:2222"),
        ("local", "local"),
        ("arm64", "arm64"),
    ],
)
def test_devices_by_name(spec: str, name: str) -> None:
    assert open_device(spec).name == name


@pytest.mark.parametrize("spec", ["ssh:", "ssh:-oProxyCommand=x", "ssh:a\nb", "phone", "", "adb:", "arm64:x", "local:"])
def test_names_of_no_device(spec: str) -> None:
    with pytest.raises(UsageError, match=r"expected (one of local, ssh:HOST, adb:SERIAL, arm64|ssh:HOST such as)"):
        open_device(spec)


def test_a_python_for_a_device_without_one() -> None:
    with pytest.raises(UsageError, match=r"^--device-python is for ssh:HOST, the device is 'local'$"):
        open_device("local", python="/usr/bin/python3")


def test_local_device(tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(b"\0\1")
    with Local() as device:
        assert Path(device.put(tmp_path / "sent", "a b/c")).read_bytes() == b"\0\1"
        device.get("a b/c", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b"\0\1"
        with device.start_runner() as worker:
            assert worker.ask("hello")["runtimes"]["numpy"] == np.__version__
        with pytest.raises(DeviceError, match=r"^/none could not be copied to .*: No such file or directory$"):
            device.put(Path("/none"), "none")
    assert not Path(device.scratch).exists()
