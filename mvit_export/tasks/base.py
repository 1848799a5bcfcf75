"""What a task is made of: what a network's outputs mean. A row holds data and functions that need only numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mvit_export.artifact import Artifact, Manifest
from mvit_export.data.pictures import Labelled
from mvit_export.errors import ArtifactError
from mvit_export.formats.base import Tolerance

Shapes = Mapping[str, tuple[int, ...]]  # of the outputs, by name


@dataclass(frozen=True)
class Figure:
    """One figure of how far an output is from its reference, in addition to those that every task has.

    `combine` merges those of all inputs and outputs. `bound` is the most that a tolerance allows, None for no limit;
    beyond it a verdict says `words` and the value, formatted by `digits`.
    """

    name: str  # in parity.json
    combine: Callable[[Sequence[float]], float]
    words: str = ""
    digits: str = ".2g"
    bound: Callable[[Tolerance], float | None] = lambda _: None


@dataclass(frozen=True)
class Scoring:
    """How `eval` scores a task's outputs on labelled pictures.

    `find_outputs` maps each label of the data to the model's own index; it and `check_comparable` raise UsageError if
    data or models do not fit. `score` turns the first output (N, …), N labels of the model and, for an artifact, the
    reference's output into one row per picture, all that is kept of it. `accuracy` returns the figures that a
    reference has too, `compare` those of an artifact against its reference, as fields of `ArtifactAccuracy`; its last
    argument names the labels. `find_warnings` says what these figures do not show by themselves.
    """

    find_outputs: Callable[[Labelled, Manifest], tuple[int, ...]]
    check_comparable: Callable[[Artifact, Artifact], None]
    score: Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]
    accuracy: Callable[[np.ndarray], dict[str, Any]]
    compare: Callable[[np.ndarray, np.ndarray, Mapping[int, str]], dict[str, Any]]
    find_warnings: Callable[[np.ndarray, Mapping[str, Any], Manifest], Iterator[str]]


@dataclass(frozen=True)
class Answer:
    """What a network's outputs for one picture say: `fields` of the JSON of `predict`, and `lines` for people."""

    fields: Mapping[str, Any]
    lines: tuple[str, ...]


def present_numbers(outputs: Mapping[str, np.ndarray], manifest: Manifest) -> Answer:
    """What can be said of outputs whose meaning is not known: their shapes and ranges."""
    rows: list[dict[str, Any]] = [
        {"name": name, "shape": list(x.shape), "least": float(x.min()), "mean": float(x.mean()), "most": float(x.max())}
        for name, x in outputs.items()
    ]
    if not all(np.isfinite(x).all() for x in outputs.values()):
        raise ArtifactError(f"{manifest.model.name} answers with NaN or Inf; verify tells where it begins")
    return Answer(
        {"outputs": rows},
        tuple("{name} {shape}  {least:.4g} to {most:.4g}, mean {mean:.4g}".format(**row) for row in rows),
    )


@dataclass(frozen=True)
class Task:
    """One row of `TASKS`.

    `fits` decides by output shapes whether a model that does not name its task does this one, and `count_classes` how
    many classes it then has. `compare` returns the `figures` of one finite output (B, …) against its reference, both
    float64, those that apply. `check_outputs` receives all that a file returns for one input, more than the manifest's
    outputs, and raises ValueError if something is wrong. Without `scoring`, `eval` refuses the task. `present` says
    what `predict` shows of one picture's outputs, each without its batch axis, float64; it may raise ArtifactError.
    """

    name: str  # as in the manifest
    output_names: tuple[str, ...]  # of tensors that a module returns without names
    fits: Callable[[Shapes], bool]
    count_classes: Callable[[Shapes], int | None] = lambda _: None
    figures: tuple[Figure, ...] = ()
    compare: Callable[[np.ndarray, np.ndarray], dict[str, float]] = lambda reference, output: {}
    check_outputs: Callable[[Mapping[str, Any], Manifest], None] = lambda outputs, manifest: None
    scoring: Scoring | None = None
    present: Callable[[Mapping[str, np.ndarray], Manifest], Answer] = present_numbers
