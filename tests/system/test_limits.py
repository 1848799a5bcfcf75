"""What the machine refuses is told as such, by whichever error it shows itself."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from mvit_export.system import limits
from mvit_export.system.limits import find_limit


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        ImportError("libbig.so: failed to map segment from shared object"),
        ImportError("libbig.so: cannot allocate memory in static TLS block"),
        RuntimeError("std::bad_alloc"),
        caused(KeyError("x"), MemoryError()),
    ],
)
def test_memory(error: Exception) -> None:
    assert str(find_limit(error)).startswith("not enough memory (")
    assert str(find_limit(error)).endswith("; free some, or lift the limit (ulimit -v)")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("x: No space left on device")])
def test_space(error: Exception) -> None:
    assert str(find_limit(error)).startswith("not enough space on the disk (")


def test_other_errors_are_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ImportError("No module named 'x'"), ValueError("no memory of it"), OSError(errno.EACCES, "no")):
        assert find_limit(error) is None
    lost = SystemError("error return without exception set")
    monkeypatch.setattr(limits, "memory_is_limited", lambda: False)
    assert find_limit(lost) is None
    monkeypatch.setattr(limits, "memory_is_limited", lambda: True)
    assert find_limit(lost) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not hold a process to RLIMIT_AS")
def test_torch_that_finds_no_room_is_one_line() -> None:
    command = f"ulimit -v 300000; exec {sys.executable} -m mvit_export --to onnx --variant xxs --json"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("mvit-export: error: not enough memory (")
    assert done.stderr.count("\n") == 1
