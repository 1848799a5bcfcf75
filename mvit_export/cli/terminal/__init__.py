"""What the command line prints and where: results, progress, errors. What converters print is silenced.

Under `--json` stdout is exactly one JSON document and people read stderr; otherwise results go to stdout.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from mvit_export.cli.terminal.watcher import NoSilentExit, Watcher
from mvit_export.cli.text import error_fields, harmless, one_line, to_document
from mvit_export.errors import OutputError

STYLES = {"pass": "bold green", "fail": "bold red", "not-run": "bold yellow"}


class Terminal:
    """The streams of one command. While it is open, whatever libraries print is kept out of them.

    Converters write to the process's own file descriptors from C++, so those are redirected: to a scratch file, or,
    with `verbose`, to stderr. Use as a context manager.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json, self.quiet, self.verbose = as_json, quiet, verbose

    def __enter__(self) -> Terminal:
        flush()
        self._saved = [duplicate(1), duplicate(2)]
        # A name that is not valid UTF-8 is printed with escapes, which JSON reads back.
        self.stdout, self.stderr = (
            os.fdopen(os.dup(saved), "w", encoding="utf-8", errors="backslashreplace") for saved in self._saved
        )
        self.progress_console = make_console(self.stderr)
        self.console = make_console(self.stderr if self.as_json else self.stdout)
        self._sink = open_sink()
        self._watcher = Watcher(
            None if self.verbose else self._sink, self._saved[1], self._saved[0] if self.as_json else None
        )
        self._no_silent_exit = NoSilentExit()
        target = 2 if self.verbose else self._sink.fileno()
        os.dup2(target, 1)
        os.dup2(target, 2)
        return self

    def __exit__(self, *_: object) -> None:
        self._no_silent_exit.close()
        self._watcher.dismiss()
        flush()
        for descriptor, saved in enumerate(self._saved, start=1):
            os.dup2(saved, descriptor)
            os.close(saved)
        for stream in (self.stdout, self.stderr):
            with suppress(OSError):  # everything was flushed when it was written
                stream.close()
        self._sink.close()

    def print(self, *parts: str | Text) -> None:
        """One line for people, unless `--quiet`."""
        if not self.quiet:
            shown = [part if isinstance(part, Text) else harmless(part) for part in parts]
            with suppress(OSError) if self.as_json else stdout_errors():
                self.console.print(*shown, soft_wrap=True, highlight=False, markup=False)

    def print_json(self, data: Any) -> None:
        """The one document of `--json`; nothing otherwise."""
        if self.as_json:
            with stdout_errors():
                self.stdout.write(to_document(data))
                self.stdout.flush()

    def write(self, text: str) -> None:
        """Write a requested document to stdout, even with `--quiet`."""
        with stdout_errors():
            self.stdout.write(harmless(text, keep="\n\t"))
            self.stdout.flush()

    def error(self, error: BaseException) -> None:
        """What `complain` writes; under `--json` a document as well."""
        self.complain(error)
        with suppress(OutputError):
            self.print_json(error_fields(type(error).__name__, one_line(error)))

    def complain(self, error: BaseException) -> None:
        """One line on stderr, the traceback after it with `--verbose`."""
        with suppress(OSError):
            self.stderr.write(f"mvit-export: error: {one_line(error)}\n")
            if self.verbose:
                self.stderr.write(harmless("".join(traceback.format_exception(error)), keep="\n"))
            self.stderr.flush()

    @contextmanager
    def progress(self, description: str) -> Iterator[Any]:
        """A spinner with elapsed time; `step(text)` renames it. Nothing is drawn if stderr is not a terminal."""
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        disable = self.quiet or not self.progress_console.is_terminal
        with Progress(*columns, console=self.progress_console, transient=True, disable=disable) as bar:
            task = bar.add_task(description, total=None)
            yield lambda text: bar.update(task, description=harmless(text))


class PipeConsole(Console):
    """A console that falls silent when its reader has gone; Rich's own exits with 1, the code of a failed check."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@contextmanager
def stdout_errors() -> Iterator[None]:
    """A reader that has gone, such as `head`, does not change the verdict; an output that is lost is an error."""
    try:
        yield
    except BrokenPipeError:
        pass
    except OSError as error:
        raise OutputError(f"stdout cannot be written: {error.strerror or error}") from error


def open_sink() -> IO[bytes]:
    """Where what libraries print goes; nowhere if no temporary folder can be written."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "wb")


def flush() -> None:
    """Flush both standard streams, if they exist: a parent may have closed them, or a user's own code."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # ValueError: it is closed
                stream.flush()


def duplicate(descriptor: int) -> int:
    """A copy of a standard descriptor, or of the null device if it is closed."""
    try:
        return os.dup(descriptor)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def make_console(stream: IO[str]) -> Console:
    """A console that never wraps or truncates what is piped."""
    return PipeConsole(file=stream, width=None if stream.isatty() else 10_000)


def status_text(status: str) -> Text:
    """PASS, FAIL or NOT-RUN, padded to one width."""
    return Text(f"{status.upper():<7}", style=STYLES[status])


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
