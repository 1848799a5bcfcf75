"""Runs a saved ML Program on any machine: a reference for what the file means, not for Apple's kernels.

    from mvit_export.mil import load
    program = load("x.mlpackage")
    outputs = program(image=array)  # {"logits": array}

Arithmetic: fp32 as written. A value that the program declares fp16 is rounded to fp16 after the op that makes it;
inside an op, sums run in fp32, as in matrix units that accumulate wider than they store. `accumulate="fp16"` is the
pessimistic case of `ops/half.py`. Subnormal fp16 numbers are kept; hardware may flush them to zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mvit_export.errors import ArtifactError, UsageError, printable
from mvit_export.mil.features import Feature, read_feature
from mvit_export.mil.graph import Builder, Graph
from mvit_export.mil.modules import MODULES_KEY
from mvit_export.mil.ops.control import State
from mvit_export.mil.package import Package, read_package
from mvit_export.mil.report import TensorStats, Trace, tensor_stats
from mvit_export.mil.steps import Op, evaluate, store
from mvit_export.mil.values import HELD, to_numpy

ProgramState = dict[str, State]


class Program:
    """One function of a package, ready to run; made by `load`. Not for several threads at once if it has state."""

    def __init__(self, function: str, graph: Graph, inputs: dict[str, Feature], metadata: dict[str, str]) -> None:
        self.function = function
        self.inputs = inputs
        self.metadata = metadata
        self._graph = graph

    @property
    def ops(self) -> tuple[Op, ...]:
        """All ops that run, in order; constants and compressed weights are gone."""
        return tuple(step.op for step in self._graph.steps)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self._graph.outputs)

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """`run` with the inputs as keywords."""
        return self.run(inputs)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Any], state: ProgramState | None = None) -> dict[str, Any]:
        """Outputs by name: arrays of the declared types; for a classifier, also a label and {label: probability}.

        `inputs` are arrays of the declared shapes and types, or images (see `Feature.tensor`). An output declared as
        image is returned as the program's tensor, (1, C, H, W), not clipped to pixels. A program with state needs
        `state=program.make_state()`, which the call changes. UsageError for inputs that do not fit.
        """
        slots = self._start(inputs, state)
        for step in self._graph.steps:
            store(step, evaluate(step, slots), slots)
            for slot in step.dies:
                slots[slot] = None
        return self._collect(slots)

    def make_state(self) -> ProgramState:
        """Fresh state for `run`, all zeros."""
        return {
            name: State(torch.zeros([n or 1 for n in shape], dtype=HELD[dtype][1]))
            for name, (_, dtype, shape) in self._graph.states.items()
        }

    @torch.inference_mode()
    def intermediates(self, **inputs: Any) -> Iterator[tuple[Op, str, Tensor]]:
        """Every tensor as it is made: (op, output name, tensor). fp16 tensors come as float32 with fp16 numbers."""
        slots = self._start(inputs, None)
        for step in self._graph.steps:
            store(step, evaluate(step, slots), slots)
            for name, slot in zip(step.op.outputs, step.writes, strict=True):
                if isinstance(slots[slot], Tensor):
                    yield step.op, name, slots[slot]
            for slot in step.dies:
                slots[slot] = None

    @torch.inference_mode()
    def trace(self, **inputs: Any) -> Trace:
        """Statistics of every floating tensor, taken before it is rounded to fp16, and the outputs."""
        slots = self._start(inputs, None)
        stats: list[TensorStats] = []
        for step in self._graph.steps:
            made = evaluate(step, slots)
            fresh = not any(isinstance(slots[i], Tensor) and bool(slots[i].isinf().any()) for i in step.reads)
            for name, dtype, value in zip(step.op.outputs, step.op.dtypes, made, strict=True):
                if isinstance(value, Tensor) and value.is_floating_point():
                    stats.append(tensor_stats(step.op, name, dtype, value, inputs_finite=fresh))
            store(step, made, slots)
            for slot in step.dies:
                slots[slot] = None
        return Trace(tuple(stats), self._collect(slots))

    def _start(self, inputs: Mapping[str, Any], state: ProgramState | None) -> list[Any]:
        """Slots with constants, inputs and state in place."""
        strange, missing = sorted(set(inputs) - set(self.inputs)), []
        slots = list(self._graph.template)
        for name, feature in self.inputs.items():
            if name in inputs:
                slots[self._graph.inputs[name][0]] = feature.tensor(inputs[name])
            elif feature.default is not None and feature.shapes:
                slots[self._graph.inputs[name][0]] = torch.full(
                    feature.shapes[0], feature.default, dtype=HELD[feature.dtype][1]
                )
            else:
                missing.append(name)
        if strange or missing:
            what = f"no input {strange[0]!r}" if strange else f"input {missing[0]!r} is missing"
            raise UsageError(f"{what}; the program takes: {', '.join(map(printable, self.inputs))}")
        states = self._graph.states
        if set(state or {}) != set(states):
            named = ", ".join(map(printable, states)) or "none"
            raise UsageError(f"the program has state ({named}): call run(inputs, state=program.make_state())")
        for name, value in (state or {}).items():
            slots[states[name][0]] = value
        return slots

    def _collect(self, slots: list[Any]) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        for name, (slot, dtype) in self._graph.outputs.items():
            value = slots[slot]
            outputs[name] = to_numpy(value, dtype) if isinstance(value, Tensor) else value
        return outputs


def load(path: str | Path, function: str | None = None, *, accumulate: Literal["fp32", "fp16"] = "fp32") -> Program:
    """Read a `.mlpackage` and prepare one of its functions; `function` None means the default one.

    ArtifactError if the package is damaged, of another kind or of a newer version; UnsupportedOpError, one line that
    lists everything, if the program uses what is not implemented.
    """
    if accumulate not in ("fp32", "fp16"):
        raise UsageError(f"accumulate is {accumulate!r}, expected 'fp32' or 'fp16'")
    package = read_package(path)
    name, spec = package.function(function)
    graph = Builder(package, name, spec, accumulate, module_table(package)).build()
    return Program(name, graph, read_inputs(package, name, graph), package.metadata)


def read_inputs(package: Package, function: str, graph: Graph) -> dict[str, Feature]:
    """The declared inputs, which must match the program's."""
    description = package.spec.description
    of_function = [d for d in description.functions if d.name == function]
    declared = of_function[0].input if of_function else description.input
    names = [feature.name for feature in declared]
    if sorted(names) != sorted(graph.inputs):
        raise ArtifactError(
            f"{package.path} is damaged: it declares inputs {names}, the program has {list(graph.inputs)}"
        )
    return {feature.name: read_feature(feature, *graph.inputs[feature.name][1:]) for feature in declared}


def module_table(package: Package) -> dict[str, str]:
    """Output name -> PyTorch module, if the exporter stored it (see `modules.py`)."""
    try:
        table = json.loads(package.metadata.get(MODULES_KEY, "{}"))
    except ValueError as error:
        raise ArtifactError(f"{package.path}: metadata {MODULES_KEY} is not JSON; export it again") from error
    return {name: printable(str(module)) for name, module in table.items()} if isinstance(table, dict) else {}
