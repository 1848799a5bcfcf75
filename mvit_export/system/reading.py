"""Every file that this program reads comes through here: a regular file, of at most a given size, whole.

A path may lead to anything: a pipe that never ends, a device, a folder, a link to itself, a file larger than memory.
tests/test_reading.py holds every other way to read a file against a list with reasons.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KB, MB, GB = 10**3, 10**6, 10**9
# The most bytes for each use. What people have is far below.
TEXT = 16 * MB  # manifests, labels, recipes, settings of models
RECORDS = 256 * MB  # of latency, with every sample
PICTURE = 256 * MB
CODE = 16 * MB
MODEL = 2 * GB  # protobuf and flatbuffers end there
WEIGHTS = 64 * GB
ARRAYS = 4 * GB  # once unpacked: they are held in memory
UNPACKED = 8  # times the bytes of the file: what writes checkpoints does not compress


class Unreadable(OSError):
    """What a path leads to is not such a file. `strerror` says what it is and what was expected."""

    def __init__(self, reason: str, path: Path) -> None:
        super().__init__(errno.EINVAL, reason, str(path))


def open_regular(path: str | Path, limit: int) -> BinaryIO:
    """A regular file of at most `limit` bytes. Raises OSError, of which Unreadable is one."""
    path = Path(path)
    check_name(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer opens at once
    try:
        check_kind(path, os.fstat(descriptor), limit)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def check_regular(path: str | Path, limit: int) -> None:
    """As `open_regular`, for a library that opens the path itself."""
    check_name(Path(path))
    check_kind(Path(path), os.stat(path), limit)


def check_name(path: Path) -> None:
    """Python itself raises ValueError for such a name, before the system is asked."""
    if "\0" in str(path):
        raise Unreadable("has a name with a NUL in it", path)


def check_kind(path: Path, found: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable("is no regular file", path)
    if found.st_size > limit:
        raise Unreadable(f"has {size_text(found.st_size)}, expected at most {size_text(limit)}", path)


def read_bytes(path: str | Path, limit: int) -> bytes:
    with open_regular(path, limit) as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # it grows, or has no size, as files of /proc
        raise Unreadable(f"has more than {size_text(limit)}", Path(path))
    return content


def read_text(path: str | Path, limit: int = TEXT, *, encoding: str = "utf-8") -> str:
    """Raises OSError, and UnicodeDecodeError, which is a ValueError."""
    return read_bytes(path, limit).decode(encoding)


def read_json(path: str | Path, limit: int = TEXT) -> Any:
    """Raises OSError, and ValueError for what is no JSON, or is nested too deep to be read."""
    return parse_json(read_text(path, limit))


def parse_json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deep") from error


def read_toml(path: str | Path) -> dict[str, Any]:
    """Raises OSError, and ValueError for what is no TOML, or is nested too deep to be read."""
    try:
        return tomllib.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("TOML that is nested too deep") from error


def sha256_file(path: str | Path, limit: int = WEIGHTS) -> str:
    digest = hashlib.sha256()
    with open_regular(path, limit) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_zip(path: str | Path, limit: int, *, entries: tuple[str, ...] = ()) -> None:
    """Refuse a zip file of which all, or those `entries`, unpack to more than `limit` bytes.

    What is no zip file passes: its reader says so.
    """
    try:
        with open_regular(path, WEIGHTS) as file, zipfile.ZipFile(file) as packed:
            total = sum(e.file_size for e in packed.infolist() if not entries or e.filename in entries)
    except zipfile.BadZipFile:
        return
    if total > limit:
        raise Unreadable(f"unpacks to {size_text(total)}, expected at most {size_text(limit)}", Path(path))


def size_text(count: int) -> str:
    for unit, name in ((GB, "GB"), (MB, "MB"), (KB, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"
