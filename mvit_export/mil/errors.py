"""What the executor adds to the package's errors.

MvitExportError
├── UnsupportedOpError     the program holds an op, or a value of an op's parameter, that is not implemented
└── ExecutionError         an op failed on the values it was given; names the op and its place
"""

from __future__ import annotations

from mvit_export.errors import MvitExportError


class UnsupportedOpError(MvitExportError):
    """An op or a parameter value outside of what is implemented: refused, never guessed."""


class ExecutionError(MvitExportError):
    """An op failed while the program ran, e.g. an index outside of a tensor."""


def printable(name: str) -> str:
    """A name from a file, fit for one line: a damaged one can hold anything."""
    return "".join(c if c.isprintable() else "?" for c in name[:100])


def first_line(error: BaseException) -> str:
    """The message of `error` cut to one line; the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__
