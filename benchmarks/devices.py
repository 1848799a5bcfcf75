"""Where a model can run: this machine, one behind ssh, a phone behind adb, an emulated ARM. One small interface.

with open_device("ssh:pi") as device:
    path = device.put(Path("model.tflite"), "model.tflite")
    process = device.start(["runner.py"])  # the device's Python
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mvit_export.doctor import Finding
from mvit_export.errors import DeviceError, UsageError, printable
from mvit_export.files import write_whole

SPECS = "local, arm64, ssh:HOST, adb:SERIAL"
STEP_TIMEOUT = 60.0  # seconds for a step that does next to nothing
PIPES: Mapping[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class Device(ABC):
    """A context manager: entering makes a scratch folder on the device, leaving removes it, whatever happened.

    Every method raises DeviceError, in one line, where the device cannot be reached, refuses or takes too long.
    """

    name: str  # as the user wrote it: "local", "ssh:pi", "arm64", "adb:SERIAL"
    scratch: str  # the folder's path on the device
    latency_refusal = ""  # why times measured here would mean nothing
    note = ""  # what a PASS here does not prove

    @abstractmethod
    def __enter__(self) -> Device: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def put(self, local: Path, name: str) -> str:
        """Copy a file, or a folder such as a Core ML package, into the scratch folder; gives its path there."""
        if local.is_dir():
            for path in sorted(path for path in local.rglob("*") if path.is_file()):
                self.put_file(path, f"{name}/{path.relative_to(local).as_posix()}")
        else:
            self.put_file(local, name)
        return f"{self.scratch}/{name}"

    @abstractmethod
    def put_file(self, local: Path, name: str) -> None: ...

    @abstractmethod
    def get(self, name: str, local: Path) -> None:
        """Copy a file of the scratch folder to `local`, whole or not at all."""

    @abstractmethod
    def run(self, command: Sequence[str], *, timeout: float) -> str:
        """Run a program of the device to its end; its stdout. A non-zero exit is a DeviceError."""

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """The device's Python with these arguments, a script's path first: a live process with three pipes."""
        raise DeviceError(f"{self.name} has no Python; it runs a LiteRT benchmark binary alone")

    def describe(self, hello: Mapping[str, Any]) -> str:
        """What a runner there says of the machine, in words for people. Raises DeviceError if it is the wrong one."""
        return f"{self.name} ({hello['system']} {hello['machine']})"


class Local(Device):
    """This machine, with the Python that runs now."""

    name = "local"

    def __enter__(self) -> Local:
        self._folder = tempfile.TemporaryDirectory(prefix="mvit-export.", ignore_cleanup_errors=True)
        self.scratch = self._folder.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def put_file(self, local: Path, name: str) -> None:
        place = Path(self.scratch, name)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local, place)
        except OSError as error:
            place.unlink(missing_ok=True)
            raise DeviceError(f"{local} could not be copied to {self.scratch}: {error.strerror or error}") from error

    def get(self, name: str, local: Path) -> None:
        try:
            write_whole(local, Path(self.scratch, name).read_bytes())
        except OSError as error:
            raise DeviceError(f"{name} could not be copied to {local}: {error.strerror or error}") from error

    def run(self, command: Sequence[str], *, timeout: float) -> str:
        return finish(command, where=self.name, timeout=timeout)

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *arguments], start_new_session=True, **PIPES)


def finish(command: Sequence[str], *, where: str, timeout: float, **options: Any) -> str:
    """Run a program of this machine to its end; its stdout. Raises DeviceError with the program's last words."""
    what = f"{where}: {Path(command[0]).name}"
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, start_new_session=True, **options
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{what} did not end within {timeout:.0f} s and was stopped") from error
    except OSError as error:
        raise DeviceError(f"{what} does not start: {error.strerror or error}") from error
    if done.returncode:
        raise DeviceError(f"{what} failed (exit code {done.returncode}): {last_line(done.stderr)}")
    return done.stdout.decode("utf-8", "replace")


def last_line(text: bytes) -> str:
    """The last line that says something, fit to be part of one line."""
    lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
    return printable(lines[-1], 300) if lines else "no reason given"


def open_device(spec: str, *, python: str | None = None, binary: Path | None = None) -> Device:
    """The device that a user means; nothing is connected before it is entered.

    `spec` is local, arm64, ssh:HOST with HOST as OpenSSH takes it (an alias of ~/.ssh/config, user@host or
    ssh://user@host:port), adb (the only phone) or adb:SERIAL. `python` is an ssh device's interpreter, `binary` the
    benchmark tool for a phone.
    """
    kind, _, rest = spec.partition(":")
    if python is not None and kind != "ssh":
        raise UsageError(f"--device-python is for ssh:HOST, the device is {spec!r}")
    if binary is not None and kind != "adb":
        raise UsageError(f"--benchmark-binary is for phones behind adb, the device is {spec!r}")
    if kind == "ssh":
        return _open_ssh(f"ssh:{rest}" if rest.startswith("//") else rest, python)
    if spec == "local":
        return Local()
    if spec == "arm64":
        from mvit_export.benchmarks.arm64 import Arm64

        return Arm64()
    if spec == "adb" or (kind == "adb" and rest):
        from mvit_export.benchmarks.adb import Adb

        return Adb(rest)
    raise UsageError(f"device {printable(spec)!r} is not known, expected one of {SPECS}")


def _open_ssh(host: str, python: str | None) -> Device:
    from mvit_export.benchmarks.ssh import Ssh

    if not host or host.startswith("-") or not host.isprintable():
        raise UsageError(f"ssh:{printable(host)} names no host, expected ssh:HOST such as ssh:pi or ssh:user@10.0.0.2")
    return Ssh(host, python=python or "python3")


# doctor


def findings() -> list[Finding]:
    """Which devices can be used from here."""
    from mvit_export.benchmarks import arm64

    return [
        Finding("device", "local", True, f"{platform.system()} {platform.machine()}"),
        _client("ssh", ["ssh", "-V"], "install OpenSSH's client, e.g. apt-get install openssh-client"),
        _client("adb", ["adb", "version"], "install Android's platform tools, e.g. apt-get install adb"),
        arm64.finding(),
    ]


def _client(name: str, command: list[str], install: str) -> Finding:
    if shutil.which(name) is None:
        return Finding("device", name, False, f"{name} is not on the path: {install}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("device", name, False, f"{' '.join(command)} fails ({error}): {install}")
    return Finding("device", name, True, (done.stdout or done.stderr).splitlines()[0])
