"""Parity on a device: the artifact's file runs there, in the runtime found there, the comparison stays here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mvit_export.artifact import Artifact
from mvit_export.benchmarks.adb import Adb
from mvit_export.benchmarks.benchmark_model import adb_session, check_tool
from mvit_export.benchmarks.devices import Device, open_device
from mvit_export.benchmarks.worker import RUNNER, START_TIMEOUT, Worker
from mvit_export.runtimes import Session

RUNTIMES = {"coreml": "coreml", "onnx": "onnxruntime", "tflite": "litert"}  # format: the runner's name for its runtime
OPEN_TIMEOUT = 300.0  # seconds; Core ML compiles, emulation is slow


@contextmanager
def device_sessions(spec: str, *, python: str | None = None, binary: Path | None = None) -> Iterator[dict[str, Any]]:
    """Keywords for `parity.verify` that make it check on the device `spec`, which is held meanwhile.

    `binary` is TFLite's benchmark tool, for a phone.
    """
    with ExitStack() as stack:
        device = stack.enter_context(open_device(spec, python=python, binary=binary))
        if isinstance(device, Adb):
            tool = check_tool(binary, device)
            yield {"device": device.name, "sessions": lambda _: (lambda artifact: adb_session(artifact, device, tool),)}
        else:
            runtimes = stack.enter_context(DeviceRuntimes(device))
            yield {"device": device.name, "sessions": lambda _: (runtimes.open,)}


class DeviceRuntimes:
    """Opens artifacts on a device, each in a process of its own, which ends with the next. A context manager."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._current = ExitStack()

    def __enter__(self) -> DeviceRuntimes:
        self._runner = self.device.put(RUNNER, RUNNER.name)
        return self

    def __exit__(self, *_: object) -> None:
        self._current.close()

    def open(self, artifact: Artifact) -> Session:
        """Raises RuntimeUnavailable or ArtifactError as every opener, DeviceError where the device is at fault."""
        self._current.close()
        process = self.device.start([self._runner])
        worker = self._current.enter_context(Worker(process, where=self.device.name))
        place = self.device.describe(worker.ask("hello", timeout=START_TIMEOUT))
        model = self.device.put(artifact.model_path, artifact.model_path.name)
        runtime = RUNTIMES[artifact.manifest.format]
        opened = worker.ask("open", model=model, runtime=runtime, threads=1, timeout=OPEN_TIMEOUT)
        labels = tuple(opened["labels"]) if opened["labels"] else None
        return Session(f"{opened['runtime']} on {place}", worker.run, labels, self.device.note)
