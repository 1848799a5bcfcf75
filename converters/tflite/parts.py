"""What recipes refer to: the kind of work of each op in a .tflite file, and the PyTorch module it came from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mvit_export.checks.reference_layers import record
from mvit_export.readers.session import Chains
from mvit_export.readers.tflite import WRAPPER, tflite_modules
from mvit_export.readers.tflite_graph import Graph, Op

# Ops of other types keep their arithmetic: recipes do not cover pooling, and EXP and the like have no int8.
KINDS_OF_TYPES = {
    "DEPTHWISE_CONV_2D": "depthwise",
    "TRANSPOSE_CONV": "conv",
    "SOFTMAX": "softmax",
    "SQUARED_DIFFERENCE": "norm",
    "RSQRT": "norm",
    **dict.fromkeys(("LOGISTIC", "TANH", "RELU", "GELU", "HARD_SWISH"), "activation"),
    **dict.fromkeys(("ADD", "SUB", "MUL", "DIV", "MAXIMUM", "CONCATENATION"), "elementwise"),
}
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
# These change no values, so they use the arithmetic of their neighbours.
MOVES = ("RESHAPE", "TRANSPOSE", "PAD", "SLICE", "STRIDED_SLICE", "SPLIT", "PACK", "UNPACK", "MAX_POOL_2D")
SOFTMAX_PARTS = ("SOFTMAX", "EXP", "REDUCE_MAX")  # the last two if a converter wrote it out


class Classifier:
    """Classifies the ops of one graph; `module` is the network in it."""

    def __init__(self, graph: Graph, module: nn.Module, example: torch.Tensor) -> None:
        self.graph, self.module = graph, module
        # A copy, because hooks stay.
        self.chains: Chains = record(copy.deepcopy(module), example.numpy()).chains
        self.norms = {path for path, part in module.named_modules() if isinstance(part, NORMS)}
        self.leaves = {path for path, part in module.named_modules() if path and not any(part.children())}
        self.weights = {path.rpartition(".")[0]: values for path, values in matrices(module)}

    def kind(self, op: Op, module: str) -> str | None:
        """One of `recipes.KINDS`; None for what recipes do not cover, such as moves of data and pooling."""
        if op.type in MOVES or self.is_preprocessing(op):
            return None
        if product := product_kind(self.graph, op):
            return product
        kind = "norm" if module in self.norms else KINDS_OF_TYPES.get(op.type)
        return self.elementwise_kind(op, module) if kind == "elementwise" else kind

    def elementwise_kind(self, op: Op, module: str) -> str | None:
        """Sums and products belong to what surrounds them: SiLU, a softmax, the scaling of attention, a layer."""
        before, after = list(self.sources(op)), list(self.followers(op))
        if op.type == "MUL" and any(source.type == "LOGISTIC" for source in before):
            return "activation"
        if any(other.type in SOFTMAX_PARTS for other in [*before, *after]):
            return "softmax"
        if after and all(product_kind(self.graph, other) == "attention" for other in after):
            return "attention"
        return None if module in self.leaves else "elementwise"

    def followers(self, op: Op) -> Iterator[Op]:
        """The ops that use an op's results, with moves skipped."""
        for taker in (taker for t in op.outputs for taker in self.graph.takers.get(t, ())):
            yield from self.followers(taker) if taker.type in MOVES else (taker,)

    def sources(self, op: Op) -> Iterator[Op]:
        """The ops whose results an op uses, with moves skipped."""
        for t in self.graph.activations(op):
            if (maker := self.graph.makers.get(t)) is not None:
                yield from self.sources(maker) if maker.type in MOVES else (maker,)

    def module_of(self, op: Op) -> str:
        """The path of the module that an op came from, "" if the file does not say.

        A name lists several places if ops were fused. The first is the op's own; for an op with weights, the first that
        has weights. The op that makes an output is named after that output: its weights identify its module.
        """
        places = tflite_modules(self.graph.name(op), self.chains)
        if self.graph.weight(op):
            places = tuple(place for place in places if place in self.weights) or (self.module_by_weight(op), *places)
        return next((place for place in places if place), "")

    def module_by_weight(self, op: Op) -> str:
        weight = self.graph.weight(op)
        if weight is None or weight.type != "FLOAT32":
            return ""
        values = np.sort(np.frombuffer(bytes(weight.data), np.float32))
        return next((path for path, other in self.weights.items() if np.array_equal(values, other)), "")

    def is_preprocessing(self, op: Op) -> bool:
        """Whether an op helps to turn a picture into the network's input."""
        parts = self.graph.name(op).partition(";")[0].split("/")
        return len(parts) > 1 and not parts[1].endswith(f"_{WRAPPER}")


def product_kind(graph: Graph, op: Op) -> str | None:
    """The kind of a product; None for any other op."""
    if op.type in ("FULLY_CONNECTED", "BATCH_MATMUL"):
        return "linear" if graph.weight(op) else "attention"
    if op.type != "CONV_2D" or (weight := graph.weight(op)) is None:
        return None
    return "conv1x1" if weight.shape[1:3] == (1, 1) else "conv"


def matrices(module: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter with more than one axis: its path, and its values in order of size, whatever their layout."""
    for path, parameter in module.named_parameters():
        if parameter.ndim > 1:
            yield path, np.sort(parameter.detach().float().numpy().ravel())


def kinds_of(graph: Graph, module: nn.Module, example: torch.Tensor) -> Mapping[int, tuple[str, str]]:
    """Kind and module path of every op that recipes cover, by the op's index."""
    classifier = Classifier(graph, module, example)
    modules = {op.index: classifier.module_of(op) for op in graph.ops}
    kinds = {op.index: classifier.kind(op, modules[op.index]) for op in graph.ops}
    return {index: (kind, modules[index]) for index, kind in kinds.items() if kind is not None}
