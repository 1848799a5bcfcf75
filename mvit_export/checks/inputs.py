"""The inputs that a parity check runs: seeded noise, two photographs, and structured images.

Every image starts as an 8-bit RGB picture and goes through the checkpoint's own preprocessing, so that a swapped
channel order or a wrong scale shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mvit_export.artifact import Artifact, Manifest, TensorSpec, image_size, load_golden
from mvit_export.checks.flat import picture_of
from mvit_export.data.preprocessing import Preprocessing, to_tensor
from mvit_export.data.synthetic import batched, pictures, tensors

GOLDEN_CASES = ("noise-0", "photo-chelsea", "photo-coffee", "gradient")
GOLDEN_CASES_PER_SIZE = ("noise-0", "photo-chelsea")  # if a file accepts several sizes
DYNAMIC_BATCHES = (1, 3)


@dataclass(frozen=True)
class Case:
    """One run: `artifact_input` goes to the exported file, `model_input` to the PyTorch model."""

    name: str
    artifact_input: np.ndarray
    model_input: np.ndarray


def make_cases(manifest: Manifest) -> list[Case]:
    """All cases for every declared input shape, at two batch sizes if the batch is dynamic."""
    spec = manifest.inputs[0]
    shapes = spec.enumerated or (spec.shape,)
    cases = []
    for shape in shapes:
        suffix = "@{}x{}".format(*image_size(shape, spec)) if len(shapes) > 1 else ""
        cases += _cases_of_shape(shape, spec, manifest.preprocessing, suffix)
    return cases


def cases_of(artifact: Artifact) -> list[Case]:
    """The inputs that a file is compared on.

    A file of few bits promises little on inputs unlike its calibration data, so it gets the stored inputs from there.
    """
    manifest = artifact.manifest
    if not (manifest.quantization and manifest.quantization.get("calibration")):
        return make_cases(manifest)
    stored = load_golden(artifact)
    return [stored_case(name, tensors[manifest.inputs[0].name], manifest) for name, tensors in stored.items()]


def flat_case(name: str, manifest: Manifest) -> Case:
    """A flat picture by its name, see checks/flat.py, in the first size."""
    spec, preprocessing = manifest.inputs[0], manifest.preprocessing
    assert preprocessing is not None
    picture = picture_of(name, image_size(spec.shape, spec))[None].repeat(spec.shape[0] or 1, axis=0)
    model_input = to_tensor(picture, preprocessing)
    return Case(name, picture if spec.layout == "NHWC" else model_input, model_input)


def stored_case(name: str, array: np.ndarray, manifest: Manifest) -> Case:
    """A case from an artifact's stored input."""
    pictures = manifest.inputs[0].layout == "NHWC"
    assert manifest.preprocessing is not None or not pictures
    return Case(name, array, to_tensor(array, manifest.preprocessing) if pictures else array)  # type: ignore[arg-type]


def _cases_of_shape(
    shape: tuple[int | None, ...], spec: TensorSpec, preprocessing: Preprocessing | None, suffix: str
) -> list[Case]:
    if preprocessing is None:
        singles = tensors(tuple(side or 1 for side in shape[1:]))
    else:
        singles = pictures(preprocessing.with_size(image_size(shape, spec)))
    batches = DYNAMIC_BATCHES if shape[0] is None else (shape[0],)
    cases = []
    for batch in batches:
        for name, array in batched(singles, batch, first_only=batch != batches[0]).items():
            model_input = array if preprocessing is None else to_tensor(array, preprocessing)
            artifact_input = array if spec.layout == "NHWC" else model_input
            cases.append(Case(name + suffix, artifact_input, model_input))
    return cases
