"""What a device is to the harness: something that loads a file to be timed or checked, by whatever means.

with open_device("ssh:pi") as device:  # table.py
    with device.probe(setting) as probe:
        probe.sample(10)
    session = device.open(artifact)

Machines with a Python (machines.py) copy files and start a runner; a phone (phone.py) is driven through TFLite's own
tool. A new device is one file with a Device, and one row in table.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from mvit_export.artifact import Artifact
from mvit_export.benchmarks.harness.configurations import Setting
from mvit_export.errors import ArtifactError, RuntimeUnavailable
from mvit_export.readers.session import Session

AnyDevice = TypeVar("AnyDevice", bound="Device")
AnyProbe = TypeVar("AnyProbe", bound="Probe")


class Device(ABC):
    """A context manager: leaving removes whatever was put on the device, whatever happened.

    Every method raises a one-line DeviceError if the device cannot be reached, refuses or takes too long.
    """

    name: str  # as the user wrote it: "local", "ssh:pi", "arm64", "adb:SERIAL"
    here = False  # whether this process can open files as the device does
    latency_refusal = ""  # why times measured here would mean nothing
    note = ""  # what a PASS here does not prove
    has_roofline = False  # whether `time_product` works

    @abstractmethod
    def __enter__(self: AnyDevice) -> AnyDevice: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abstractmethod
    def probe(self, setting: Setting, *, pin: bool = True) -> Probe:
        """Load a model to be timed. `pin`: keep its process on as many cores as it has threads, if possible.

        Raises RuntimeUnavailable if the device has no such runtime, ArtifactError if the runtime rejects the file.
        """

    @abstractmethod
    def open(self, artifact: Artifact) -> Session:
        """Load a model to be checked; the one opened before is closed. Raises as `probe` does."""

    def cores(self) -> int | None:
        """How many cores a process may use; None if that is not known before a model is loaded."""
        return None

    def time_product(self, model: Path, shape: Sequence[int], *, runtime: str, threads: int) -> tuple[float, float]:
        """The least time of a small model in ms, and the bandwidth of copies in GB/s: see harness/roofline.py."""
        raise RuntimeUnavailable(f"the peak of {self.name} is not measured")


class Probe(ABC):
    """A model that was loaded cold and run once. Use as a context manager."""

    setting: Setting
    runtime: str  # name and version, and what executes the model
    load_ms: float
    first_ms: float
    round_ms: float | None = None  # how long a round should be; None: as the plan says
    single_runs = True  # each sample is one inference
    cpu_rounds: tuple[tuple[float, ...], ...] = ()  # CPU times in ms of every `sample` so far, if they are known
    involuntary: tuple[int, ...] = ()  # how often another process was preferred meanwhile
    restless = False  # whether its threads kept a core busy while the others were sampled

    @abstractmethod
    def sample(self, count: int) -> Sequence[float]:
        """Times in ms of `count` inferences, or one figure for all of them if single times are not known."""

    @abstractmethod
    def finish(self) -> dict[str, float | None]:
        """Peak memory in MB and the time of a second load in ms; nothing is sampled after it."""

    @abstractmethod
    def profile(self, runs: int) -> list[dict[str, Any]]:
        """Time by op type. Raises RuntimeUnavailable if the runtime has no profiler."""

    def placement(self) -> dict[str, int] | None:
        """How many operations the runtime plans for each processor; None if it makes no such plan."""
        return None

    @property
    @abstractmethod
    def environment(self) -> dict[str, Any]:
        """The machine that ran, for the report."""

    def __enter__(self: AnyProbe) -> AnyProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None  # what a probe holds goes with its device, unless it says otherwise


class FileRefused(ArtifactError):
    """A runtime rejects a file, or fails while running it. `reason` continues the line after the file's path."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path, self.reason = Path(path), reason
