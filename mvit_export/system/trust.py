"""What a manifest may name: code to run, weights to read or fetch. Only what this user has named himself is followed.

A manifest is data that may come from anyone. What is exported is remembered in the user's state folder
(`XDG_STATE_HOME`, by default ~/.local/state): a file for each name, with the sha256 of what it stood for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mvit_export.system.files import write_whole
from mvit_export.system.reading import CODE, read_json, sha256_file

TRUST_ALL = "MVIT_EXPORT_TRUST_CODE"  # set by --trust-code, for this process and those that it starts
Entry = tuple[str, str]  # a name, and the sha256 of what it stood for, "" for what has none

_REMEMBERED: set[Entry] = set()  # by this process: the disk may be read-only


def remember(entries: Iterable[Entry]) -> None:
    """Let manifests of this user name these from now on."""
    for name, digest in entries:
        _REMEMBERED.add((name, digest))
        with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home folder
            place(name).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(place(name), json.dumps({"name": name, "sha256": digest}).encode())


def remembered() -> tuple[Entry, ...]:
    """What this process has remembered, for one that it starts."""
    return tuple(_REMEMBERED)


def is_trusted(name: str, digest: str) -> bool:
    """Whether this user has named it, and it is what it was then; or trusts whatever he opens."""
    if name.startswith("code:") and not digest:  # it cannot be read
        return False
    if os.environ.get(TRUST_ALL) == "1" or (name, digest) in _REMEMBERED:
        return True
    try:
        record = read_json(place(name))
    except (OSError, ValueError, RuntimeError):
        return False
    return bool(record == {"name": name, "sha256": digest})


def trust_everything() -> None:
    os.environ[TRUST_ALL] = "1"


def place(name: str) -> Path:
    given = os.environ.get("XDG_STATE_HOME", "")
    state = given if os.path.isabs(given) else Path.home() / ".local/state"  # a relative one is to be ignored
    return Path(state, "mvit-export", "named", hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest())


def digest_of(path: Path) -> str:
    """The sha256 of a file, "" if it cannot be read."""
    try:
        return sha256_file(path, CODE)
    except OSError:
        return ""
