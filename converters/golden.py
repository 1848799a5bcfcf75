"""The golden vectors of an artifact: inputs, and the outputs that PyTorch gave for them."""

from __future__ import annotations

import itertools

import numpy as np

from mvit_export.artifact import Manifest
from mvit_export.checks.inputs import GOLDEN_CASES, GOLDEN_CASES_PER_SIZE, Case, make_cases, stored_case
from mvit_export.converters.capture import INPUT_NAME, Conversion
from mvit_export.readers.session import open_torch

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
    """A few of the parity inputs with the fp32 reference outputs."""
    reference = open_torch(conversion.model)
    if conversion.calibration is not None:
        samples = calibration_cases(conversion, manifest)
        return {case.name: {INPUT_NAME: case.artifact_input, **reference.run(case.model_input)} for case in samples}
    names = GOLDEN_CASES_PER_SIZE if manifest.inputs[0].enumerated else GOLDEN_CASES
    cases = [case for case in make_cases(manifest) if case.name.split("@")[0] in names]
    cases = cases or make_cases(manifest)[:1]  # a batched input has other names
    return {case.name: {INPUT_NAME: case.artifact_input, **reference.run(case.model_input)} for case in cases}
