"""One open model that can be timed, on a machine that has Python: a runner process and what it said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mvit_export.benchmarks.devices.base import FileRefused, Probe
from mvit_export.benchmarks.devices.worker import START_TIMEOUT, RunError
from mvit_export.benchmarks.harness.configurations import Setting
from mvit_export.errors import printable

if TYPE_CHECKING:
    from mvit_export.benchmarks.devices.machines import Machine

LOAD_TIMEOUT = 600.0  # seconds; Core ML compiles for the Neural Engine, a phone's GPU its shaders
SAMPLE_TIMEOUT = 600.0


class RunnerProbe(Probe):
    """Raises RuntimeUnavailable, ArtifactError or DeviceError if the model cannot be loaded."""

    def __init__(self, setting: Setting, machine: Machine, *, pin: bool = True) -> None:
        self.setting, self.restless = setting, False
        self.worker = machine.start_runner()
        try:
            self.hello = self.worker.ask("hello", timeout=START_TIMEOUT)
            machine.describe(self.hello)  # refuses the wrong machine
            opened = self.ask(
                "open",
                model=machine.put_model(setting.artifact.model_path),
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

    def ask(self, do: str, **request: Any) -> Any:
        """As the worker's, but a runtime that fails while running the model is an ArtifactError: there is no figure."""
        try:
            return self.worker.ask(do, **request)
        except RunError as error:
            path, runtime = self.setting.artifact.model_path, self.setting.runtime
            raise FileRefused(path, f"fails in {runtime} at {do!r}: {printable(str(error), 300)}") from error

    def sample(self, count: int) -> Sequence[float]:
        answer = self.ask("sample", count=count, timeout=SAMPLE_TIMEOUT)
        self.restless = self.restless or answer.get("restless", False)
        self.cpu_rounds += (tuple(answer["cpu_ms"]),)
        self.involuntary += (answer["involuntary"],) if "involuntary" in answer else ()
        return answer["ms"]

    def finish(self) -> dict[str, float | None]:
        return self.ask("finish", timeout=LOAD_TIMEOUT)

    def placement(self) -> dict[str, int] | None:
        return self.ask("placement", timeout=LOAD_TIMEOUT)

    def profile(self, runs: int) -> list[dict[str, Any]]:
        name = self.setting.artifact.manifest.inputs[0].name
        return self.ask("profile", input=name, runs=runs, timeout=SAMPLE_TIMEOUT)["ops"]

    @property
    def environment(self) -> dict[str, Any]:
        machine = {key: value for key, value in self.hello.items() if key != "runtimes"}
        return machine | {"tools": self.hello["runtimes"], "affinity": self.affinity}

    def __exit__(self, *_: object) -> None:
        self.worker.close()
