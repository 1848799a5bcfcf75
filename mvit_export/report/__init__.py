"""What the JSON files of artifacts say, as one page for people (HTML), for a CI summary (Markdown) or for CI (JUnit).

Only files are read: nothing is verified or measured here, and whatever was not is listed with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mvit_export.errors import UsageError
from mvit_export.formats.choices import choose
from mvit_export.report.junit import render_junit
from mvit_export.report.markdown import render_markdown
from mvit_export.report.page import render_html
from mvit_export.report.reading import Report, read_report
from mvit_export.system.files import write_whole

__all__ = ["choose_format", "read_report", "render", "write_report"]

RENDERERS: dict[str, Callable[[Report], str]] = {
    "html": render_html,
    "markdown": render_markdown,
    "junit": render_junit,
}
SUFFIXES = {".md": "markdown", ".xml": "junit"}


def choose_format(name: str | None, output: Path | None) -> str:
    """The format asked for, else what the output's name says, else html."""
    if name is not None:
        return choose(name, RENDERERS, what="--format")
    return SUFFIXES.get(output.suffix.lower(), "html") if output else "html"


def render(report: Report, *, format: str) -> str:
    return RENDERERS[format](report)


def write_report(text: str, path: Path, *, report: Report) -> None:
    """Write the report whole or not at all. Raises UsageError if that fails or would touch an artifact."""
    for entry in report.entries:
        if Path(os.path.realpath(path)).is_relative_to(entry.artifact.path.resolve()):
            raise UsageError(f"-o {path} lies inside the artifact {entry.path}; name a file outside of it")
    try:
        write_whole(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UsageError(f"-o {path} cannot be written: {error.strerror or error}") from error
