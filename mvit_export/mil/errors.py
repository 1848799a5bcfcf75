"""What the executor adds to the package's errors.

MvitExportError
├── UnsupportedOpError     the program has an op, or a value of an op's parameter, that is not implemented
└── ExecutionError         an op failed on the values it was given; names the op and its place
"""

from __future__ import annotations

from mvit_export.errors import MvitExportError


class UnsupportedOpError(MvitExportError):
    """An op or a parameter value that is not implemented: refused, never guessed."""


class ExecutionError(MvitExportError):
    """An op failed while the program ran, e.g. an index outside a tensor."""
