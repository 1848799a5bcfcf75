"""How far outputs are from their reference: the figures, without a verdict. Needs only numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mvit_export.formats.base import Tolerance
from mvit_export.results.parity import Metrics
from mvit_export.tasks.base import Task

FLOAT32_UNIT, FLOAT64_UNIT = 2.0**-24, 2.0**-53  # unit roundoff


def measure(reference: np.ndarray, output: np.ndarray, task: Task, *, spread: float = 0.0) -> Metrics:
    """Compare one finite output with its reference of the same shape, (B, …); `task` adds its own figures.

    `spread` is the largest change of the reference between inputs, 0 if there is only one.

    PSNR is 10 log10(max(reference^2) / mean((output - reference)^2)), as coremltools' conversion tests define it.
    """
    r, o = (array.astype(np.float64) for array in task.view(reference, output))
    difference = np.abs(r - o)
    scale, noise = np.abs(r).max(), np.mean(difference**2)
    norm = np.linalg.norm(r) * np.linalg.norm(o)
    return Metrics(
        max_abs=float(difference.max()),
        max_rel=float(difference.max() / scale) if scale else float(difference.max() > 0),
        psnr_db=psnr_db(float(scale), float(noise)),
        cosine=float((r * o).sum() / norm) if norm else float(noise == 0),
        max_of_spread=float(difference.max() / spread) if spread else None,
        of_task=task.compare(r, o),
    )


def psnr_db(peak: float, noise: float) -> float:
    """10 log10(peak^2 / noise) with the noise at least float64's own; 0 if the reference is all zero but missed."""
    if peak == 0:
        return 0.0 if noise else -20 * math.log10(FLOAT64_UNIT)
    most = -20 * math.log10(FLOAT64_UNIT)
    return min(most, 20 * math.log10(peak) - 10 * math.log10(noise)) if noise else most


def worst(metrics: Sequence[Metrics], task: Task) -> Metrics:
    """The worst of each figure; for its own figures the task says which is worst."""
    spreads = [m.max_of_spread for m in metrics if m.max_of_spread is not None]
    own = {figure: [m.of_task[figure.name] for m in metrics if figure.name in m.of_task] for figure in task.figures}
    return Metrics(
        max_abs=max(m.max_abs for m in metrics),
        max_rel=max(m.max_rel for m in metrics),
        psnr_db=min(m.psnr_db for m in metrics),
        cosine=min(m.cosine for m in metrics),
        max_of_spread=max(spreads, default=None),
        of_task={figure.name: figure.combine(values) for figure, values in own.items() if values},
    )


def widen(tolerance: Tolerance, own: Metrics) -> Tolerance:
    """The bounds at twice the error of PyTorch's own float32 where that is more: 6 dB, and four times a square."""
    spread = own.max_of_spread or 0.0
    return replace(
        tolerance,
        psnr_db=min(tolerance.psnr_db, own.psnr_db - 20 * math.log10(2)),
        max_rel=max(tolerance.max_rel, 2 * own.max_rel),
        cosine=min(tolerance.cosine, 1 - 4 * (1 - own.cosine)),
        kl=max(tolerance.kl, 4 * own.of_task.get("kl", 0.0)),
        max_of_spread=max(tolerance.max_of_spread, 2 * spread),
    )


def violations(metrics: Metrics, tolerance: Tolerance, task: Task) -> list[str]:
    """Each figure outside its bound, in words."""
    found = []
    if metrics.psnr_db < tolerance.psnr_db:
        found.append(f"PSNR {metrics.psnr_db:.1f} dB, at least {tolerance.psnr_db:g} expected")
    if metrics.max_rel > tolerance.max_rel:
        found.append(f"max error {metrics.max_rel:.1e} of the scale, at most {tolerance.max_rel:g} expected")
    if metrics.max_of_spread is not None and metrics.max_of_spread > tolerance.max_of_spread:
        share, limit = metrics.max_of_spread, tolerance.max_of_spread
        found.append(f"max error {share:.1e} of what the input changes, at most {limit:g} expected")
    if metrics.cosine < tolerance.cosine:
        found.append(f"1 - cosine {1 - metrics.cosine:.1e}, at most {1 - tolerance.cosine:.0e} expected")
    for figure in task.figures:
        value, bound = metrics.of_task.get(figure.name), figure.bound(tolerance)
        if value is None or bound is None:
            continue
        if value < bound if figure.at_least else value > bound:
            side = "least" if figure.at_least else "most"
            found.append(f"{figure.words} {value:{figure.digits}}, at {side} {bound:g} expected")
    return found
