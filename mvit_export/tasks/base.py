"""What a task is made of: what a network's outputs mean. A row holds data and functions that need only numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mvit_export.artifact import Artifact, Manifest
from mvit_export.data.pictures import Labelled
from mvit_export.formats.base import Tolerance

Shapes = Mapping[str, tuple[int, ...]]  # of the outputs, by name


@dataclass(frozen=True)
class Figure:
    """One figure of how far an output is from its reference, in addition to those that every task has.

    `combine` merges those of all inputs and outputs. `bound` is the most that a tolerance allows, or with `at_least`
    the least, None for no limit; beyond it a verdict says `words` and the value, formatted by `digits`.
    """

    name: str  # in parity.json
    combine: Callable[[Sequence[float]], float]
    words: str = ""
    digits: str = ".2g"
    bound: Callable[[Tolerance], float | None] = lambda _: None
    at_least: bool = False


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
class Task:
    """One row of `TASKS`.

    `fits` decides by output shapes whether a model that does not name its task does this one, and `count_classes` how
    many classes it then has. `compare` returns the `figures` of one finite output (B, …) against its reference, both
    float64, those that apply. `check_outputs` receives all that a file returns for one input, more than the manifest's
    outputs, and raises ValueError if something is wrong. Without `scoring`, `eval` refuses the task.

    Where a network returns whole numbers, `integers`, `scored` makes it return the scores behind them, which are the
    reference then. `answer` turns these into what a file returns, and `view` makes two arrays of numbers of reference
    and output, which are compared.
    """

    name: str  # as in the manifest
    output_names: tuple[str, ...]  # of tensors that a module returns without names
    fits: Callable[[Shapes], bool]
    count_classes: Callable[[Shapes], int | None] = lambda _: None
    figures: tuple[Figure, ...] = ()
    compare: Callable[[np.ndarray, np.ndarray], dict[str, float]] = lambda reference, output: {}
    check_outputs: Callable[[Mapping[str, Any], Manifest], None] = lambda outputs, manifest: None
    scoring: Scoring | None = None
    integers: bool = False  # int32
    scored: Callable[[Any], Any] = lambda module: module
    view: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] = lambda reference, output: (
        reference,
        output,
    )
    answer: Callable[[np.ndarray], np.ndarray] = lambda reference: reference
