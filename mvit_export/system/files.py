"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
import stat
from contextlib import suppress
from pathlib import Path

NOT_UTF8 = "the path has bytes that are not UTF-8, which libraries cannot open; rename the folder or file"


def is_utf8(path: str | Path) -> bool:
    """Whether libraries that take paths as UTF-8 can open it; Python holds other bytes as lone surrogates."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path`, fsync and rename, so that a reader sees the old file or the new one. Raises OSError.

    A folder, pipe or device is refused: the rename would take its place, that of /dev/stdout too.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers left beside `path`; call it only while no other process is writing there."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)
