"""What PyTorch answers to an input, and how sure that answer is.

The reference is the network in float64, where it runs in that. Its own float32 answers are measured against it, as a
file's are: where they are noise, as after an InstanceNorm of a black picture, no file in float32 can be nearer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mvit_export.checks.figures import measure, worst
from mvit_export.errors import first_line
from mvit_export.models.loaded import check_repeats
from mvit_export.readers.session import Arrays, open_torch
from mvit_export.results.parity import Metrics
from mvit_export.tasks.base import Task

if TYPE_CHECKING:
    from mvit_export.models.loaded import LoadedModel

FLOAT32, FLOAT64 = "float32", "float64"
FLOAT32_PREFIX = "float32/"  # of the names of stored float32 outputs beside the reference's


@dataclass(frozen=True)
class Pair:
    """An input of the artifact, and the reference's outputs for it.

    `float32` are PyTorch's own float32 outputs, `in_sequence()` those with sums in the orders of runtimes, see sums.py.
    Without them nothing is known about float32, which then counts as exact.
    """

    case: str
    array: np.ndarray
    outputs: Arrays
    float32: Arrays | None = None
    in_sequence: Callable[[], Sequence[Arrays]] | None = None

    def float32_error(self, name: str, task: Task, spread: float, *, widest: bool = False) -> Metrics | None:
        """How far float32 is from the reference in one output; `widest`: in sequence too, the worst of all."""
        runs = self.float32_runs(widest=widest)
        found = [measure(self.outputs[name], run[name], task, spread=spread) for run in runs]
        return worst(found, task) if found else None

    def float32_runs(self, *, widest: bool) -> list[Arrays]:
        """What float32 gives, in PyTorch's order of sums and, if `widest`, in others; empty if that is unknown."""
        known = [self.float32] if self.float32 else []
        return [*known, *self.in_sequence()] if widest and known and self.in_sequence else known


class Reference:
    """A network in float64, or in float32 if it does not run in float64: `dtype` says which, `reason` why."""

    def __init__(self, model: LoadedModel) -> None:
        self.model, self.dtype, self.reason = model, FLOAT64, ""
        self._float32 = open_torch(model).run
        self._float64: Callable[[np.ndarray], Arrays] | None = None
        self._shapes: set[tuple[int, ...]] = set()

    def answer(self, case: str, artifact_input: np.ndarray, model_input: np.ndarray) -> Pair:
        """Raises ModelError if the network gives other outputs for the same input."""
        float32 = self._float32(model_input)
        if model_input.shape not in self._shapes:  # noise in the network shows in any input
            self._shapes.add(model_input.shape)
            self._check_repeats(float32, model_input)
        outputs = self._in_float64(model_input)
        if outputs is None:
            return Pair(case, artifact_input, float32)
        return Pair(case, artifact_input, outputs, float32, lambda: self._in_sequence(float32, model_input))

    def _in_float64(self, array: np.ndarray) -> Arrays | None:
        if self.dtype != FLOAT64:
            return None
        try:
            if self._float64 is None:  # copied after a run: weights that a hook computes can be copied only then
                double = replace(self.model, module=copy.deepcopy(self.model.module).double())
                self._float64 = open_torch(double).run
            outputs = self._float64(array.astype(np.float64))
        except Exception as error:  # a user's network: it may make float32 tensors of its own, or refuse to be copied
            self.dtype, self.reason = FLOAT32, first_line(error)
            return None
        if any(output.dtype != np.float64 for output in outputs.values()):
            self.dtype, self.reason = FLOAT32, "its outputs stay float32"
            return None
        return outputs

    def _in_sequence(self, first: Arrays, array: np.ndarray) -> Sequence[Arrays]:
        """float32 with sums in sequence, once it is checked that the network itself makes no noise.

        `first`, the usual order, for a network that does not run so: the bound is then the narrower one.
        """
        from mvit_export.checks.sums import LANES, InSequence

        self._check_repeats(first, array)
        runs = []
        for lanes in LANES:
            try:
                with InSequence(lanes):
                    runs.append(self._float32(array))
            except Exception:  # a user's network, in a mode that its own operators may not know
                return [first]
        return runs

    def _check_repeats(self, first: Arrays, array: np.ndarray) -> None:
        check_repeats(first, self._float32(array), self.model.info.name)
