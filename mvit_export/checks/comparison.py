"""Run an exported file on the inputs, and judge its outputs against the reference's, wherever those come from.

First shapes, types and finiteness are compared, then the numbers. Needs only numpy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mvit_export.artifact import Manifest, TensorSpec
from mvit_export.checks.figures import FLOAT32_UNIT, measure, violations, widen, worst
from mvit_export.checks.reference import Pair
from mvit_export.errors import MvitExportError, first_line
from mvit_export.formats.base import Tolerance
from mvit_export.readers.session import Arrays
from mvit_export.results.parity import Metrics
from mvit_export.tasks.base import Task
from mvit_export.tasks.table import task_of

MOST_NOISE = 1e-2  # of an output's scale; where float32 is further off than this, nothing can be compared


@dataclass(frozen=True)
class Outcome:
    """The result on one input: its faults, or the metrics of one output. `broken`: the runtime did not finish its run.

    `float32` is how far PyTorch's own float32 is from the reference, None if unknown; `widest()` the most of it.
    `scale` is the output's largest absolute reference value over all inputs.
    """

    case: str
    faults: tuple[str, ...]
    metrics: Metrics | None = None
    broken: bool = False
    float32: Metrics | None = None
    widest: Callable[[], Metrics | None] = lambda: None
    scale: float = 0.0


def run_cases(
    manifest: Manifest,
    run: Callable[[np.ndarray], Arrays],
    pairs: Sequence[Pair],
    on_case: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Run the inputs, stopping at the first that breaks the runtime."""
    outcomes: list[Outcome] = []
    task = task_of(manifest)
    ranges = {spec.name: Range.of(spec.name, pairs) for spec in manifest.outputs}
    for done, pair in enumerate(pairs, start=1):
        try:
            outputs = run(pair.array)
        except MvitExportError:
            raise
        except Exception as error:  # each runtime has its own exception types; a run that fails is a failed check
            fault = f"{pair.case}: the runtime failed: {first_line(error)}"
            return [*outcomes, Outcome(pair.case, (fault,), broken=True)]
        outcomes += measure_outputs(pair, manifest.outputs, outputs, task, ranges)
        if on_case:
            on_case(done, len(pairs))
    return outcomes


@dataclass(frozen=True)
class Range:
    """An output's reference over all inputs: its largest absolute value, and its largest change between inputs."""

    scale: float
    spread: float

    @classmethod
    def of(cls, name: str, pairs: Sequence[Pair]) -> Range:
        return cls(scale_of(name, pairs), spread_of(name, pairs))


def measure_outputs(
    pair: Pair, specs: Sequence[TensorSpec], outputs: Arrays, task: Task, ranges: Mapping[str, Range]
) -> list[Outcome]:
    """One outcome for each output, or a single one with what is wrong with them."""
    if faults := tuple(structural_faults(pair, specs, outputs, task)):
        return [Outcome(pair.case, faults)]
    found = []
    for name, known in ranges.items():
        own = functools.partial(pair.float32_error, name, task, known.spread)
        metrics = measure(pair.outputs[name], outputs[name], task, spread=known.spread)
        widest = functools.partial(own, widest=True)
        found.append(Outcome(pair.case, (), metrics, float32=own(), widest=widest, scale=known.scale))
    return found


@dataclass(frozen=True)
class Judgement:
    """What is wrong, and the worst figures. `noisy` are the outcomes judged by twice float32's own error.

    The figures leave those out if there are others.
    """

    reasons: list[str]
    metrics: Metrics | None
    noisy: tuple[tuple[Outcome, Metrics], ...] = ()  # each with float32's error

    @property
    def noisy_inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(outcome.case for outcome, _ in self.noisy))


def judge_outcomes(outcomes: Sequence[Outcome], tolerance: Tolerance, task: Task) -> Judgement:
    judged, noisy, hopeless = [], [], []
    measured = [(outcome, outcome.metrics) for outcome in outcomes if outcome.metrics]
    for outcome, metrics in measured:
        own = outcome.widest() if violations(metrics, tolerance, task) else None
        if own and own.max_abs > MOST_NOISE * outcome.scale:
            hopeless.append(f"{outcome.case}: float32 itself is {own.max_abs:.1e} from float64, too far to compare")
        elif own and not violations(metrics, widen(tolerance, own), task):
            noisy.append((outcome, own))
            continue
        judged.append(metrics)
    reasons = [fault for outcome in outcomes for fault in outcome.faults][:3]
    if judged and not reasons:
        reasons = [*violations(worst(judged, task), tolerance, task), *hopeless[:1]]
    figures = judged or [metrics for _, metrics in measured]
    return Judgement(reasons, worst(figures, task) if figures else None, tuple(noisy))


