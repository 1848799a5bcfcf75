"""Programs on this machine, run to their end."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvit_export.doctor import Finding
from mvit_export.errors import DeviceError, printable

STEP_TIMEOUT = 60.0  # seconds for a step that does almost nothing
PIPES: Mapping[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(command: Sequence[str], *, where: str, timeout: float, **options: Any) -> str:
    """Run a program to its end and return its stdout. Raises DeviceError with the last line of its stderr."""
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
