"""Pictures and tensors that need no dataset: seeded noise, two photographs, and structured images.

Needs numpy, and Pillow for the photographs.
"""

from __future__ import annotations

from importlib import resources

import numpy as np

from mvit_export.data.preprocessing import Preprocessing, Size, to_picture

NOISE_SEEDS = (0, 1, 2)
PHOTOS = ("chelsea", "coffee")


def batched(singles: dict[str, np.ndarray], batch: int, *, first_only: bool = False) -> dict[str, np.ndarray]:
    """Stack the single inputs into batches of `batch` different ones, starting at each of them in turn."""
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
    """Named float32 arrays for inputs that are not RGB images: normal noise, zeros, ones, alternation, a ramp."""
    named = {
        f"noise-{seed}": np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in NOISE_SEEDS
    }
    count = int(np.prod(shape))
    named["zeros"] = np.zeros(shape, np.float32)
    named["ones"] = np.ones(shape, np.float32)
    named["alternating"] = (np.arange(count) % 2).astype(np.float32).reshape(shape)
    named["gradient"] = np.linspace(-1, 1, count, dtype=np.float32).reshape(shape)
    return named
