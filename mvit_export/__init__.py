"""Export MobileViT, or any PyTorch vision model, to Core ML, ONNX and TFLite, and prove each file.

    from mvit_export import load_model, export, verify

    model = load_model("xxs")
    for result in export(model, to="onnx"):
        print(result.artifact.path, result.parity.status)

Names are imported when first used, so that `import mvit_export` stays quick and a device without torch can verify.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvit_export.checks.accuracy import evaluate
    from mvit_export.checks.parity import verify
    from mvit_export.converters.export import ExportResult, export
    from mvit_export.data.preprocessing import Preprocessing
    from mvit_export.errors import MvitExportError
    from mvit_export.families.load import load_model
    from mvit_export.models.loaded import LoadedModel
    from mvit_export.models.own_files import save_weights
    from mvit_export.results.parity import ParityResult

__version__ = "0.2.0"
__all__ = [
    "ExportResult",
    "LoadedModel",
    "MvitExportError",
    "ParityResult",
    "Preprocessing",
    "evaluate",
    "export",
    "load_model",
    "save_weights",
    "verify",
]

_HOMES = {
    "ExportResult": "converters.export",
    "LoadedModel": "models.loaded",
    "MvitExportError": "errors",
    "ParityResult": "results.parity",
    "Preprocessing": "data.preprocessing",
    "evaluate": "checks.accuracy",
    "export": "converters.export",
    "load_model": "families.load",
    "save_weights": "models.own_files",
    "verify": "checks.parity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mvit_export' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"mvit_export.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
