"""Programs on this machine, run to their end."""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mvit_export.doctor import Finding
from mvit_export.errors import DeviceError, printable

STEP_TIMEOUT = 60.0  # seconds for a step that does almost nothing
MOST_OUTPUT = 64 * 2**20  # bytes on each of stdout and stderr; a file's content has its own size for a limit
PIPES: Mapping[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(command: Sequence[str], *, where: str, timeout: float, **options: Any) -> str:
    """Run a program to its end and return its stdout. Raises DeviceError with the last line of its stderr."""
    what, pipes = f"{where}: {Path(command[0]).name}", {**PIPES, "stdin": subprocess.DEVNULL}
    try:
        process = subprocess.Popen(command, start_new_session=True, **pipes, **options)
    except OSError as error:
        raise DeviceError(f"{what} does not start: {error.strerror or error}") from error
    with process:
        try:
            out, complaint = read_to_end(process, what=what, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"{what} did not end within {timeout:.0f} s and was stopped") from error
        finally:
            process.kill()
    if process.returncode:
        raise DeviceError(f"{what} failed (exit code {process.returncode}): {last_line(complaint)}")
    return out.decode("utf-8", "replace")


def read_to_end(
    process: subprocess.Popen[bytes],
    *,
    what: str,
    timeout: float,
    most: int = MOST_OUTPUT,
    watch: Callable[[], None] = lambda: None,
) -> tuple[bytes, bytes]:
    """stdout and stderr of a process until it ends: `communicate` with a limit. `watch` is called in between, often.

    Raises subprocess.TimeoutExpired, and DeviceError if one of them is longer than `most` bytes.
    """
    deadline = time.monotonic() + timeout
    said = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as selector:
        for stream in said:
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(process.args, timeout)
            for key, _ in selector.select(min(1.0, left)):
                chunk, text = os.read(key.fd, 1 << 16), said[key.fileobj]  # type: ignore[index]
                text += chunk
                if len(text) > most:
                    raise DeviceError(f"{what} printed more than {most >> 20} MB and was stopped")
                if not chunk:
                    selector.unregister(key.fileobj)
            watch()
    process.wait(max(0.0, deadline - time.monotonic()))
    out, complaint = map(bytes, said.values())
    return out, complaint


def last_line(text: bytes) -> str:
    """The last line that is not blank, fit to be part of a one-line message."""
    lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
    return printable(lines[-1], 300) if lines else "no reason given"


def client_finding(name: str, command: list[str], install: str) -> Finding:
    """Doctor's row for a device that is reached through the client `name`; `command` prints its version."""
    if shutil.which(name) is None:
        return Finding("device", name, False, f"{name} is not on the path: {install}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("device", name, False, f"{' '.join(command)} fails ({error}): {install}")
    return Finding("device", name, True, (done.stdout or done.stderr).splitlines()[0])
