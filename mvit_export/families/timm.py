"""The row of timm's models, by timm's names: `timm:NAME`."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mvit_export.data.preprocessing import Preprocessing
from mvit_export.errors import MissingDependencyError, ModelError
from mvit_export.families.base import Family, Request
from mvit_export.families.modules import describe_module, read_weights
from mvit_export.models.loaded import LoadedModel, call_guarded, seeded

if TYPE_CHECKING:
    from torch import nn

    from mvit_export.models.stored import StoredWeights

PREFIX = "timm:"


def load(asked: Request) -> LoadedModel:
    source = str(asked.model)
    module = build_timm(source, None, asked.seed)
    weights = read_weights(asked, timm_weights(source) if asked.pretrained else asked.weights)
    classes = asked.num_classes if weights is None else count_classes(module, weights, asked)
    if classes not in (None, *own_widths(module)):
        module = build_timm(source, classes, asked.seed)
    return describe_module(
        module, asked, name=source.removeprefix(PREFIX), source=source, weights=weights, trained=False,
        preprocessing=timm_preprocessing,
    )  # fmt: skip


def own_widths(module: nn.Module) -> tuple[int | None, ...]:
    """The numbers of classes that a network has as it is: one without a head counts as having its features."""
    names = ("num_classes",) if getattr(module, "num_classes", None) else ("num_features", "head_hidden_size")
    return tuple(getattr(module, name, None) for name in names)


def count_classes(module: nn.Module, weights: StoredWeights, asked: Request) -> int | None:
    """How many classes a checkpoint has, by its classifier's weights; None if they are not found.

    Raises WeightsError if others were asked for.
    """
    from mvit_export.models.checkpoints import blame
    from mvit_export.models.fit import check_classes

    names = getattr(module, "pretrained_cfg", {}).get("classifier") or ""
    name = names if isinstance(names, str) else names[0]  # a distilled network has a second head
    with blame(weights.file):
        found = weights.checkpoint.aligned(module.state_dict(), asked.ema).tensors.get(f"{name}.weight")
        if found is None or not found.ndim:
            return None
        check_classes(len(found), asked.num_classes)
    return len(found)


def build_timm(source: str, num_classes: int | None = None, seed: int = 0) -> nn.Module:
    """An untrained timm model by name, with its own number of classes if None is given."""
    timm, name = import_timm(), source.removeprefix("timm:")
    if not timm.is_model(name.split(".")[0]):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise ModelError(
            f"timm has no model {name!r}" + (f"; it has {near}, …" if near else "; see timm.list_models()")
        )
    options = {} if num_classes is None else {"num_classes": num_classes}
    with seeded(seed):
        return call_guarded(lambda: timm.create_model(name, pretrained=False, **options), f"timm's {name}")


def timm_weights(source: str) -> str:
    """Where timm's own weights of that model are, as `hf:ID`. They are fetched and checked like any others."""
    name = source.removeprefix("timm:")
    cfg = import_timm().get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        raise ModelError(f"timm lists no weights on the hub for {name!r}; leave --pretrained out, or pass --weights")
    return f"hf:{cfg.hf_hub_id}"


def import_timm() -> ModuleType:
    """timm, even beside a torchvision whose compiled operators were built for another torch (see below)."""
    define_torchvision_operators()
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise MissingDependencyError(
            f"timm does not import ({error}), needed for --model timm:NAME: pip install timm"
        ) from error


def define_torchvision_operators() -> None:
    """Let timm and transformers import a torchvision whose compiled operators do not fit this torch.

    PyPI's torchvision is built for CUDA; with a CPU build of torch its import fails with "operator torchvision::nms
    does not exist". Both packages only use its image transforms. The two operators are declared without an
    implementation, and only if torchvision cannot be imported otherwise.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEEP.append(library)  # the operators exist as long as it does


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


TIMM = Family(
    title="timm", owns=lambda source: source.startswith(PREFIX), load=load, prepare=import_timm, counts_classes=True
)
