"""How far outputs are from their reference: the figures, without a verdict. Needs numpy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FLOAT32_UNIT, FLOAT64_UNIT = 2.0**-24, 2.0**-53  # unit roundoff


@dataclass(frozen=True)
class Metrics:
    """How far an output is from its reference; the worst over all inputs and outputs, agreement the mean.

    max_rel is max_abs over the largest absolute reference value. kl (of softmax, in nats) and the agreements are
    None where the output is no row of class scores.
    """

    max_abs: float
    max_rel: float
    psnr_db: float  # identical outputs reach the resolution of float64, 319 dB
    cosine: float
    kl: float | None
    top1_agreement: float | None
    top5_agreement: float | None
    max_of_spread: float | None = None  # max_abs over the largest change of the reference between inputs
    mean_kl: float | None = None  # nats, over all rows
    delta_p: float | None = None  # largest change of the probability of the reference's top class


def measure(reference: np.ndarray, output: np.ndarray, *, spread: float = 0.0) -> Metrics:
    """Compare one finite output with its reference of the same shape, (B, classes) or any other.

    `spread` is the largest change of the reference between inputs, 0 if there is but one.

    PSNR is 10 log10(max(reference^2) / mean((output - reference)^2)), as coremltools' conversion tests define it.
    """
    r, o = reference.astype(np.float64), output.astype(np.float64)
    difference = np.abs(r - o)
    scale, noise = np.abs(r).max(), np.mean(difference**2)
    norm = np.linalg.norm(r) * np.linalg.norm(o)
    scores = r.ndim == 2 and r.shape[1] > 1
    return Metrics(
        max_abs=float(difference.max()),
        max_rel=float(difference.max() / scale) if scale else float(difference.max() > 0),
        psnr_db=psnr_db(float(scale), float(noise)),
        cosine=float((r * o).sum() / norm) if norm else float(noise == 0),
        kl=float(divergences(r, o).max()) if scores else None,
        top1_agreement=top_k_agreement(r, o, 1) if scores else None,
        top5_agreement=top_k_agreement(r, o, 5) if scores else None,
        max_of_spread=float(difference.max() / spread) if spread else None,
        mean_kl=float(divergences(r, o).mean()) if scores else None,
        delta_p=top_probability_change(r, o) if scores else None,
    )


def psnr_db(peak: float, noise: float) -> float:
    """10 log10(peak^2 / noise) with the noise at least float64's own; 0 where the reference is all zero and missed."""
    if peak == 0:
        return 0.0 if noise else -20 * math.log10(FLOAT64_UNIT)
    return 10 * math.log10(peak**2 / max(noise, (peak * FLOAT64_UNIT) ** 2))


def divergences(reference: np.ndarray, output: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(output)) of each row, in nats; rounding below zero is cut."""
    log_p, log_q = log_softmax(reference), log_softmax(output)
    return np.maximum(0.0, (np.exp(log_p) * (log_p - log_q)).sum(axis=1))


def top_probability_change(reference: np.ndarray, output: np.ndarray) -> float:
    """Largest |p - q| of the class that the reference puts first."""
    top = reference.argmax(axis=1)[:, None]
    p, q = (np.take_along_axis(np.exp(log_softmax(x)), top, axis=1) for x in (reference, output))
    return float(np.abs(p - q).max())


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def top_k_agreement(reference: np.ndarray, output: np.ndarray, k: int) -> float:
    """Share of rows whose k highest classes are the same set. Top-1 is what a user sees; no proof of parity."""
    k = min(k, reference.shape[1])
    best = [np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1) for scores in (reference, output)]
    return float((best[0] == best[1]).all(axis=1).mean())


def worst(metrics: Sequence[Metrics]) -> Metrics:
    """The worst of each figure; the mean of the agreements."""

    def values(name: str) -> list[float]:
        return [value for m in metrics if (value := getattr(m, name)) is not None]

    return Metrics(
        max_abs=max(values("max_abs")),
        max_rel=max(values("max_rel")),
        psnr_db=min(values("psnr_db")),
        cosine=min(values("cosine")),
        kl=max(values("kl"), default=None),
        top1_agreement=_mean(values("top1_agreement")),
        top5_agreement=_mean(values("top5_agreement")),
        max_of_spread=max(values("max_of_spread"), default=None),
        mean_kl=_mean(values("mean_kl")),
        delta_p=max(values("delta_p"), default=None),
    )


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
