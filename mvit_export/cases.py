"""The inputs that a parity check runs: seeded noise, two photographs, and structured images.

Every image starts as an 8-bit RGB picture and goes through the checkpoint's own preprocessing, so that a swapped
channel order or a wrong scale shows. Needs numpy, and Pillow for the photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np

from mvit_export.artifact import Artifact, Manifest, TensorSpec, load_golden
from mvit_export.preprocessing import Preprocessing, Size, to_picture, to_tensor

NOISE_SEEDS = (0, 1, 2)
PHOTOS = ("chelsea", "coffee")
GOLDEN_CASES = ("noise-0", "photo-chelsea", "photo-coffee", "gradient")
GOLDEN_CASES_PER_SIZE = ("noise-0", "photo-chelsea")  # where a file takes several sizes
DYNAMIC_BATCHES = (1, 3)


@dataclass(frozen=True)
class Case:
    """One run: `artifact_input` is what the exported file takes, `model_input` what the PyTorch model takes."""

    name: str
    artifact_input: np.ndarray
    model_input: np.ndarray


def make_cases(manifest: Manifest) -> list[Case]:
    """All cases for every declared input shape, at two batch sizes where the batch is dynamic."""
    spec = manifest.inputs[0]
    shapes = spec.enumerated or (spec.shape,)
    cases = []
    for shape in shapes:
        suffix = "@{}x{}".format(*image_size(shape, spec)) if len(shapes) > 1 else ""
        cases += _cases_of_shape(shape, spec, manifest.preprocessing, suffix)
    return cases


def cases_of(artifact: Artifact) -> list[Case]:
    """What a file is compared on.

    A file of few bits promises little on inputs unlike its calibration's, so it is fed the stored ones of these.
    """
    manifest = artifact.manifest
    if not (manifest.quantization and manifest.quantization.get("calibration")):
        return make_cases(manifest)
    stored = load_golden(artifact)
    return [stored_case(name, tensors[manifest.inputs[0].name], manifest) for name, tensors in stored.items()]


def stored_case(name: str, array: np.ndarray, manifest: Manifest) -> Case:
    """A case from an artifact's input as it was stored."""
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


def image_size(shape: tuple[int | None, ...], spec: TensorSpec) -> Size:
    """Height and width of an image input of `shape`, laid out as `spec` says."""
    height, width = shape[1:3] if spec.layout == "NHWC" else shape[2:4]
    assert height is not None
    assert width is not None
    return height, width


def batched(singles: dict[str, np.ndarray], batch: int, *, first_only: bool = False) -> dict[str, np.ndarray]:
    """Stack the single inputs to batches of `batch` different ones, starting at each of them in turn."""
    names = list(singles)
    starts = range(1) if first_only else range(len(names))
    result = {}
    for start in starts:
        members = [names[(start + i) % len(names)] for i in range(batch)]
        name = members[0] if batch == 1 else f"batch-{batch}-from-{members[0]}"
        result[name] = np.stack([singles[member] for member in members])
    return result


def pictures(preprocessing: Preprocessing) -> dict[str, np.ndarray]:
    """Named uint8 RGB pictures (H, W, 3), H and W being `preprocessing.crop`."""
    size = preprocessing.crop
    named = {f"noise-{seed}": noise(size, seed) for seed in NOISE_SEEDS}
    named |= {f"photo-{name}": to_picture(open_photo(name), preprocessing) for name in PHOTOS}
    return named | structured(size)


def noise(size: Size, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def structured(size: Size) -> dict[str, np.ndarray]:
    """Black, white, an 8-pixel checkerboard and a gradient whose three channels differ."""
    rows, columns = np.indices(size)
    checks = ((rows // 8 + columns // 8) % 2 * 255)[..., None].repeat(3, axis=2)
    ramps = [rows / max(size[0] - 1, 1), columns / max(size[1] - 1, 1), (rows + columns) / max(sum(size) - 2, 1)]
    return {
        "black": np.zeros((*size, 3), np.uint8),
        "white": np.full((*size, 3), 255, np.uint8),
        "checkerboard": checks.astype(np.uint8),
        "gradient": (np.stack(ramps, axis=2) * 255).astype(np.uint8),
    }


def open_photo(name: str):  # type: ignore[no-untyped-def]  # PIL's type would need Pillow at import
    """One of the photographs that come with the package, as a PIL image."""
    from PIL import Image

    with resources.files("mvit_export").joinpath("photos", f"{name}.jpg").open("rb") as file:
        return Image.open(file).convert("RGB")


def tensors(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Named float32 arrays for inputs that are no RGB image: normal noise, zeros, ones, alternation, a ramp."""
    named = {
        f"noise-{seed}": np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in NOISE_SEEDS
    }
    count = int(np.prod(shape))
    named["zeros"] = np.zeros(shape, np.float32)
    named["ones"] = np.ones(shape, np.float32)
    named["alternating"] = (np.arange(count) % 2).astype(np.float32).reshape(shape)
    named["gradient"] = np.linspace(-1, 1, count, dtype=np.float32).reshape(shape)
    return named
