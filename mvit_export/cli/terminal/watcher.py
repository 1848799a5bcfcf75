"""Some libraries end the process themselves, and systems kill it: then a second one says so, in its place."""

from __future__ import annotations

import ctypes
import os
import signal
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from mvit_export.cli.codes import EXIT_ERROR
from mvit_export.cli.text import error_fields, harmless, to_document
from mvit_export.system import staging

TAIL = 4096  # bytes of what was printed last
DONE, MADE, STAGED, END = b".", b"m", b"s", b"\0"  # what it is told: that all is well, or a letter and a path
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_open: set[int] = set()  # the ends that processes forked later must not keep open


def close_in_child() -> None:
    staging.begun.clear()
    for descriptor in _open:
        with suppress(OSError):
            os.close(descriptor)


os.register_at_fork(after_in_child=close_in_child)


class Watcher:
    """A process that waits for this one's word that it ended by itself. Where none can be made, there is none.

    Without it, whatever a library printed into `sink` before the end would be lost, and `--json` would be empty. It
    also hears of the folders that are made on the way, and removes what a killed run left half-written there.
    """

    def __init__(self, sink: IO[bytes] | None, stderr: int, stdout: int | None) -> None:
        """`stdout` is None if no document is owed."""
        read, self._write = os.pipe()
        self._pid: int | None = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # or Ctrl-C would find a second copy of this program
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # JAX's, if it is imported: the child needs nothing of its threads
                self._pid = os.fork()
            if self._pid == 0:
                self.watch(read, sink, stderr, stdout)
        except OSError:  # no more processes are allowed
            os.close(self._write)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(read)
        if self._pid is not None:
            _open.add(self._write)
            staging.begun.append(self.tell)

    def watch(self, read: int, sink: IO[bytes] | None, stderr: int, stdout: int | None) -> None:
        """What the child does. Never returns."""
        try:
            os.close(self._write)
            with os.fdopen(read, "rb") as stream:
                words = stream.read().split(END)
            if DONE not in words:
                report(read_tail(sink), stderr, stdout)
                made, staged = (
                    [Path(os.fsdecode(word[1:])) for word in words if word[:1] == kind] for kind in (MADE, STAGED)
                )
                staging.clean_after_death(made, staged)
        finally:
            os._exit(0)

    def tell(self, made: Sequence[Path], staged_in: Path | None) -> None:
        words = [MADE + os.fsencode(folder.absolute()) for folder in made]
        words += [STAGED + os.fsencode(staged_in.absolute())] if staged_in else []
        self._say(*words)

    def _say(self, *words: bytes) -> None:
        with suppress(OSError):  # it was killed
            os.write(self._write, b"".join(word + END for word in words))

    def dismiss(self) -> None:
        if self._pid is None:
            return
        with suppress(ValueError):  # this is a fork, which tells nothing
            staging.begun.remove(self.tell)
        _open.discard(self._write)
        self._say(DONE)
        os.close(self._write)
        with suppress(OSError):  # somebody else has waited for it, or the system does
            os.waitpid(self._pid, 0)


class NoSilentExit:
    """A library that calls C's exit(0) would make a run that did not end look like one that passed: it ends with 2.

    Only with glibc, where a handler can be taken back: one that outlived the interpreter would crash.
    """

    def __init__(self) -> None:
        self._handle = ctypes.create_string_buffer(1)  # its address tells our handler from others
        self._closed, own = "CS_GNU_LIBC_VERSION" not in os.confstr_names, os.getpid()
        end_process = os._exit  # a model's code that is running finds another one there
        if self._closed:
            return

        def end(_: int) -> None:
            if not self._closed and os.getpid() == own:  # what is forked from here may end as it likes
                end_process(EXIT_ERROR)

        self._end = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(end)
        ctypes.CDLL(None)["__cxa_atexit"](self._end, None, self._handle)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            ctypes.CDLL(None)["__cxa_finalize"](self._handle)  # calls our handler and forgets it


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
    with suppress(OSError):
        os.write(stderr, f"mvit-export: error: {message}\n".encode())
    if stdout is not None:
        os.write(stdout, to_document(error_fields("Ended", message)).encode())
