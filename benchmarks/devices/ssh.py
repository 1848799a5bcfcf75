"""A device behind the system's OpenSSH client, so that ~/.ssh/config, agents and jump hosts work as they do by hand.

One connection stays open from entering to leaving and the others share it. At its far end a small shell script, the
keeper, owns the scratch folder: when its input ends, because we leave, are killed or lose the connection, it kills what
we left running there and removes the folder. Nothing needs sftp, and nothing ever prompts.
"""

from __future__ import annotations

import os
import secrets
import selectors
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from mvit_export.benchmarks.devices.commands import (
    MOST_OUTPUT,
    PIPES,
    STEP_TIMEOUT,
    client_finding,
    last_line,
    read_to_end,
)
from mvit_export.benchmarks.devices.machines import Machine
from mvit_export.doctor import Finding
from mvit_export.errors import DeviceError, UsageError, printable
from mvit_export.system.files import write_whole

CONNECT_TIMEOUT = 10  # seconds for TCP, and again for the key exchange
LEAVE_TIMEOUT = 20.0
SLOWEST = 50_000  # bytes a second, of a copy that is still waited for
LONGEST_GREETING = 1 << 20  # bytes that a login script may print
LONGEST_COMPLAINT = 1 << 16  # bytes of the connection's stderr that are kept
LOST = 255  # ssh's exit code for its own failures, as opposed to the remote command's
MARK = "mvit-export-scratch:"  # a login script may print lines of its own before it
OPTIONS = {
    "BatchMode": "yes",
    "ClearAllForwardings": "yes",
    "ConnectTimeout": str(CONNECT_TIMEOUT),
    "ControlPersist": "no",
    "LogLevel": "INFO",  # QUIET would hide why a connection failed
    "RemoteCommand": "none",
    "ServerAliveCountMax": "3",
    "ServerAliveInterval": "5",  # a dead link is noticed after 15 seconds
}
# One line each and no backslashes: the account's own shell, which may be fish or csh, reads the quotes around them.
# sshd makes each command the leader of a session, so its process group is everything it started.
CHECK = f"command -v {{python}} >/dev/null || {{{{ echo; echo {MARK}; exit; }}}}; "
KEEPER = (
    'd=$(mktemp -d "${TMPDIR:-/tmp}/mvit-export.XXXXXXXXXX") || exit 1; '
    'leave() { for f in "$d"/.pid.*; do p=${f##*.}; kill -s KILL -- "-$p" || kill -s KILL "$p"; done 2>/dev/null; '
    'rm -rf "$d"; }; '
    "trap leave EXIT; trap 'exit 1' HUP INT PIPE TERM; "
    f'echo; echo "{MARK}$d"; cat >/dev/null'
)
STEP = "echo $$ >{pid}.$$ || exit 1; {script}; code=$?; rm -f {pid}.$$; exit $code"
# What ssh says -> what is wrong and what to do. Its messages are not translated.
REASONS = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "its host key is not the one on record; if the device was reinstalled, "
    "remove the old one with ssh-keygen -R",
    "Host key verification failed": "its host key is not known here; run `ssh {host}` once by hand and compare it",
    "Permission denied": "permission denied; a key must work without a password: ssh-copy-id {host}, or ssh-add",
    "Too many authentication failures": "too many keys were tried; name one with IdentityFile in ~/.ssh/config",
    "Could not resolve hostname": "no host of that name; check it, or its Host entry in ~/.ssh/config",
}


