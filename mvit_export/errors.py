"""Every error that a user can cause. Each message is one line: what was found, what was expected, what to do.

MvitExportError            exit code 2
├── UsageError             options that do not go together, or values out of range
├── MissingDependencyError a package that this step needs is not installed
├── WeightsError           a checkpoint that cannot be read or does not fit the network
├── HubError               a model hub that cannot be reached, or has no such model
├── ModelError             a user's model source that cannot be built or called
├── ConversionError        a converter gave up
│   └── PartialExportError  on some of several targets
├── ArtifactError          an artifact directory that is missing, damaged, in the way or in use
├── DeviceError            a device that cannot be reached, refused a step, or was lost half-way
├── OutputError            stdout that is full, or that a limit cuts off
└── RuntimeUnavailable     a runtime that cannot work here; parity reports it as NOT-RUN
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any


class MvitExportError(Exception):
    """Base of all errors that a user can cause or fix."""

    @property
    def without_advice(self) -> str:
        """What was found, for where "; what to do" would not help: the line up to its first semicolon."""
        return str(self).partition("; ")[0]


class UsageError(MvitExportError):
    """Options that do not go together, or a value outside what is accepted."""


class MissingDependencyError(MvitExportError):
    """An optional package is needed but not installed."""


class WeightsError(MvitExportError):
    """A checkpoint is unreadable, unsafe, incomplete or made for another network."""


class HubError(MvitExportError):
    """A model hub is unreachable or has no such repository or file."""


class ModelError(MvitExportError):
    """A model source (`FILE.py:FACTORY`, `timm:NAME`) did not produce a usable module."""


class ConversionError(MvitExportError):
    """A converter could not translate the model."""


class PartialExportError(ConversionError):
    """Some of several targets could not be made; `results` holds the others, in order.

    `failures` holds the error of each target that failed, by the target's name, such as `coreml-fp16`.
    """

    def __init__(
        self, message: str, *, results: Sequence[Any] = (), failures: Mapping[str, MvitExportError] | None = None
    ) -> None:
        super().__init__(message)
        self.results, self.failures = tuple(results), dict(failures or {})


class ArtifactError(MvitExportError):
    """An artifact directory is missing, damaged, in the way, or being written by another run."""


class DeviceError(MvitExportError):
    """A device cannot be reached, refused a step, or was lost half-way."""


class OutputError(MvitExportError):
    """What was asked for cannot be printed: the disk behind stdout is full, or a limit forbids it."""


class RuntimeUnavailable(MvitExportError):
    """A runtime cannot execute here: the reason is shown as NOT-RUN, never as success."""


def printable(text: str, limit: int = 100) -> str:
    """Text from a file or another library, which may contain anything, made fit for one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours
    return "".join(c if c.isprintable() else "?" for c in plain[:limit])


def first_line(error: BaseException) -> str:
    """The message of `error` cut to one line; the name of its class if it has none."""
    lines = [line for line in text_of(error).splitlines() if line.strip()]
    return printable(lines[0].strip(), 300) if lines else type(error).__name__


def text_of(error: BaseException) -> str:
    """Its message; "" where a class of somebody else's fails to make one."""
    try:
        return str(error)
    except Exception:
        return ""


def reason_of(error: BaseException) -> str:
    """Why a file could not be read: the system's word without its number and the path, or a parser's."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or say which extra provides it. `purpose` reads after "needed ", e.g. "to write ONNX files"."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        message = f"{module} is not installed, needed {purpose}: pip install 'mvit-export[{extra}]'"
        raise MissingDependencyError(message) from error
