"""The golden vectors of an artifact: inputs, and the outputs that PyTorch gave for them."""

from __future__ import annotations

import itertools

import numpy as np

from mvit_export.artifact import Manifest
from mvit_export.checks.figures import measure, violations
from mvit_export.checks.inputs import GOLDEN_CASES, GOLDEN_CASES_PER_SIZE, Case, make_cases, stored_case
from mvit_export.checks.reference import FLOAT32_PREFIX, Pair, Reference
from mvit_export.converters.capture import INPUT_NAME, Conversion
from mvit_export.formats.base import SAME_ARITHMETIC
from mvit_export.readers.session import Arrays
from mvit_export.tasks.base import Task
from mvit_export.tasks.table import task_of

SAMPLES = 8  # of the calibration data


def calibration_cases(conversion: Conversion, manifest: Manifest) -> list[Case]:
    """Some of the calibration's inputs, evenly spaced; a larger batch is filled up with those that follow."""
    assert conversion.calibration is not None
    step = max(1, conversion.calibration.count // SAMPLES)
    singles = list(itertools.islice(conversion.calibration_inputs(), 0, step * SAMPLES, step))
    batch = manifest.inputs[0].shape[0] or 1
    around = [*singles, *singles] * batch
    arrays = [np.concatenate(around[start : start + batch]) for start in range(len(singles))]
    return [stored_case(f"sample-{index}", array, manifest) for index, array in enumerate(arrays)]


def golden_vectors(conversion: Conversion, manifest: Manifest) -> dict[str, dict[str, np.ndarray]]:
    """A few of the parity inputs with the reference's outputs, float64 rounded to float32.

    Where PyTorch's own float32 is further off than parity allows, its outputs are stored beside them.
    """
    reference, task = Reference(conversion.model), task_of(manifest)
    cases = {}
    for case in golden_cases(conversion, manifest):
        pair = reference.answer(case.name, case.artifact_input, case.model_input)
        cases[case.name] = {
            INPUT_NAME: case.artifact_input,
            **{name: array.astype(np.float32) for name, array in pair.outputs.items()},
            **{FLOAT32_PREFIX + name: array for name, array in noisy_float32(pair, task).items()},
        }
    return cases


def golden_cases(conversion: Conversion, manifest: Manifest) -> list[Case]:
    if conversion.calibration is not None:
        return calibration_cases(conversion, manifest)
    names = GOLDEN_CASES_PER_SIZE if manifest.inputs[0].enumerated else GOLDEN_CASES
    every = make_cases(manifest)
    return [case for case in every if case.name.split("@")[0] in names] or every[:1]  # a batched input has other names


def noisy_float32(pair: Pair, task: Task) -> Arrays:
    """The float32 outputs that are furthest off, if that is more than same arithmetic may be; else none."""
    found: dict[float, Arrays] = {}
    for run in pair.float32_runs(widest=True):
        errors = [measure(pair.outputs[name], run[name], task) for name in pair.outputs]
        if any(violations(error, SAME_ARITHMETIC, task) for error in errors):
            found[max(error.max_abs for error in errors)] = run
    return found[max(found)] if found else {}
