"""What the machine can do at best, measured in the runtime itself: a large matrix product, and a copy of memory.

The roofline model (Williams, Waterman & Patterson, CACM 52(4), 2009) bounds a time from below by the larger of
operations over peak and bytes over bandwidth. The bytes counted here are the weights, each read once: activations that
leave the caches come on top, so the bound is a low one.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvit_export.benchmarks.devices.base import Device
from mvit_export.formats.table import FORMATS
from mvit_export.readers.session import reader_of
from mvit_export.results.latency import Roofline

SIDE = 1024  # of the square matrices: 1.07 GMAC, 12 MB in fp32


@dataclass(frozen=True)
class Peaks:
    """What a runtime reaches with a number of threads on a device."""

    peak_gmacs: float  # 1e9 multiply-accumulates per second
    bandwidth_gbs: float  # 1e9 bytes read or written per second

    def judge(self, *, macs: float, weight_bytes: float, median_ms: float) -> Roofline:
        """Where a model stands: MACs per second reached, their share of the peak, and the least time it could take."""
        ceiling_s = max(macs / self.peak_gmacs, weight_bytes / self.bandwidth_gbs) / 1e9
        achieved = macs / median_ms / 1e6
        return Roofline(
            self.peak_gmacs,
            self.bandwidth_gbs,
            achieved_gmacs=achieved,
            peak_share=achieved / self.peak_gmacs,
            ceiling_ms=1e3 * ceiling_s,
        )


def measure_roofline(runtime: str, format: str, threads: int, device: Device) -> Peaks:
    """The best of several runs of one fp32 matrix product, and of several copies.

    Raises RuntimeUnavailable or DeviceError as a probe does, MissingDependencyError if the product cannot be
    written here.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / f"product{FORMATS[format].suffix}"
        reader_of(format).write_product(model, weights())
        best_ms, bandwidth = device.time_product(model, (SIDE, SIDE), runtime=runtime, threads=threads)
    return Peaks(SIDE**3 / best_ms / 1e6, bandwidth)


def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32)
