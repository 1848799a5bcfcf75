"""BatchNorm folded into the convolution before it, in float64, once for all targets.

Every converter can fold BatchNorm too, but in the precision of its input: on a model in half precision the
folded scale and shift lose bits that no pixel averages out (ONNX fp16 of the tests' tiny network, worst of nine
inputs: 49 dB folded in fp16, 59 dB folded first).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

CONVOLUTIONS = {
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv2d.padding,
    torch.ops.aten.conv3d.default,
}


@dataclass(frozen=True)
class Pair:
    """A convolution and the BatchNorm that is the only user of its output, as paths of submodules."""

    conv: str
    norm: str
    eps: float


def fold_batch_norms(module: nn.Module, example: Tensor) -> nn.Module:
    """A copy of an eval-mode `module` without the BatchNorms that directly follow a convolution.

    w' = w * s and b' = (b - mean) * s + beta with s = gamma / sqrt(var + eps), per output channel. `example` is an
    input to capture the graph with. A module that torch.export cannot capture is returned as it is: the converters
    that can still handle it (Core ML, by tracing) fold on their own.
    """
    try:
        program = torch.export.export(module, (example,))
    except Exception:  # torch.export's errors have no common type; the converter will report what it cannot handle
        return module
    folded = copy.deepcopy(module)
    for pair in find_pairs(program):
        conv, norm = folded.get_submodule(pair.conv), folded.get_submodule(pair.norm)
        if isinstance(conv, _ConvNd) and isinstance(norm, _BatchNorm):  # not functions on a module's own tensors
            fold(folded, pair)
    return folded


def find_pairs(program: ExportedProgram) -> Iterator[Pair]:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for norm in program.graph.nodes:
        if norm.target is not torch.ops.aten.batch_norm.default:
            continue
        conv, parameters, eps = norm.args[0], norm.args[1:5], norm.args[7]
        if not isinstance(conv, Node) or conv.target not in CONVOLUTIONS or len(conv.users) > 1:
            continue
        owned = [node for node in (conv.args[1], *parameters) if isinstance(node, Node)]
        paths = [names.get(node.name) for node in owned]
        if len(owned) == 5 and all(paths) and all(len(node.users) == 1 for node in owned):  # used only here
            yield Pair(str(paths[0]).rpartition(".")[0], str(paths[1]).rpartition(".")[0], float(eps))


@torch.no_grad()
def fold(module: nn.Module, pair: Pair) -> None:
    """Move the norm's arithmetic into the convolution's weights; leave a norm that changes nothing."""
    conv: Any = module.get_submodule(pair.conv)
    norm: Any = module.get_submodule(pair.norm)
    gamma, beta, mean, var = (t.double() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = gamma / (var + pair.eps).sqrt()
    bias = torch.zeros_like(mean) if conv.bias is None else conv.bias.double()
    per_channel = scale.view(-1, *[1] * (conv.weight.ndim - 1))  # (C_out, 1, 1, 1) in two dimensions
    conv.weight = nn.Parameter((conv.weight.double() * per_channel).to(conv.weight.dtype))
    conv.bias = nn.Parameter(((bias - mean) * scale + beta).to(conv.weight.dtype))
    neutralise(module, pair.norm)


def neutralise(module: nn.Module, path: str) -> None:
    """Remove the norm, or, if it is a subclass that does more (timm's includes the activation), make it neutral."""
    norm: Any = module.get_submodule(path)
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, nn.Identity())
        return
    norm.weight.fill_(1)
    norm.bias.zero_()
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)  # so that the square root of var + eps is 1
