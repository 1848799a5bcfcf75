"""Models for the executor's tests: random weights that are not at rest, conversions, and the measure of equality."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from torch import nn

import mvit_export.mil as mil
from mvit_export.families.mobilevit.network import create_mobilevit

TARGET = ct.target.iOS17


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and statistic from where initialisation left it: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += noise * (0.1 * parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else 0.05)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


def mobilevit(variant: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(create_mobilevit(variant))


def photo(size: int = 256, batch: int = 1) -> torch.Tensor:
    """Smooth colours with noise on top, (batch, 3, size, size) within [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (0.9 * smooth + 0.1 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1)


@dataclass(frozen=True)
class Captured:
    """A network's graph, which several conversions start from, and the debug handles of its nodes."""

    source: Any
    shape: torch.Size
    handles: dict[int, str]


def capture(model: nn.Module, x: torch.Tensor, way: str = "export") -> Captured:
    """`way` is "export" or "trace"."""
    if way == "trace":
        return Captured(torch.jit.trace(model, x), x.shape, {})
    exported = torch.export.export(model, (x,)).run_decompositions({})
    return Captured(exported, x.shape, mil.number_nodes(exported))


def convert(captured: Captured, precision: str = "fp32", **options: Any) -> ct.models.MLModel:
    options = {
        "inputs": [ct.TensorType(name="image", shape=captured.shape, dtype=np.float32)],
        "outputs": [ct.TensorType(name="logits")],
        "minimum_deployment_target": TARGET,
        "compute_precision": ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32,
        "skip_model_load": True,
        **options,
    }
    return ct.convert(captured.source, **options)


def saved(mlmodel: ct.models.MLModel, folder: Path, name: str = "m") -> Path:
    mlmodel.save(str(folder / f"{name}.mlpackage"))
    return folder / f"{name}.mlpackage"


@torch.inference_mode()
def reference(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    return model(x).numpy()


def psnr(expected: np.ndarray, got: np.ndarray) -> float:
    """10 log10(max(ref^2) / mean((x - ref)^2)) in dB."""
    assert expected.shape == got.shape and np.isfinite(got).all()
    error = np.mean((got.astype(np.float64) - expected.astype(np.float64)) ** 2)
    peak = np.max(expected.astype(np.float64) ** 2)
    assert peak > 0
    return float("inf") if error == 0 else 10 * np.log10(peak / error)


def import_timm() -> Any:
    """timm beside a torchvision that does not fit the CPU build of torch: it only wants two operators to exist."""
    with contextlib.suppress(RuntimeError):  # defined already
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_timm.library = library  # type: ignore[attr-defined]  # lives as long as the operators
    import timm

    return timm
