"""Runs of `staged_directory` in processes of their own, which tests kill, hold or race.

    python staging_child.py write PLACE TAG       write generation TAG, overwriting
    python staging_child.py loop PLACE            print "ready", then overwrite until killed
    python staging_child.py hold PLACE TAG        print "holding" in the middle, go on at a line on stdin
    python staging_child.py race PLACE TAG        wait for a line on stdin, then write without overwriting
    python staging_child.py full PLACE            fill the disk (files limited to 64 KiB)
    python staging_child.py crash FOLDER MODE     die at every line in turn; print one JSON line for each

It imports nothing but the standard library and `mvit_export.system.staging`, so that starting it is cheap.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from mvit_export.errors import MvitExportError
from mvit_export.system import staging

FILES = ("manifest.json", "model.onnx", "model.mlpackage/Data/weights.bin")


def fill(folder: Path, tag: str) -> None:
    """Every file says which generation it belongs to."""
    for name in FILES:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(tag)


def write(place: Path, tag: str, *, overwrite: bool = True) -> None:
    with staging.staged_directory(place, overwrite=overwrite) as folder:
        fill(folder, tag)


def generation(place: Path) -> str:
    """The tag of a complete directory, "absent", or "BROKEN ..." for anything else."""
    if not place.exists():
        return "absent"
    found = {str(p.relative_to(place)): p.read_text() for p in place.rglob("*") if p.is_file()}
    tags = set(found.values())
    return tags.pop() if sorted(found) == sorted(FILES) and len(tags) == 1 else f"BROKEN {found}"


def loop(place: Path) -> None:
    print("ready", flush=True)
    for number in range(1_000_000):
        write(place, f"{os.getpid()}-{number}")


def hold(place: Path, tag: str) -> None:
    with staging.staged_directory(place, overwrite=True) as folder:
        print("holding", flush=True)
        sys.stdin.readline()
        fill(folder, tag)


def race(place: Path, tag: str) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    write(place, tag, overwrite=False)


def full(place: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    with staging.staged_directory(place, overwrite=True) as folder:
        fill(folder, "new")
        (folder / "big").write_bytes(bytes(1 << 20))


# A kill at every line of a run


def die_at_line(number: int) -> Callable[..., Any]:
    """A trace function that kills this process at the `number`-th line of staging.py or shutil.py it comes to."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal count
        if frame.f_code.co_filename not in (staging.__file__, shutil.__file__):
            return None
        if event == "line":
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def crash(folder: Path, mode: str) -> None:
    """`mode` is new, overwrite, or renames (overwrite where the system cannot exchange two names)."""
    if mode == "renames":
        staging._exchange = lambda a, b: False
    place, other = folder / "onnx-fp32", folder / "tflite-fp32"
    survived, number = False, 0
    while not survived:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        if mode != "new":
            write(place, "old")
        survived = _dies_in_child(place, number) == 0
        seen = generation(place)
        write(other, "other")  # the next run, of another target
        left = sorted(path.name for path in folder.iterdir())
        print(json.dumps({"seen": seen, "after": generation(place), "left": left, "survived": survived}))


def _dies_in_child(place: Path, number: int) -> int:
    pid = os.fork()
    if pid == 0:
        sys.settrace(die_at_line(number))
        write(place, "new")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    command, where, *rest = sys.argv[1:]
    commands: dict[str, Callable[..., None]] = {
        "write": write, "loop": loop, "hold": hold, "race": race, "full": full, "crash": crash,
    }  # fmt: skip
    try:
        commands[command](Path(where), *rest)
    except MvitExportError as error:
        sys.exit(str(error))
