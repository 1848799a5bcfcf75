"""The same network as others publish it, with our weights: our names are mapped back to theirs.

timm's and transformers' MobileViT are independent implementations; only what an export of them needs is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvit_export.errors import WeightsError, require
from mvit_export.families.mobilevit.names import key_table
from mvit_export.families.mobilevit.network import VARIANTS, MobileViT, MobileViTConfig
from mvit_export.families.timm import define_torchvision_operators, import_timm

LIBRARIES = {"timm": "timm", "hf": "transformers"}  # by family, as the weights' names are called
TOLERANCE = 1e-5  # of the largest logit: fp32 rounding in another order of operations


def state_of(state: Mapping[str, Tensor], family: str, config: MobileViTConfig) -> dict[str, Tensor]:
    """Our `state` in the names of `family`, the inverse of `map_state`: a fused qkv is split if theirs is in parts."""
    renamed: dict[str, Tensor] = {}
    for key, parts in key_table(family, config).items():
        tensors = state[key].chunk(len(parts)) if len(parts) > 1 else (state[key],)
        renamed |= {name: tensor.contiguous() for name, tensor in zip(parts, tensors, strict=True)}
    return renamed


def build_network(family: str, variant: str, weights: Path) -> nn.Module:
    """The family's own network in eval mode, with the safetensors file `weights` loaded strictly.

    Raises MissingDependencyError if its library cannot be imported.
    """
    from safetensors.torch import load_file

    network = BUILDERS[family](variant)
    network.load_state_dict(load_file(weights), strict=True)
    return (Logits(network) if family == "hf" else network).eval()


def build_timm(variant: str) -> nn.Module:
    return import_timm().create_model(f"mobilevit_{variant}", num_classes=VARIANTS[variant].num_classes)


def build_hf(variant: str) -> nn.Module:
    define_torchvision_operators()  # transformers imports torchvision as timm does
    transformers = require("transformers", extra="dev", purpose="to compare with its export")
    config = transformers.MobileViTConfig(**hf_sizes(VARIANTS[variant]))
    return transformers.MobileViTForImageClassification(config)


def hf_sizes(config: MobileViTConfig) -> dict[str, Any]:
    return {
        "hidden_sizes": list(config.widths), "neck_hidden_sizes": [config.stem, *config.stages, config.head],
        "expand_ratio": float(config.expansion), "num_labels": config.num_classes,
    }  # fmt: skip


BUILDERS = {"timm": build_timm, "hf": build_hf}


class Logits(nn.Module):
    """transformers' network with a plain tensor as its output, in place of an object of transformers' own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image).logits


@torch.inference_mode()
def check_same_logits(ours: MobileViT, theirs: nn.Module, size: int) -> None:
    """Before anything is exported, in PyTorch. Raises WeightsError if the two are not the same function."""
    image = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected, found = ours(image), theirs(image)
    scale = expected.abs().max()
    error = float((found - expected).abs().max() / scale)
    if (expected[0] - expected[1]).abs().max() < 1e-3 * scale:
        raise WeightsError(
            "the logits hardly depend on the input, so their agreement proves nothing; use other weights"
        )
    if not error <= TOLERANCE:
        raise WeightsError(f"the peer's logits are off by {error:.1e} of the scale, at most {TOLERANCE:g} expected")
