"""Machines that have a Python: files are copied there, and a runner opens models in processes of its own."""

from __future__ import annotations

import itertools
import subprocess
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from mvit_export.artifact import Artifact
from mvit_export.benchmarks.devices.base import Device
from mvit_export.benchmarks.devices.probe import RunnerProbe
from mvit_export.benchmarks.devices.worker import START_TIMEOUT, Worker, pack_runner
from mvit_export.benchmarks.harness.configurations import Setting
from mvit_export.errors import RuntimeUnavailable
from mvit_export.readers.session import Session

OPEN_TIMEOUT = 300.0  # seconds; Core ML compiles, emulation is slow
PHONE_RUNTIMES = ("litert:gpu", "litert:nnapi")
PRODUCT_RUNS = 15

AnyMachine = TypeVar("AnyMachine", bound="Machine")


class Machine(Device):
    """Entering makes a scratch folder there; leaving ends what still runs in it and removes it."""

    scratch: str  # the folder's path on the machine
    has_roofline = True

    def __enter__(self: AnyMachine) -> AnyMachine:
        self._numbers = itertools.count(1)
        self._checked = ExitStack()  # the model that `open` returned last
        self.arrive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._checked.close()
        finally:
            self.leave()

    @abstractmethod
    def arrive(self) -> None:
        """Make the scratch folder. A failure here leaves nothing behind."""

    @abstractmethod
    def leave(self) -> None: ...

    # Files and programs

    def put(self, local: Path, name: str) -> str:
        """Copy a file, or a folder such as a Core ML package, into the scratch folder; returns its path there."""
        if local.is_dir():
            for path in sorted(path for path in local.rglob("*") if path.is_file()):
                self.put_file(path, f"{name}/{path.relative_to(local).as_posix()}")
        else:
            self.put_file(local, name)
        return f"{self.scratch}/{name}"

    @abstractmethod
    def put_file(self, local: Path, name: str) -> None: ...

    def put_model(self, local: Path) -> str:
        """Like `put`, beside other models of that name; a machine that can use the file where it is does so."""
        return self.put(local, f"{next(self._numbers)}-{local.name}")

    @abstractmethod
    def get(self, name: str, local: Path) -> None:
        """Copy a file from the scratch folder to `local`, whole or not at all."""

    @abstractmethod
    def run(self, command: Sequence[str], *, timeout: float) -> str:
        """Run a program there to its end and return its stdout. A non-zero exit is a DeviceError."""

    @abstractmethod
    def start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start the machine's Python with these arguments, a script's path first: a process with three pipes."""

    def describe(self, hello: Mapping[str, Any]) -> str:
        """What a runner there says about the machine, in words. Raises DeviceError if it is the wrong one."""
        return f"{self.name} ({hello['system']} {hello['machine']})"

    # What the harness asks

    def start_runner(self) -> Worker:
        with tempfile.TemporaryDirectory() as folder:
            packed = pack_runner(Path(folder))
            script = self.put(packed, packed.name)
        return Worker(self.start([script]), where=self.name)

    def probe(self, setting: Setting, *, pin: bool = True) -> RunnerProbe:
        if setting.runtime in PHONE_RUNTIMES:
            raise RuntimeUnavailable(
                f"{setting.runtime} is for phones behind adb; a delegate here: litert:delegate=PATH"
            )
        return RunnerProbe(setting, self, pin=pin)

    def open(self, artifact: Artifact) -> Session:
        self._checked.close()
        worker = self._checked.enter_context(self.start_runner())
        place = self.describe(worker.ask("hello", timeout=START_TIMEOUT))
        model = self.put(artifact.model_path, artifact.model_path.name)
        runtime = artifact.manifest.target.row.runtimes[0]
        opened = worker.ask("open", model=model, runtime=runtime, threads=1, timeout=OPEN_TIMEOUT)
        labels = tuple(opened["labels"]) if opened["labels"] else None
        return Session(f"{opened['runtime']} on {place}", worker.run, labels, self.note)

    def cores(self) -> int:
        with self.start_runner() as worker:
            return worker.ask("hello", timeout=START_TIMEOUT)["cores"]

    def time_product(self, model: Path, shape: Sequence[int], *, runtime: str, threads: int) -> tuple[float, float]:
        with self.start_runner() as worker:
            worker.ask("hello", timeout=START_TIMEOUT)
            place = self.put_model(model)
            worker.ask("open", model=place, runtime=runtime, threads=threads, pin=True)
            worker.ask("feed", shape=shape, dtype="float32")
            best_ms = min(worker.ask("sample", count=PRODUCT_RUNS)["ms"])
            return best_ms, worker.ask("bandwidth", threads=threads)["gbs"]
