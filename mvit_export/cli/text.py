"""Text that may hold anything, such as the name of a file, made fit to be printed; and the document of `--json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mvit_export.errors import text_of

JOINER = "\u200d"  # holds emoji together


def one_line(error: BaseException) -> str:
    return harmless(" ".join(text_of(error).split())) or type(error).__name__


def harmless(
    text: str, *, escape: Callable[[str], str] = lambda c: c.encode("unicode_escape").decode(), keep: str = ""
) -> str:
    """Text that may hold anything, such as a file's name, as it may be printed: what would move the cursor, colour,
    begin a line or turn the reading direction is written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep or c == JOINER else escape(c) for c in text)


def error_fields(kind: str, message: str) -> dict[str, Any]:
    return {"status": "error", "error": {"type": kind, "message": message}}


def to_document(data: Any) -> str:
    document = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    return harmless(document, escape=json_escape, keep="\n") + "\n"


def json_escape(character: str) -> str:
    """As JSON writes any character, in UTF-16 units."""
    return json.dumps(character)[1:-1]
