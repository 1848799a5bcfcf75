"""Core ML, which exists only on macOS and chooses its own threads. The option is one of its compute units."""

from __future__ import annotations

import platform
from typing import Any

from .common import Adapter, Opened, Refusal, import_runtime, np, read_labels

COMPUTE_UNITS = {
    "all": "ALL", "cpuOnly": "CPU_ONLY", "cpuAndGPU": "CPU_AND_GPU", "cpuAndNeuralEngine": "CPU_AND_NE",
}  # fmt: skip


class CoreMl(Adapter):
    name = "Core ML"

    def __init__(self, option: str, threads: int) -> None:
        super().__init__(option, threads)
        if platform.system() != "Darwin":
            raise Refusal(
                "unavailable",
                f"Core ML runs on macOS only, this is {platform.system()}; "
                "the reference executor proves files, its time is not a latency",
            )
        self.ct = import_runtime("coremltools")
        self.version = "macOS " + platform.mac_ver()[0]
        self.units = getattr(self.ct.ComputeUnit, COMPUTE_UNITS[option or "all"])

    def open(self, path: str) -> Opened:
        model = self.ct.models.MLModel(path, compute_units=self.units)
        description = model.get_spec().description
        (name,) = [i.name for i in description.input]
        labels = read_labels(description.metadata.userDefined.get("labels"))

        def call(array: Any) -> dict[str, Any]:
            return model.predict({name: as_picture(array)})

        return Opened(call, self.option or "all", labels)

    def placement(self, path: str) -> dict[str, int]:
        """Which device is planned for each operation, by MLComputePlan."""
        compiled = self.ct.models.MLModel(path, compute_units=self.units).get_compiled_model_path()
        plan = self.ct.models.compute_plan.MLComputePlan.load_from_path(path=compiled, compute_units=self.units)
        counts: dict[str, int] = {}
        for operation in plan.model_structure.program.functions["main"].block.operations:
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            if usage is not None:  # constants have no device
                device = type(usage.preferred_compute_device).__name__
                counts[device] = counts.get(device, 0) + 1
        return counts


def as_picture(array: Any) -> Any:
    """uint8 (1, H, W, 3) as the PIL image that Core ML's image inputs need; other arrays as they are."""
    if array.dtype != np.uint8:
        return array
    from PIL import Image

    return Image.fromarray(array[0])
