"""An Android phone behind adb: models are timed and checked by TFLite's own tool, which the user brings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from mvit_export.artifact import Artifact
from mvit_export.benchmarks.devices.adb import Adb
from mvit_export.benchmarks.devices.base import Device, Probe
from mvit_export.benchmarks.devices.benchmark_model import (
    BenchmarkOptions,
    BenchmarkTool,
    Round,
    check_tool,
    open_session,
)
from mvit_export.benchmarks.devices.commands import client_finding
from mvit_export.benchmarks.harness.configurations import Setting
from mvit_export.doctor import Finding
from mvit_export.errors import RuntimeUnavailable
from mvit_export.readers.session import Session


class AndroidPhone(Device):
    """It has no Python and so no runner: no profile, no peak, no count of a process's cores."""

    def __init__(self, serial: str | None, *, binary: Path | None) -> None:
        self.adb, self.binary = Adb(serial), binary

    @property
    def name(self) -> str:
        return self.adb.name

    def __enter__(self) -> AndroidPhone:
        with ExitStack() as leave_again:
            leave_again.enter_context(self.adb)
            check_tool(self.binary, self.adb)  # now, before an earlier verdict is put aside
            leave_again.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.adb.__exit__(kind, error, trace)

    @cached_property
    def tool(self) -> BenchmarkTool:
        """One for all models, which it keeps apart on the phone."""
        return BenchmarkTool(self.adb, check_tool(self.binary, self.adb))

    def probe(self, setting: Setting, *, pin: bool = True) -> PhoneProbe:
        return PhoneProbe(setting, self.tool)

    def open(self, artifact: Artifact) -> Session:
        return open_session(artifact, self.tool)


def open_phone(serial: str, binary: Path | None = None) -> AndroidPhone:
    """`serial` is what follows `adb:`, empty for the only phone."""
    return AndroidPhone(serial or None, binary=binary)


def finding() -> Finding:
    """Its row in `doctor`."""
    return client_finding("adb", ["adb", "version"], "install Android's platform tools, e.g. apt-get install adb")


class PhoneProbe(Probe):
    """Each round is one start of the tool and yields one figure, its median or mean: single runs are not known."""

    round_ms = 1000.0  # the tool restarts for each round, so make it worthwhile
    single_runs = False

    def __init__(self, setting: Setting, tool: BenchmarkTool) -> None:
        self.setting, self.phone = setting, tool.phone
        self.options = tool_options(setting)
        self.model = tool.load(setting.artifact)
        first = self.model.measure(self.options, runs=1)
        self.runtime = f"{tool.describe(self.options)}, delegate: {first.delegate}"
        self.load_ms, self.first_ms = first.load_ms, first.first_ms
        self.rounds: list[Round] = []

    def sample(self, count: int) -> Sequence[float]:
        self.rounds.append(self.model.measure(self.options, runs=count))
        return [self.rounds[-1].ms]

    def finish(self) -> dict[str, float | None]:
        memory = [r.memory_mb for r in self.rounds if r.memory_mb is not None]
        return {"peak_rss_mb": max(memory, default=None), "load_warm_ms": min(r.load_ms for r in self.rounds)}

    def profile(self, runs: int) -> list[dict[str, Any]]:
        raise RuntimeUnavailable("profiles of phones are not read; run benchmark_model --enable_op_profiling there")

    @property
    def environment(self) -> dict[str, Any]:
        phone = self.phone
        return {
            "system": f"Android {phone.android}", "machine": phone.abi, "cpu": phone.model, "cores": phone.cores,
            "python": None, "load_average": None, "affinity": None, "tools": {},
        }  # fmt: skip


def tool_options(setting: Setting) -> BenchmarkOptions:
    """Raises RuntimeUnavailable for a runtime that no phone behind adb has."""
    name, _, option = setting.runtime.partition(":")
    if name == "pytorch":
        raise RuntimeUnavailable("PyTorch does not run on a phone behind adb")
    if option.startswith("delegate"):
        raise RuntimeUnavailable("a phone behind adb takes no delegate library; use litert:gpu or litert:nnapi")
    return BenchmarkOptions(
        threads=setting.threads, gpu=option == "gpu", nnapi=option == "nnapi", xnnpack=option != "builtin",
        fp16=option == "fp16",
    )  # fmt: skip
