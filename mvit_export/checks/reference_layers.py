"""What the PyTorch reference computes on the way: every module's output in one run, and what depends on what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Call:
    """One tensor that the reference made: a module's output, or a value that passed through an Identity."""

    module: str
    leaf: bool
    output: np.ndarray
    node: Any  # autograd's, which knows what the tensor depends on


@dataclass
class Recorder:
    """Hooks that record every module's output, in the order in which they are made."""

    calls: list[Call] = field(default_factory=list)
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    active: list[tuple[str, Any]] = field(default_factory=list)  # attribute and the input's autograd node

    def attach(self, path: str, module: nn.Module) -> None:
        attribute, leaf = path.rpartition(".")[2], not any(module.children())

        def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.active.append((attribute, next((tensor.grad_fn for tensor in tensors_in(args)), None)))

        def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.chains.setdefault(path, tuple(entry[0] for entry in self.active[1:]))
            given = self.active.pop()[1]
            for tensor in tensors_in(output):
                if tensor.grad_fn is not given or not path:
                    self.note(path, leaf, tensor)
                elif all(call.node is not given for call in self.calls):
                    self.note(path.rpartition(".")[0], False, tensor)  # an Identity shows a value of its parent

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def note(self, path: str, leaf: bool, tensor: Tensor) -> None:
        # A copy: an activation may change it in place later.
        self.calls.append(Call(path, leaf, tensor.detach().float().numpy().copy(), tensor.grad_fn))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating tensors in whatever a module receives or returns."""
    from torch import Tensor

    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def record(module: nn.Module, array: np.ndarray) -> Recorder:
    """Run the reference on one input. Autograd is on, since it knows which values a value depends on."""
    import torch

    recorder = Recorder()
    for path, part in module.named_modules():
        recorder.attach(path, part)
    with torch.enable_grad():
        module(torch.from_numpy(array).requires_grad_() + 0)  # the sum, since a network may change its input in place
    return recorder


def ancestors(nodes: Iterable[Any]) -> set[Any]:
    """The autograd nodes that these depend on, including themselves."""
    seen: set[Any] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [source for source, _ in node.next_functions]
    return seen
