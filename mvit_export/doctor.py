"""Which targets and runtimes work on this machine: tried, not guessed from what is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mvit_export.errors import RuntimeUnavailable
from mvit_export.formats.table import FORMATS
from mvit_export.readers.tflite import litert_runtime


@dataclass(frozen=True)
class Finding:
    kind: str  # target, runtime, weights or device
    name: str
    works: bool
    detail: str  # versions, or what is wrong and what to do

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Import every converter and runtime."""
    targets = [_try("target", fmt.name, fmt.packages, extra=fmt.name) for fmt in FORMATS.values()]
    runtimes = [
        _try("runtime", "pytorch", {"torch": "torch"}, extra="all"),
        _try("runtime", "onnxruntime", {"onnxruntime": "onnxruntime"}, extra="onnx"),
        _litert(),
        _coreml(),
    ]
    hub = _try("weights", "hub", {"huggingface_hub": "huggingface_hub"}, extra="hub")
    return [*targets, *runtimes, hub]


def _try(kind: str, name: str, modules: Mapping[str, str], *, extra: str) -> Finding:
    versions = []
    for distribution, module in modules.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken build can raise anything; it is reported, not hidden
            reason = f"{distribution} does not import ({' '.join(str(error).split())})"
            return Finding(kind, name, False, f"{reason}: pip install 'mvit-export[{extra}]'")
        versions.append(f"{distribution} {importlib.metadata.version(distribution)}")
    return Finding(kind, name, True, ", ".join(versions))


def _litert() -> Finding:
    try:
        distribution, version, _ = litert_runtime()
    except RuntimeUnavailable as error:
        return Finding("runtime", "litert", False, str(error))
    return Finding("runtime", "litert", True, f"{distribution} {version}")


def _coreml() -> Finding:
    if platform.system() != "Darwin":
        return Finding("runtime", "coreml", False, f"Core ML predicts on macOS only, this is {platform.system()}")
    return _try("runtime", "coreml", {"coremltools": "coremltools"}, extra="coreml")
