"""A model on an Android phone, timed by TFLite's own tool: the same interface as a probe on a device with Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvit_export.benchmarks.adb import Adb
from mvit_export.benchmarks.benchmark_model import BenchmarkOptions, BenchmarkTool, Round, check_tool
from mvit_export.benchmarks.settings import Setting
from mvit_export.errors import RuntimeUnavailable


class PhoneProbe:
    """Each round is one start of the tool and gives one figure, its median or mean: single runs are not known."""

    round_ms = 1000.0  # the tool starts anew for each: make it worth that
    single_runs = False
    restless = False  # the tool ends after each round

    def __init__(self, setting: Setting, device: Adb, *, binary: Path | None) -> None:
        if setting.runtime == "pytorch":
            raise RuntimeUnavailable("PyTorch does not run on a phone behind adb")
        self.setting, self.device = setting, device
        self.options = tool_options(setting)
        tool = BenchmarkTool(device, check_tool(binary, device))
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

    def placement(self) -> None:
        return None

    def profile(self, runs: int) -> list[dict[str, Any]]:
        raise RuntimeUnavailable("the profile of a phone is not read; run its benchmark_model --enable_op_profiling")

    @property
    def environment(self) -> dict[str, Any]:
        phone = self.device.phone
        return {
            "system": f"Android {phone.android}", "machine": phone.abi, "cpu": phone.model, "cores": phone.cores,
            "python": None, "load_average": None, "affinity": None, "tools": {},
        }  # fmt: skip

    def __enter__(self) -> PhoneProbe:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # the device's scratch folder goes with the device


def tool_options(setting: Setting) -> BenchmarkOptions:
    option = setting.runtime.partition(":")[2]
    if option.startswith("delegate"):
        raise RuntimeUnavailable("a delegate library is not taken on a phone behind adb: litert:gpu, litert:nnapi")
    return BenchmarkOptions(
        threads=setting.threads, gpu=option == "gpu", nnapi=option == "nnapi", xnnpack=option != "builtin",
        fp16=option == "fp16",
    )  # fmt: skip
