"""A device that never stops talking is stopped, before its words fill the memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mvit_export.benchmarks.devices import adb, ssh
from mvit_export.benchmarks.devices.commands import PIPES, finish, read_to_end
from mvit_export.benchmarks.devices.ssh import Ssh
from mvit_export.benchmarks.devices.worker import Worker
from mvit_export.errors import DeviceError

FLOOD = "import sys\nwhile True: sys.{stream}.buffer.write(b'{what}' * 65536)"


def flood(stream: str = "stdout", what: str = "y") -> list[str]:
    return [sys.executable, "-c", FLOOD.format(stream=stream, what=what)]


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_to_end, "__kwdefaults__", {**(read_to_end.__kwdefaults__ or {}), "most": 1 << 20})
    monkeypatch.setattr("mvit_export.benchmarks.devices.worker.LARGEST_ANSWER", 1 << 20)
    monkeypatch.setattr("mvit_export.benchmarks.devices.worker.GRACE", 0.5)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "call",
    [
        lambda command: finish(command, where="pi", timeout=60),
        lambda command: adb.call(command, step="asking", timeout=60),
    ],
    ids=["finish", "adb"],
)
def test_a_program_without_end_is_stopped(call: Callable[[list[str]], object], stream: str) -> None:
    with pytest.raises(DeviceError, match="printed more than 1 MB and was stopped"):
        call(flood(stream))


def test_what_fits_is_read_whole_and_in_order() -> None:
    numbers = "print(*range(100_000))"
    assert finish([sys.executable, "-c", numbers], where="pi", timeout=60).split() == [*map(str, range(100_000))]


def test_a_silent_program_is_stopped_in_time() -> None:
    with pytest.raises(DeviceError, match="did not end within 1 s and was stopped"):
        finish(["sleep", "60"], where="pi", timeout=1)


@pytest.mark.parametrize("what", ["y", "{}\\n"], ids=["one line", "lines"])
def test_a_runner_without_end_is_no_answer(what: str) -> None:
    with (
        Worker(subprocess.Popen(flood("stdout", what), **PIPES), where="pi") as worker,
        pytest.raises(DeviceError, match="expected the runner's JSON"),
    ):
        worker.ask("hello")


def test_a_runner_may_complain_without_line_breaks() -> None:
    code = "import sys, time; sys.stderr.write('oh ' * 100_000); sys.stderr.flush(); sys.stdout.write('1'); sys.exit(3)"
    with (
        Worker(subprocess.Popen([sys.executable, "-c", code], **PIPES), where="pi") as worker,
        pytest.raises(DeviceError),
    ):
        worker.ask("hello")
    assert sum(map(len, worker.complaints)) <= 20 * 4096


def fake_ssh(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Ssh:
    """A client of that name that does what `script` says; "$*" holds what was to be run."""
    program = folder / "ssh"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Ssh("box")


def test_a_login_script_without_end_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "LEAVE_TIMEOUT", 0.5)
    with pytest.raises(DeviceError, match="gave no answer, but printed more than 1 MB"):
        fake_ssh(tmp_path, "exec yes", monkeypatch).__enter__()


def test_an_ssh_answer_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    there.mkdir()
    script = f'case "$*" in *ControlMaster=yes*) echo {ssh.MARK}{there}; exec cat;; *) exec yes;; esac'
    with (
        fake_ssh(tmp_path, script, monkeypatch) as box,
        pytest.raises(DeviceError, match="uname printed more than 64 MB and was stopped"),
    ):
        box.run(["uname"], timeout=60)


def test_an_ssh_connection_may_complain_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its complaints go to no file, and the end of them is the reason that is given."""
    script = 'head -c 3000000 /dev/zero | tr "\\0" x >&2; echo >&2; echo "the last word" >&2; exit 255'
    box = fake_ssh(tmp_path, script, monkeypatch)
    with pytest.raises(DeviceError, match="box cannot be reached: the last word"):
        box.__enter__()
    assert len(box._complaints) <= ssh.LONGEST_COMPLAINT