class Ssh(Machine):
    """A machine that OpenSSH can reach without a prompt, and that has a POSIX shell and Python 3.8 or newer.

    `host` is an alias of ~/.ssh/config, user@host or ssh://user@host:port; `options` go to ssh as they are.
    """

    def __init__(self, host: str, *, python: str = "python3", options: Sequence[str] = ()) -> None:
        self.name, self.host = host if host.startswith("ssh://") else f"ssh:{host}", host
        self.python, self.options = python, tuple(options)
        self.scratch = ""

    def arrive(self) -> None:
        if shutil.which("ssh") is None:
            raise DeviceError("ssh is not on the path; install OpenSSH's client, e.g. apt-get install openssh-client")
        # Always in /tmp: a socket's path may have 100 characters, which a deep TMPDIR leaves no room for.
        # The connection removes it when it ends, which it does even if we are killed.
        self._socket = Path(f"/tmp/mvit-export-{secrets.token_hex(8)}")
        self._keeper = subprocess.Popen(
            self._ssh(CHECK.format(python=shlex.quote(self.python)) + KEEPER, master=True),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._complaints = bytearray()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self.scratch = self._read_scratch()
            if not self.scratch:
                raise DeviceError(f"{self.name} has no {self.python}; install it there, or name one: --device-python")
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """End the keeper's input and wait until it has cleaned up."""
        assert self._keeper.stdin and self._keeper.stdout and self._keeper.stderr
        with suppress(OSError):
            self._keeper.stdin.close()
        try:
            self._keeper.wait(LEAVE_TIMEOUT)
        except subprocess.TimeoutExpired:  # the far end cleans up when it notices that nobody is here
            self._keeper.kill()
            self._keeper.wait()
        self._keeper.stdout.close()
        self._listener.join(1.0)
        if not self._listener.is_alive():  # else somebody else holds the pipe's other end
            self._keeper.stderr.close()
        self._socket.unlink(missing_ok=True)

    def _read_scratch(self) -> str:
        """Wait for the keeper's line, whatever a login script prints before it; empty if Python is missing."""
        assert self._keeper.stdout
        rest, printed, deadline = b"", 0, time.monotonic() + STEP_TIMEOUT
        with selectors.DefaultSelector() as selector:
            selector.register(self._keeper.stdout, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                if not selector.select(deadline - time.monotonic()):
                    continue
                chunk = os.read(self._keeper.stdout.fileno(), 4096)
                printed += len(chunk)
                if printed > LONGEST_GREETING:
                    raise DeviceError(f"{self.name} gave no answer, but printed more than {LONGEST_GREETING >> 20} MB")
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.startswith(MARK.encode()):
                        return line.decode("utf-8", "replace").removeprefix(MARK)
                if not chunk:
                    raise self._failure(self._keeper.wait(), self._complained(), "making a scratch folder")
        raise DeviceError(f"{self.name} gave no answer within {STEP_TIMEOUT:.0f} s")

    def _listen(self) -> None:
        """Keep the end of what the connection says on stderr, where the reason of a failure is."""
        assert self._keeper.stderr
        while chunk := os.read(self._keeper.stderr.fileno(), 1 << 16):
            self._complaints += chunk
            del self._complaints[:-LONGEST_COMPLAINT]

    def _complained(self) -> bytes:
        """Call it when the keeper has ended."""
        self._listener.join(1.0)
        return bytes(self._complaints)

    def put_file(self, local: Path, name: str) -> None:
        place, what = shlex.quote(f"{self.scratch}/{name}"), f"copying {local.name} to {self.scratch}"
        parent = shlex.quote(os.path.dirname(f"{self.scratch}/{name}"))
        script = f"mkdir -p {parent} && {{ cat >{place} && wc -c <{place} || {{ rm -f {place}; false; }}; }}"
        try:
            size = local.stat().st_size
            with local.open("rb") as file:
                arrived = self._step(script, what=what, timeout=STEP_TIMEOUT + size / SLOWEST, stdin=file)
        except OSError as error:
            raise DeviceError(f"{local} cannot be read: {error.strerror or error}") from error
        if arrived.split()[-1:] != [str(size).encode()]:
            raise DeviceError(f"{self.name}: {what}: {size} bytes were sent, {last_line(arrived)} arrived; try again")

    def get(self, name: str, local: Path) -> None:
        place, what = shlex.quote(f"{self.scratch}/{name}"), f"fetching {name}"
        size = int(self._step(f"wc -c <{place}", what=what).split()[-1])
        content = self._step(f"cat {place}", what=what, timeout=STEP_TIMEOUT + size / SLOWEST, most=size + MOST_OUTPUT)
        if len(content) != size:
            hint = "does a login script there print something?"
            raise DeviceError(f"{self.name}: {what}: it has {size} bytes, {len(content)} arrived; {hint}")
        try:
            write_whole(local, content)
        except OSError as error:
            raise DeviceError(f"{local} cannot be written: {error.strerror or error}") from error

    def run(self, command: Sequence[str], *, timeout: float) -> str:
        script = shlex.join(command)
        return self._step(script, what=os.path.basename(command[0]), timeout=timeout).decode("utf-8", "replace")

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        script = shlex.join([self.python, *arguments])
        return subprocess.Popen(self._ssh(self._accounted(script)), start_new_session=True, **PIPES)

    def _accounted(self, script: str) -> str:
        """The script, on record while it runs, so that the keeper can end it."""
        return STEP.format(pid=shlex.quote(f"{self.scratch}/.pid"), script=script)

    def _step(
        self,
        script: str,
        *,
        what: str,
        timeout: float = STEP_TIMEOUT,
        stdin: IO[bytes] | None = None,
        most: int = MOST_OUTPUT,
    ) -> bytes:
        """Run a shell script there to its end and return its stdout, of at most `most` bytes."""
        pipes = {**PIPES, "stdin": stdin or subprocess.DEVNULL}
        with subprocess.Popen(self._ssh(self._accounted(script)), start_new_session=True, **pipes) as process:

            def end_with_keeper() -> None:
                """Else ssh would get through to a machine that is back, where nobody would clean up after it."""
                if self._keeper.poll() is not None:
                    process.kill()

            try:
                out, complaint = read_to_end(
                    process, what=f"{self.name}: {what}", timeout=timeout, most=most, watch=end_with_keeper
                )
            except subprocess.TimeoutExpired as error:
                raise DeviceError(f"{self.name}: {what} did not end within {timeout:.0f} s and was stopped") from error
            finally:
                process.kill()
        if process.returncode:
            raise self._failure(process.returncode, complaint, what)
        return out

    def _ssh(self, script: str, *, master: bool = False) -> list[str]:
        options = {
            **OPTIONS,
            "ControlMaster": "yes" if master else "no",
            "ControlPath": str(self._socket),
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return ["ssh", *words, *self.options, "-aTx", "--", self.host, f"exec sh -c {shlex.quote(script)}"]

    def _failure(self, code: int, complaint: bytes, what: str) -> DeviceError:
        """A one-line error from an exit code and what came on stderr."""
        for phrase, reason in REASONS.items():
            if code == LOST and phrase.encode() in complaint:
                return DeviceError(f"{self.name} cannot be reached: {reason.format(host=self.host)}")
        if self.scratch and (code == LOST or self._keeper.poll() is not None):
            # A step after a loss gets through on a connection of its own, and finds no scratch folder.
            return DeviceError(f"{self.name} was lost while {what}: {last_line(self._complained() or complaint)}")
        if code == LOST:
            hint = f"is it on, does `ssh {self.host}` work?"
            return DeviceError(f"{self.name} cannot be reached: {last_line(complaint)}; {hint}")
        hint = "; make room there" if b"No space left" in complaint or b"quota" in complaint else ""
        return DeviceError(f"{self.name}: {what} failed (exit code {code}): {last_line(complaint)}{hint}")


def open_host(host: str, python: str | None = None) -> Ssh:
    """`host` is what follows `ssh:`. Raises UsageError if it names no host."""
    if host.startswith("//"):
        host = f"ssh:{host}"
    if not host or host.startswith("-") or not host.isprintable():
        raise UsageError(f"ssh:{printable(host)} names no host, expected ssh:HOST such as ssh:pi or ssh:user@10.0.0.2")
    return Ssh(host, python=python or "python3")


def finding() -> Finding:
    """Its row in `doctor`."""
    return client_finding("ssh", ["ssh", "-V"], "install OpenSSH's client, e.g. apt-get install openssh-client")
