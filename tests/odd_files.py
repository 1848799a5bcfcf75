"""What a path may lead to instead of a file."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


ODD = {
    "fifo": os.mkfifo, "folder": Path.mkdir, "loop": lambda path: path.symlink_to(path), "socket": make_socket,
    "zero": lambda path: path.symlink_to("/dev/zero"), "random": lambda path: path.symlink_to("/dev/urandom"),
    "tty": lambda path: path.symlink_to("/dev/null"), "proc": lambda path: path.symlink_to("/proc/self/mem"),
}  # fmt: skip
