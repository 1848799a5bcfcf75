"""Weights for measuring without a checkpoint: random in every tensor, with outputs that depend on the input."""

from __future__ import annotations

import torch
from torch import nn


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for every weight and BatchNorm statistic, so that each of them matters; then eval mode.

    A default initialisation has zero biases and identity norms: a dropped bias or a swapped mean would not show.
    The scales keep activations of order 1 through the whole network.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, mean: float, std: float) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif name.endswith(("running_mean", "bias")):
                normal(tensor, 0.0, 0.3)
            elif tensor.ndim == 1:  # the scale of a norm
                normal(tensor, 1.0, 0.2)
            else:
                fan_in = tensor[0].numel()
                normal(tensor, 0.0, (1.5 / fan_in) ** 0.5)
    return module.eval()
