"""Android phones through the system's `adb`: put a file, run a command, get a file, leave nothing behind.

A phone has no Python, so what runs there is TFLite's own benchmark tool: see benchmark_model.py.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mvit_export.benchmarks.devices.commands import read_to_end
from mvit_export.errors import DeviceError, printable

INSTALL = "apt install adb, brew install android-platform-tools, or Google's platform-tools"
SHARED = "/data/local/tmp"  # the one folder of a phone where adb's user may write and execute
STEP_SECONDS = 30.0
PUSH_BYTES_PER_SECOND = 1e6  # a slow USB 2 cable still does several times this
STATES = {  # of `adb devices`, other than `device`: what to do
    "unauthorized": "unlock the phone and accept its dialog 'Allow USB debugging?'",
    "authorizing": "unlock the phone, accept its dialog and try again",
    "offline": "it does not answer: reconnect the cable, or run adb reconnect",
    "connecting": "it is still connecting: try again",
    "no permissions": "this user may not open the USB device: install the udev rules (apt install android-sdk-"
    "platform-tools-common) and replug it",
}


@dataclass(frozen=True)
class Finished:
    """A command that ran to its end on the phone; `output` is stdout and stderr as they came."""

    code: int
    output: str


@dataclass(frozen=True)
class Phone:
    """What a phone says about itself."""

    model: str
    android: str  # release, e.g. 15
    abi: str  # of its 64- or 32-bit userland, e.g. arm64-v8a
    cores: int | None


class Adb:
    """One Android device. Entering makes a scratch folder there; leaving ends what still runs and removes it."""

    def __init__(self, serial: str | None, *, adb: str = "adb") -> None:
        self.name = f"adb:{serial}" if serial else "adb"
        self._adb, self._serial = adb, serial
        self.scratch = f"{SHARED}/mvit-export-{secrets.token_hex(6)}"

    def __enter__(self) -> Adb:
        self._serial = choose_device(list_devices(self._adb), self._serial)
        self.name = f"adb:{self._serial}"
        try:
            self._run(f"mkdir {self.scratch}", step="making a folder")
        except BaseException:
            with suppress(DeviceError):  # the folder may be there although the answer never came
                self._remove()
            raise
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self._remove()
        except DeviceError as left:
            if error is None:
                raise DeviceError(f"{left}; {self.scratch} may be left on it") from left
            if isinstance(error, DeviceError):
                raise DeviceError(f"{error}; {self.scratch} may be left on it") from error

    def put(self, local: Path, name: str) -> str:
        """Copy a file into the scratch folder and return its path there."""
        try:
            size = local.stat().st_size
        except OSError as error:
            raise DeviceError(f"{local} cannot be read: {error.strerror}") from error
        place = f"{self.scratch}/{name}"
        timeout = STEP_SECONDS + size / PUSH_BYTES_PER_SECOND
        self._client(["push", str(local), place], step=f"copying {local.name}", timeout=timeout)
        there = self._run(f"wc -c < {shlex.quote(place)}", step=f"checking {name}").strip()
        if there != str(size):  # old clients exit with 0 after a failed copy
            raise DeviceError(f"{self.name}: {there} of {size} bytes of {local.name} arrived; is its storage full?")
        return place

    def get(self, name: str, local: Path) -> None:
        """Copy a file from the scratch folder to `local`."""
        place = f"{self.scratch}/{name}"
        self._client(["pull", place, str(local)], step=f"fetching {name}", timeout=10 * STEP_SECONDS)
        if not local.is_file():
            raise DeviceError(f"{self.name}: fetching {name} brought no file")

    def run(self, command: Sequence[str], *, timeout: float) -> str:
        """The output of a command that must exit with 0 within `timeout` seconds."""
        finished = self.shell(command, timeout=timeout)
        return self._check(finished, command[0])

    def shell(self, command: Sequence[str], *, timeout: float) -> Finished:
        """Run a command in the scratch folder, whatever its exit code.

        Its process id is kept in a file while it runs: the phone does not end a command whose client is gone.
        """
        pid = f"{self.scratch}/.pid"
        script = (
            f"cd {self.scratch} && {{ {shlex.join(command)} & echo $! > {pid}; wait $!; c=$?; rm {pid}; exit $c; }}"
        )
        return self._shell(script, step=f"running {Path(command[0]).name}", timeout=timeout)

    @cached_property
    def phone(self) -> Phone:
        keys = ("ro.product.model", "ro.build.version.release", "ro.product.cpu.abi")
        script = "; ".join([*(f"echo $(getprop {key})" for key in keys), "nproc 2> /dev/null"])
        found = self._shell(script, step="asking for its properties", timeout=STEP_SECONDS).output.splitlines()
        model, android, abi, cores = (line.strip() for line in [*found, "", "", "", ""][:4])
        if not abi:
            raise DeviceError(f"{self.name} does not report its architecture (ro.product.cpu.abi); is it Android?")
        return Phone(printable(model), printable(android), printable(abi), int(cores) if cores.isdecimal() else None)

    def _remove(self) -> None:
        pid = f"{self.scratch}/.pid"
        self._run(f"[ ! -f {pid} ] || kill -9 $(cat {pid}); rm -rf {self.scratch}", step="cleaning up")

    def _run(self, script: str, *, step: str) -> str:
        return self._check(self._shell(script, step=step, timeout=STEP_SECONDS), step)

    def _check(self, finished: Finished, what: str) -> str:
        if finished.code:
            last = (finished.output.strip().splitlines() or ["it printed nothing"])[-1]
            raise DeviceError(f"{self.name}: {what} ended with exit code {finished.code}: {printable(last, 200)}")
        return finished.output

    def _shell(self, script: str, *, step: str, timeout: float) -> Finished:
        """Old clients drop the exit code, and all exit with 0 or 255 if the phone is lost: hence a mark at the end."""
        mark = f"mvit-export-{secrets.token_hex(6)}"
        whole = f"( {script} ) 2>&1; echo {mark} $?"
        text = self._client(["shell", whole], step=step, timeout=timeout, exit_codes=False)
        output, found, code = text.rpartition(mark)
        if not found or not code.strip().isdecimal():
            raise DeviceError(f"{self.name} was lost while {step}: its answer was cut off")
        return Finished(int(code), output)

    def _client(self, arguments: Sequence[str], *, step: str, timeout: float, exit_codes: bool = True) -> str:
        """One call of `adb -s SERIAL`; raises DeviceError if adb itself complains."""
        code, out, err = call([self._adb, "-s", str(self._serial), *arguments], step=step, timeout=timeout)
        complaint = next((line for line in err.splitlines() if re.match(r"(adb: )?error: ", line)), "")
        if complaint or (code and exit_codes):
            text = complaint or (err.strip() or out.strip() or f"exit code {code}").splitlines()[-1]
            raise DeviceError(f"{self.name}: {step} failed: {explain(text)}")
        return out


def list_devices(adb: str = "adb") -> dict[str, str]:
    """{serial: state} of the devices that adb sees. Raises DeviceError if there is no adb."""
    if shutil.which(adb) is None:
        raise DeviceError(f"there is no {adb} command here, needed to reach Android devices: {INSTALL}")
    code, out, err = call([adb, "devices", "-l"], step="listing devices", timeout=STEP_SECONDS)
    if code:
        raise DeviceError(f"adb devices failed: {explain((err.strip() or f'exit code {code}').splitlines()[-1])}")
    return parse_devices(out)


def parse_devices(text: str) -> dict[str, str]:
    """`adb devices -l` -> {serial: state}."""
    found = {}
    for line in text.partition("List of devices attached")[2].splitlines():
        serial, _, rest = line.partition("\t" if "\t" in line else " ")
        state = rest.strip()
        if state:
            found[serial] = "no permissions" if state.startswith("no permissions") else state.split()[0]
    return found


def choose_device(devices: dict[str, str], serial: str | None) -> str:
    """The device meant, if it is ready for work; `serial` None means the only one."""
    listed = ", ".join(f"{name} ({state})" for name, state in devices.items()) or "none"
    if serial is None and len(devices) > 1:
        raise DeviceError(f"several devices are connected ({listed}): choose one with --device adb:SERIAL")
    chosen = next(iter(devices), None) if serial is None else serial
    if chosen is None:
        raise DeviceError("adb sees no device: connect one, and switch on USB debugging in its developer options")
    if chosen not in devices:
        raise DeviceError(f"adb sees no device {chosen}; connected: {listed}")
    if (state := devices[chosen]) != "device":
        advice = STATES.get(state, "it must be running Android: restart it")
        raise DeviceError(f"adb:{chosen} is {state}: {advice}")
    return chosen


def explain(complaint: str) -> str:
    """adb's own line, and what to do about it if that is known."""
    line = printable(re.sub(r"^(adb: )?error: ", "", complaint.strip()), 500).rstrip(".")
    if "No space left" in line:
        return f"{line}; free some storage on the phone"
    if "unauthorized" in line:
        return f"{line}; {STATES['unauthorized']}"
    if re.search(r"not found|no devices|offline|closed|protocol fault", line):
        return f"{line}; the device was lost: check its cable and that it stays awake"
    return line


def call(command: Sequence[str], *, step: str, timeout: float) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a local command; it and its children are killed after `timeout` seconds."""
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        raise DeviceError(f"{command[0]} cannot be started: {error.strerror}; install adb: {INSTALL}") from error
    try:
        out, err = read_to_end(child, what=step, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(
            f"{step} gave no answer within {timeout:.0f} s; is the device awake and connected?"
        ) from error
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()
    return child.returncode, decode(out), decode(err)


def decode(data: bytes) -> str:
    """Old phones end their lines as a terminal would."""
    return data.decode("utf-8", "replace").replace("\r\n", "\n")
