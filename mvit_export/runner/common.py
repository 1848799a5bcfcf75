"""What every adapter provides: a runtime's name and version, a file opened in it, and refusals in words."""

from __future__ import annotations

import importlib
import json
from typing import Any, Callable, NamedTuple

try:
    import numpy as np
except ImportError:  # reported with a reason when a model is to be opened
    np = None  # type: ignore[assignment]

Call = Callable[[Any], "dict[str, Any]"]  # one array in, every output by name


class Opened(NamedTuple):
    """A loaded model: its call, what executes it, and the labels in the file."""

    call: Call
    executed: str
    labels: list[str] | None = None


class Refusal(Exception):
    """An answer other than a result. `kind`: unavailable (not possible here), rejected (the file's fault) or misuse.

    The message of a rejected file is worded to follow its path.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Adapter:
    """One runtime with its option and its number of threads. Creating one raises Refusal if it cannot work here.

    `open` raises Refusal too, and whatever the runtime raises for a file that it does not accept.
    """

    name = ""
    version = ""

    def __init__(self, option: str, threads: int) -> None:
        self.option, self.threads = option, threads

    def open(self, path: str) -> Opened:
        raise NotImplementedError

    def profile(self, path: str, feeds: dict[str, Any], runs: int) -> list[dict[str, Any]] | None:
        """Time by op type; None if no profiler of the runtime is known here."""
        return None

    def placement(self, path: str) -> dict[str, int] | None:
        """Operations by the device that the runtime plans for them; None if it makes no such plan."""
        return None


def import_runtime(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refusal("unavailable", f"{name} does not import ({one_line(error)}): pip install {name}") from error


def distribution_version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def read_labels(text: str | None) -> list[str] | None:
    """Labels from a file's metadata. Raises ValueError for what is no JSON list of texts."""
    try:
        labels = json.loads(text) if text else []
    except RecursionError as error:
        raise ValueError("the labels in it are nested too deep") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError("the labels in it are not a list of texts")
    return labels if text else None


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
