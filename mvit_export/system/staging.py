"""A directory that appears whole or not at all.

The new directory is filled under a hidden name beside its place, synced, and moved there by one rename. The hidden
directory is its own lock (flock), which the kernel drops when its run dies. So no lock file is left, and a leftover of
a dead run can be told from the work of a live one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mvit_export.errors import ArtifactError

try:
    import fcntl
except ImportError:  # Windows has no flock; the converters do not run there either
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".mvit-export.partial"  # our mark: folders of other programs are not swept up
Begun = Callable[[Sequence[Path], Path | None], None]
begun: list[Begun] = []  # told of the folders that a run makes, and of the one that it stages in, before it does
PATIENCE = 0.5  # seconds; a run that only looks for leftovers holds a lock for less


@contextmanager
def staged_directory(place: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory to fill; on success it becomes `place`, on an error nothing is left of it.

    Raises ArtifactError if `place` exists and `overwrite` is False, another run is writing it, or the disk refuses.
    """
    if fcntl is None:
        raise ArtifactError("this system has no flock, which a safe export needs; use Linux or macOS")
    staging = place.parent / f".{place.name}{SUFFIX}"
    lock = None
    with no_empty_folders(place.parent):
        try:
            with _disk_errors(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                _sweep(place.parent)  # first, since it may put back what a dead run had moved away from `place`
                check_free(place, overwrite=overwrite)
                lock = _claim(staging, place)
                yield staging
                _sync(staging)
                check_free(place, overwrite=overwrite)
                _move(staging, place)
        finally:
            if lock is not None:
                if _same(staging, lock):  # an error left it; after success the name may be another run's already
                    shutil.rmtree(staging, ignore_errors=True)
                os.close(lock)


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """At the end remove `folder` and those above it if they are empty and did not exist at the start.

    So a failed run leaves no folders behind. Around several stagings in one folder it removes what the first of them
    made and could not remove while others used it.
    """
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]  # innermost first
    for tell in begun:
        tell(made, None)
    try:
        yield
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()  # only if empty


@contextmanager
def scratch_directory(place: Path) -> Iterator[Path]:
    """Yield an empty directory beside `place` to prepare it in; it is removed at the end, whatever happened.

    If this run is killed, the next one that writes beside `place` removes the directory. Raises ArtifactError if
    another run works at the same place, or the disk refuses.
    """
    if fcntl is None:
        raise ArtifactError("this system has no flock, which a safe export needs; use Linux or macOS")
    scratch = place.parent / f".{place.name}.work{SUFFIX}"
    lock = None
    with no_empty_folders(place.parent):  # what was prepared may have been moved there
        try:
            with _disk_errors(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                _sweep(place.parent)
                lock = _claim(scratch, place)
                yield scratch
        finally:
            if lock is not None:
                shutil.rmtree(scratch, ignore_errors=True)
                os.close(lock)


def check_free(place: Path, *, overwrite: bool) -> None:
    """Refuse an existing `place` unless it may be overwritten; only artifact directories are ever overwritten."""
    if not os.path.lexists(place):
        return
    if not overwrite:
        raise ArtifactError(f"{place} exists; pass --overwrite to replace it, or another --out")
    if place.is_symlink() or not (place / "manifest.json").is_file():
        raise ArtifactError(f"{place} exists and is not an artifact directory; move it away, or pass another --out")


def _claim(staging: Path, place: Path) -> int:
    """Make and lock the staging directory; a dead run's leftover under that name is emptied and taken over."""
    for tell in begun:
        tell((), place.parent)
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(FileExistsError):
            staging.mkdir(parents=True)  # a failed run may have removed the parent since we made or saw it
        with suppress(FileNotFoundError):  # its run ended between our two steps and removed it: try again
            lock = os.open(staging, os.O_RDONLY)
            if _try_lock(lock) and _same(staging, lock):
                _clear(staging)
                return lock
            os.close(lock)
        if time.monotonic() > deadline:
            raise ArtifactError(f"another run is writing {place}; wait for it, or pass another --out")
        time.sleep(0.02)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _sweep(parent: Path) -> None:
    """Remove what dead runs left in `parent`; put back an old directory that a plain rename had moved aside."""
    for leftover in [*parent.glob(f".*{SUFFIX}.old"), *parent.glob(f".*{SUFFIX}")]:
        place = parent / leftover.name.removeprefix(".").removesuffix(".old").removesuffix(SUFFIX)
        with suppress(OSError):  # not a directory, gone in the meantime, or not ours to delete
            lock = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if not _try_lock(lock) or not _same(leftover, lock):
                    continue  # its run is alive
                if leftover.name.endswith(".old") and not place.exists():
                    leftover.rename(place)
                else:
                    shutil.rmtree(leftover)
            finally:
                os.close(lock)


def clean_after_death(made: Sequence[Path], staged_in: Sequence[Path], *, patience: float = 5.0) -> None:
    """What a run that was killed would have done at its end, by one that outlived it.

    Its workers may hold the locks for a moment longer, so this tries again for `patience` seconds.
    """
    deadline = time.monotonic() + patience
    for parent in staged_in:
        _sweep(parent)
        while [*parent.glob(f".*{SUFFIX}*")] and time.monotonic() < deadline:
            time.sleep(0.05)
            _sweep(parent)
    for folder in sorted(made, key=lambda place: -len(place.parts)):
        with suppress(OSError):
            folder.rmdir()  # only if empty


def _sync(directory: Path) -> None:
    """fsync every file and directory below, so that the rename never outlives the contents."""
    for root, _, files in os.walk(directory):
        for path in [*(os.path.join(root, name) for name in files), root]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _move(staging: Path, place: Path) -> None:
    """Put `staging` at `place` in one step, then delete the directory that was there."""
    if not place.exists():
        staging.rename(place)
    else:
        old = os.open(place, os.O_RDONLY)
        try:
            _try_lock(old)  # so that no other run mistakes the old directory for a leftover while it is deleted
            aside = staging if _exchange(staging, place) else _move_by_renames(staging, place)
            shutil.rmtree(aside)
        finally:
            os.close(old)
    parent = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically; False if the system or the file system cannot.

    Linux: renameat2(2) with RENAME_EXCHANGE = 2. macOS: renamex_np(2) with RENAME_SWAP = 2.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        result = libc.renamex_np(*names, 2)
    elif hasattr(libc, "renameat2"):
        at_cwd = -100
        result = libc.renameat2(at_cwd, names[0], at_cwd, names[1], 2)
    else:
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _move_by_renames(staging: Path, place: Path) -> Path:
    """Two renames where no exchange exists; returns the name of the old directory.

    A kill between them hides the old directory until the next run, whose `_sweep` puts it back.
    """
    aside = staging.with_name(f"{staging.name}.old")
    place.rename(aside)
    staging.rename(place)
    return aside


@contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{place} cannot be written: {error.strerror or error}") from error
