"""This machine, with the running Python; and what devices with a scratch folder on this machine share."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mvit_export.benchmarks.devices.commands import PIPES, finish
from mvit_export.benchmarks.devices.machines import Machine
from mvit_export.doctor import Finding
from mvit_export.errors import DeviceError
from mvit_export.system.files import write_whole


class LocalFolder(Machine):
    """A machine whose scratch folder is on this machine."""

    def arrive(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mvit-export.", ignore_cleanup_errors=True)
        self.scratch = self._folder.name

    def leave(self) -> None:
        self._folder.cleanup()

    def put_file(self, local: Path, name: str) -> None:
        place = Path(self.scratch, name)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local, place)
        except OSError as error:
            place.unlink(missing_ok=True)
            raise DeviceError(f"{local} could not be copied to {self.scratch}: {error.strerror or error}") from error

    def get(self, name: str, local: Path) -> None:
        try:
            write_whole(local, Path(self.scratch, name).read_bytes())
        except OSError as error:
            raise DeviceError(f"{name} could not be copied to {local}: {error.strerror or error}") from error


class Local(LocalFolder):
    name = "local"
    here = True

    def put_model(self, local: Path) -> str:
        return str(local.resolve())

    def run(self, command: Sequence[str], *, timeout: float) -> str:
        return finish(command, where=self.name, timeout=timeout)

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *arguments], start_new_session=True, **PIPES)


def finding() -> Finding:
    return Finding("device", "local", True, f"{platform.system()} {platform.machine()}")
