"""What the command line prints and where: results, progress, errors. What converters print is silenced.

Under `--json` stdout is exactly one JSON document and people read stderr; otherwise results go to stdout.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from rich.console import Console
from rich.text import Text

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
        self._sink = tempfile.TemporaryFile()
        target = 2 if self.verbose else self._sink.fileno()
        os.dup2(target, 1)
        os.dup2(target, 2)
        return self

    def __exit__(self, *_: object) -> None:
        flush()
        for descriptor, saved in enumerate(self._saved, start=1):
            os.dup2(saved, descriptor)
            os.close(saved)
        for stream in (self.stdout, self.stderr):
            with suppress(BrokenPipeError):  # a reader such as `head` has gone, which does not change the verdict
                stream.close()
        self._sink.close()

    def print(self, *parts: str | Text) -> None:
        """One line for people, unless `--quiet`."""
        if not self.quiet:
            self.console.print(*parts, soft_wrap=True, highlight=False, markup=False)

    def print_json(self, data: Any) -> None:
        """The one document of `--json`; nothing otherwise."""
        if self.as_json:
            with suppress(BrokenPipeError):
                self.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
                self.stdout.flush()

    def write(self, text: str) -> None:
        """Write a requested document to stdout, even with `--quiet`."""
        with suppress(BrokenPipeError):
            self.stdout.write(text)
            self.stdout.flush()

    def error(self, error: BaseException) -> None:
        """One line on stderr, the traceback after it with `--verbose`; under `--json` a document as well."""
        message = one_line(error)
        self.stderr.write(f"mvit-export: error: {message}\n")
        if self.verbose:
            self.stderr.write("".join(traceback.format_exception(error)))
        self.stderr.flush()
        self.print_json({"status": "error", "error": {"type": type(error).__name__, "message": message}})

    @contextmanager
    def progress(self, description: str) -> Iterator[Any]:
        """A spinner with elapsed time; `step(text)` renames it. Nothing is drawn if stderr is not a terminal."""
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        disable = self.quiet or not self.progress_console.is_terminal
        with Progress(*columns, console=self.progress_console, transient=True, disable=disable) as bar:
            task = bar.add_task(description, total=None)
            yield lambda text: bar.update(task, description=text)


class PipeConsole(Console):
    """A console that falls silent when its reader has gone; Rich's own exits with 1, the code of a failed check."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def flush() -> None:
    """Flush both standard streams, if they exist: a parent may have closed them."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(BrokenPipeError):
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


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def status_text(status: str) -> Text:
    """PASS, FAIL or NOT-RUN, padded to one width."""
    return Text(f"{status.upper():<7}", style=STYLES[status])


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
