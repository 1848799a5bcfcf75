"""Some libraries end the process themselves, and systems kill it: then a second one says so, in its place."""

from __future__ import annotations

import os
import signal
import warnings
from typing import IO

from mvit_export.cli.text import error_fields, harmless, to_document

TAIL = 4096  # bytes of what was printed last


class Watcher:
    """A process that waits for this one's word that it ended by itself.

    Without it, whatever a library printed into `sink` before the end would be lost, and `--json` would be empty.
    """

    def __init__(self, sink: IO[bytes] | None, stderr: int, stdout: int | None) -> None:
        """`stdout` is None if no document is owed."""
        read, self._write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # JAX's, if a caller has imported it: the child takes no lock of its threads
            self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._write)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
                if not os.read(read, 1):
                    report(read_tail(sink), stderr, stdout)
            finally:
                os._exit(0)
        os.close(read)

    def dismiss(self) -> None:
        os.write(self._write, b".")
        os.close(self._write)
        os.waitpid(self._pid, 0)


def read_tail(sink: IO[bytes] | None) -> str:
    """The last line that was printed."""
    if sink is None:
        return ""
    size = os.fstat(sink.fileno()).st_size
    tail = os.pread(sink.fileno(), TAIL, max(0, size - TAIL)).decode("utf-8", "replace")
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def report(last: str, stderr: int, stdout: int | None) -> None:
    said = f"; the last line that it printed: {harmless(last)[:300]}" if last else ""
    message = f"the process was ended from outside, or by a library{said}"
    os.write(stderr, f"mvit-export: error: {message}\n".encode())
    if stdout is not None:
        os.write(stdout, to_document(error_fields("Ended", message)).encode())
