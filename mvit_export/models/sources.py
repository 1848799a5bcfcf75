"""Models that are not ours: a function in a user's Python file, or a name of timm's."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mvit_export.errors import MissingDependencyError, ModelError, MvitExportError, UsageError, first_line
from mvit_export.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import nn


def absolute_source(source: str) -> str:
    if source.startswith("timm:"):
        return source
    file, _, factory = source.rpartition(":")
    return f"{Path(file).absolute()}:{factory}"


def build_timm(source: str) -> nn.Module:
    """An untrained model of timm's by name."""
    timm, name = import_timm(), source.removeprefix("timm:")
    if not timm.is_model(name.split(".")[0]):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise ModelError(
            f"timm has no model {name!r}" + (f"; it has {near}, …" if near else "; see timm.list_models()")
        )
    return call_guarded(lambda: timm.create_model(name, pretrained=False), f"timm's {name}")


def timm_weights(source: str) -> str:
    """Where timm's own weights of that model lie, as `hf:ID`. They are fetched and checked as any others are."""
    name = source.removeprefix("timm:")
    cfg = import_timm().get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        raise ModelError(f"timm lists no weights on the hub for {name!r}; leave --pretrained out, or pass --weights")
    return f"hf:{cfg.hf_hub_id}"


def import_timm() -> ModuleType:
    """timm, also beside a torchvision whose compiled operators were built for another torch (see below)."""
    define_torchvision_operators()
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise MissingDependencyError(
            f"timm does not import ({error}), needed for --model timm:NAME: pip install timm"
        ) from error


def define_torchvision_operators() -> None:
    """Let timm and transformers import a torchvision whose compiled operators do not fit this torch.

    PyPI's torchvision is built for CUDA; beside a CPU build of torch its import ends with "operator torchvision::nms
    does not exist". Both packages only use its image transforms. The two operators are declared without an
    implementation, and only where torchvision cannot be imported otherwise.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEEP.append(library)  # the operators live as long as it does


_KEEP: list[object] = []


def timm_preprocessing(module: Any) -> Preprocessing:
    cfg = module.pretrained_cfg
    return Preprocessing(
        "RGB",
        crop=tuple(cfg["input_size"][-2:]),
        resize_ratio=None if cfg.get("crop_mode") == "squash" else 1 / cfg.get("crop_pct", 0.875),
        interpolation=cfg.get("interpolation", "bicubic"),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        source="timm pretrained_cfg",
    )


def build_from_file(source: str, pretrained: bool) -> nn.Module:
    """Import FILE.py as a script would be, with its folder on the path, and call FACTORY without arguments."""
    from torch import nn

    if pretrained:
        raise UsageError("--pretrained belongs to --variant and timm:NAME; let the factory load weights, or --weights")
    file, separator, name = source.rpartition(":")
    path = Path(file)
    if not separator or path.suffix != ".py":
        raise UsageError(f"--model is {source!r}, expected FILE.py:FACTORY or timm:NAME")
    if not path.is_file():
        raise ModelError(f"{path} does not exist, expected a Python file with a function {name}()")
    factory = _import_file(path).get(name)
    if not callable(factory):
        raise ModelError(f"{path} defines no function {name!r}, expected one that returns a torch.nn.Module")
    module = call_guarded(factory, f"{path}:{name}()")
    if not isinstance(module, nn.Module):
        raise ModelError(f"{path}:{name}() returned {type(module).__name__}, expected a torch.nn.Module")
    return module


def _import_file(path: Path) -> Mapping[str, Any]:
    name = f"_mvit_export_model_{zlib.crc32(str(path.absolute()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look classes up there
    sys.path.insert(0, str(path.parent.absolute()))
    try:
        call_guarded(lambda: spec.loader.exec_module(module), f"{path}")  # type: ignore[union-attr]
    finally:
        sys.path.remove(str(path.parent.absolute()))
    return vars(module)


def call_guarded(call: Callable[[], Any], what: str) -> Any:
    """Run a user's code; anything it raises becomes a one-line ModelError (the traceback is shown with -v).

    That includes SystemExit: a script's own exit code must not pass for ours.
    """
    try:
        return call()
    except MvitExportError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{what} raised {type(error).__name__}: {first_line(error)}") from error