def describe_noise(judged: Judgement) -> str:
    """What a PASS rests on where float32 itself is noise."""
    if not judged.noisy:
        return ""
    most = max(own.max_abs for _, own in judged.noisy)
    inputs = ", ".join(judged.noisy_inputs)
    return f"{inputs}: float32 itself is up to {most:.1e} from float64 there, twice that is allowed"


def find_worst(outcomes: Sequence[Outcome], judged: Judgement) -> Outcome:
    """The first input with a fault, or else the one with the largest error that is not float32's own."""
    faulty = [outcome for outcome in outcomes if outcome.faults]
    noisy = [outcome for outcome, _ in judged.noisy]
    others = [outcome for outcome in outcomes if outcome not in noisy] or outcomes
    return faulty[0] if faulty else max(others, key=lambda outcome: outcome.metrics.max_rel if outcome.metrics else 0)


def constant_reference(pairs: Sequence[Pair]) -> str | None:
    """Why a comparison would prove nothing: the reference ignores its input, as an untrained zero head does, or its
    answers are float32's denormal numbers, as with initial weights that are small in every layer."""
    for name in pairs[0].outputs:
        scale, count = scale_of(name, pairs), sum(1 for _ in reference_rows(name, pairs))
        if 0 < scale < np.finfo(np.float32).tiny:
            return f"the reference's {name} are below what float32 holds with all digits, 1e-38; load weights"
        if count > 1 and spread_of(name, pairs) <= FLOAT32_UNIT * scale:
            return f"the reference gives the same {name} for all {count} inputs, which proves nothing; load weights"
    return None


def scale_of(name: str, pairs: Sequence[Pair]) -> float:
    """The largest absolute value of an output's reference; NaN if it has one."""
    return float(np.max([np.abs(row).max() for row in reference_rows(name, pairs)]))


def spread_of(name: str, pairs: Sequence[Pair]) -> float:
    """The largest difference of an output's reference between the first input and any other; 0 for one input."""
    first = next(reference_rows(name, pairs))
    with np.errstate(invalid="ignore"):  # NaN and Inf are reported by the comparison
        return float(np.max([np.abs(row - first).max() for row in reference_rows(name, pairs)]))


def reference_rows(name: str, pairs: Sequence[Pair]) -> Iterator[np.ndarray]:
    """The reference for each input that has the first one's shape: maps of other sizes cannot be compared.

    One after the other: maps of a picture's size would take a gigabyte together.
    """
    shape = pairs[0].outputs[name][0].shape
    return (row for pair in pairs for row in pair.outputs[name] if row.shape == shape)


def structural_faults(pair: Pair, specs: Sequence[TensorSpec], outputs: Arrays, task: Task) -> Iterator[str]:
    """Faults in names, shapes, types and finiteness, which make comparing the numbers pointless."""
    case = pair.case
    for spec in specs:
        if spec.name not in outputs:
            yield f"{case}: no output {spec.name!r}, the file has {', '.join(sorted(outputs))}"
            continue
        known, found = pair.outputs[spec.name], outputs[spec.name]
        in_float32, expected = pair.float32[spec.name] if pair.float32 else known, task.answer(known)
        if not np.isfinite(known).all() or not np.isfinite(in_float32).all():
            yield f"{case}: the reference itself holds NaN or Inf in {spec.name}; the weights overflow in fp32"
        elif found.shape != expected.shape:
            yield f"{case}: {spec.name} has shape {found.shape}, expected {expected.shape}"
        elif found.dtype != np.dtype(spec.dtype):
            yield f"{case}: {spec.name} is {found.dtype}, expected {spec.dtype}"
        elif not np.isfinite(found).all():
            yield f"{case}: {spec.name} holds {np.isnan(found).sum()} NaN and {np.isinf(found).sum()} Inf"


def describe_labels(expected: tuple[str, ...] | None, found: tuple[str, ...] | None) -> str:
    """The first difference between the manifest's labels and the file's."""
    if expected is None or found is None or len(expected) != len(found):
        count = [f"{len(labels)} labels" if labels else "no labels" for labels in (found, expected)]
        return f"the file carries {count[0]}, the manifest {count[1]}"
    index = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    return f"label {index} is {found[index]!r} in the file, {expected[index]!r} in the manifest"
