"""One open model that can be timed, on any device that has Python: a runner process and what it said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mvit_export.artifact import Artifact
from mvit_export.benchmarks.devices import Device
from mvit_export.benchmarks.settings import Setting
from mvit_export.benchmarks.worker import RUNNER, START_TIMEOUT, RunError, Worker
from mvit_export.errors import ArtifactError, printable

LOAD_TIMEOUT = 600.0  # seconds; Core ML compiles for the Neural Engine, a phone's GPU its shaders
SAMPLE_TIMEOUT = 600.0
PROFILER = RUNNER.with_name("profiling.py")


class Probe:
    """A model loaded cold in a fresh process and run once. Use as a context manager.

    Raises RuntimeUnavailable, ArtifactError or DeviceError where that cannot be.
    """

    round_ms: float | None = None  # as the plan says
    single_runs = True  # each sample is one inference
    restless = False  # whether its threads kept a core busy while the others were sampled

    def __init__(self, setting: Setting, device: Device, *, pin: bool = True) -> None:
        self.setting, self.device = setting, device
        self.worker = start_runner(device)
        try:
            self.machine = self.worker.ask("hello", timeout=START_TIMEOUT)
            device.describe(self.machine)  # refuses the wrong machine
            self.model = model_on(device, setting.artifact, setting.runtime)
            opened = self.ask(
                "open",
                model=self.model,
                runtime=setting.runtime,
                threads=setting.threads,
                pin=pin,
                timeout=LOAD_TIMEOUT,
            )
            self.runtime, self.load_ms, self.affinity = opened["runtime"], opened["load_ms"], opened["cpus"]
            shape, dtype = setting.feed
            self.first_ms = self.ask("feed", shape=shape, dtype=dtype, timeout=SAMPLE_TIMEOUT)["first_ms"]
        except BaseException:
            self.worker.close()
            raise

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """As the worker's; a runtime that fails while it runs the model is an ArtifactError, for there is no figure."""
        try:
            return self.worker.ask(do, **request)
        except RunError as error:
            path, runtime = self.setting.artifact.model_path, self.setting.runtime
            raise ArtifactError(f"{path} fails in {runtime} at {do!r}: {printable(str(error), 300)}") from error

    def sample(self, count: int) -> Sequence[float]:
        answer = self.ask("sample", count=count, timeout=SAMPLE_TIMEOUT)
        self.restless = self.restless or answer.get("restless", False)
        return answer["ms"]

    def finish(self) -> dict[str, float]:
        """Peak memory in MB and the time of a second load in ms; nothing is sampled after it."""
        return self.ask("finish", timeout=LOAD_TIMEOUT)

    def placement(self) -> dict[str, int] | None:
        """Core ML's plan: operations by device. None for the other runtimes, which have no such thing."""
        if not self.setting.runtime.startswith("coreml"):
            return None
        return self.ask("placement", model=self.model, runtime=self.setting.runtime, timeout=LOAD_TIMEOUT)

    def profile(self, runs: int) -> list[dict[str, Any]]:
        """Time by op type. Raises RuntimeUnavailable where the runtime has no profiler."""
        self.device.put(PROFILER, PROFILER.name)
        return self.ask(
            "profile", model=self.model, runtime=self.setting.runtime,
            input=self.setting.artifact.manifest.inputs[0].name, threads=self.setting.threads, runs=runs,
            timeout=SAMPLE_TIMEOUT,
        )["ops"]  # fmt: skip

    @property
    def environment(self) -> dict[str, Any]:
        """The machine that ran, for the report."""
        machine = {key: value for key, value in self.machine.items() if key != "runtimes"}
        return machine | {"tools": self.machine["runtimes"], "affinity": self.affinity}

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()


def start_runner(device: Device) -> Worker:
    """The runner is copied to the device's scratch folder, and run from there."""
    script = device.put(RUNNER, RUNNER.name)
    return Worker(device.start([script]), where=device.name)


def model_on(device: Device, artifact: Artifact, runtime: str) -> str:
    """Where the model lies on the device; here it is used in place."""
    if device.name == "local":
        return str(artifact.model_path.resolve())
    return device.put(artifact.model_path, f"{artifact.path.name}-{artifact.model_path.name}")
