"""Artifact directories such as `verify` and `bench` leave them, with files of the right size and made-up figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.artifact import (
    GOLDEN,
    MANIFEST,
    Manifest,
    ModelInfo,
    TensorSpec,
    WeightsInfo,
    hash_files,
    record_name,
    write_json,
)
from mvit_export.data.preprocessing import Preprocessing
from mvit_export.formats.table import FORMATS
from mvit_export.formats.targets import Target
from mvit_export.results.parity import Metrics, ParityReport, ParityResult

ENVIRONMENT = {
    "created": "2026-11-24T09:30:12+00:00",
    "system": "Linux 6.8",
    "machine": "x86_64",
    "cpu": "Intel Xeon Platinum 8370C",
    "cores": 4,
    "python": "3.11.2",
    "load_average": 0.2119140625,
    "tools": {"mvit-export": "0.1.0", "onnxruntime": "1.31.1", "ai-edge-litert": "2.3.0"},
    "affinity": [0, 1],
}
MODELS = {"xxs": (1_271_520, 420_990_000), "xs": (2_320_000, 986_300_000), "s": (5_578_632, 2_030_000_000)}
SIZES = {"xxs": 5_241_000, "xs": 9_411_000, "s": 22_433_000}
RUNTIMES = {"onnx": "onnxruntime 1.31.1 CPU", "tflite": "ai-edge-litert 2.3.0 CPU", "coreml": "Core ML"}


def make_artifact(folder: Path, variant: str = "xxs", fmt: str = "onnx", precision: str = "fp32") -> Path:
    """An artifact of the right size whose model file is empty space; no verdict, no latency."""
    name = f"mobilevit_{variant}"
    place = folder / name / f"{fmt}-{precision}"
    place.mkdir(parents=True)
    (place / GOLDEN).write_bytes(b"golden")
    model = place / (name + FORMATS[fmt].suffix)
    if fmt == "coreml":
        model.mkdir()
        model /= "weights.bin"
    with model.open("wb") as file:
        file.truncate(SIZES[variant])
    params, macs = MODELS[variant]
    manifest = Manifest(
        model=ModelInfo(name, variant, "classification", params, macs, variant, 1000),
        weights=WeightsInfo(None, None, None, "0" * 64, False, 0),
        preprocessing=Preprocessing("BGR", crop=(256, 256)),
        inputs=(TensorSpec("image", (1, 3, 256, 256), "float32", "NCHW"),),
        outputs=(TensorSpec("logits", (1, 1000), "float32", "NC"),),
        format=fmt,
        precision=precision,
        target=Target(fmt, precision),
        capture="torch.export",
        files=hash_files(place),
        tools={"mvit-export": "0.1.0", "torch": "2.13.0", "onnx": "1.23.0"},
        created="2026-11-24T09:11:05+00:00",
    )
    write_json(place / MANIFEST, manifest.to_json())
    return place


def verdict(place: Path, status: str = "pass", reason: str = "", **figures: Any) -> ParityResult:
    """What `verify` would say of `place`; `figures` replace the metrics'."""
    fmt, precision = place.name.split("-")
    values = {"max_abs": 3.1e-6, "max_rel": 4.3e-07, "psnr_db": 142.3, "cosine": 1.0}
    of_task = {"kl": 2.1e-15, "top1_agreement": 1.0, "top5_agreement": 1.0}
    of_task |= {name: figures.pop(name) for name in of_task if name in figures}
    metrics = Metrics(**{**values, **figures}, of_task=of_task)
    ran = status != "not-run"
    return ParityResult(
        path=str(place), format=fmt, precision=precision, status=status, reason=reason,
        runtime=("mil-reference" if fmt == "coreml" else RUNTIMES[fmt]) if ran else None, against="pytorch",
        inputs=9 if ran else 0, metrics=metrics if ran else None,
        tolerance=FORMATS[fmt].precisions[precision].tolerance,
        note="proves graph and weights, not Apple's kernels" if fmt == "coreml" and status == "pass" else "",
    )  # fmt: skip


def store_parity(place: Path, *verdicts: ParityResult, device: str = "local") -> None:
    write_json(place / record_name("parity", device), ParityReport(verdicts).to_json())


def samples(median: float, *, count: int = 60, seed: int = 0) -> list[float]:
    """Times with a long tail: mostly within 2 %, now and then an interruption."""
    draw = np.random.default_rng(seed)
    times = median * (1 + 0.012 * draw.standard_normal(count)) + draw.exponential(0.015 * median, count)
    late = draw.random(count) < 0.05
    times[late] *= 1 + draw.random(late.sum()) * 0.5
    return [round(float(value), 4) for value in times]


def timing(place: Path, median: float, *, threads: int = 1, **changes: Any) -> dict[str, Any]:
    """One measured row of latency.json; `changes` replace fields."""
    variant, (fmt, precision) = place.parent.name.removeprefix("mobilevit_"), place.name.split("-")
    times = np.array(samples(median, seed=hash_of(place, threads)))
    middle = float(np.median(times))
    params, macs = MODELS[variant]
    achieved = macs / middle / 1e6
    row = {
        "path": str(place), "model": f"mobilevit_{variant}", "variant": variant, "format": fmt, "precision": precision,
        "status": "measured", "reason": "", "runtime": RUNTIMES[fmt], "device": "local", "threads": threads, "batch": 1,
        "input_shape": [1, 3, 256, 256],
        "load_ms": 61.4 + median, "load_warm_ms": 33.2 + median, "first_ms": 1.7 * median,
        "median_ms": middle, "median_interval_ms": [middle * 0.994, middle * 1.007],
        "p90_ms": float(np.percentile(times, 90)), "p99_ms": float(np.percentile(times, 99)),
        "min_ms": float(times.min()), "samples_ms": list(times), "rounds": 12, "settled": True,
        "peak_rss_mb": 24.0 + median,
        "macs": macs, "params": params, "bytes": SIZES[variant],
        "ratio": None, "profile": None, "warnings": [],
        "roofline": {
            "peak_gmacs": 61.0 * threads, "bandwidth_gbs": 11.2, "achieved_gmacs": achieved,
            "peak_share": achieved / 61.0 / threads, "ceiling_ms": macs / 61e6 / threads,
        },
    }  # fmt: skip
    return {**row, **changes}


def hash_of(place: Path, threads: int) -> int:
    return sum(f"{place.parent.name}{place.name}{threads}".encode())


def unmeasured(place: Path, reason: str) -> dict[str, Any]:
    """A row of latency.json for what cannot be measured here."""
    row = timing(place, 1.0, status="not-run", reason=reason, samples_ms=[], warnings=[])
    kept = {"path", "model", "variant", "format", "precision", "status", "reason", "runtime", "device", "samples_ms"}
    return {key: value if key in kept else None for key, value in row.items()}


def store_latency(place: Path, *rows: dict[str, Any], device: str = "local", **environment: Any) -> None:
    document = {"status": "pass", "environment": {**ENVIRONMENT, **environment}, "results": list(rows)}
    write_json(place / record_name("latency", device), document)


def scores(place: Path, **changes: Any) -> dict[str, Any]:
    """One row of accuracy.json; `changes` replace fields."""
    fmt, precision = place.name.split("-")
    row = {
        "path": str(place), "model": place.parent.name, "variant": "xxs", "format": fmt, "precision": precision,
        "status": "measured", "reason": "", "runtime": RUNTIMES[fmt], "reference": "PyTorch mobilevit_xxs 256x256",
        "images": 454, "top1": 0.9868, "top5": 0.9978, "ece": 0.0744, "agreement": 0.9912, "mean_kl": 2.4e-3,
        "mean_delta_p": 0.011, "max_delta_p": 0.31, "drop_points": -0.22, "drop_interval": [-0.87, 0.43],
        "images_per_s": 84.0, "per_class": [], "most_confused": [], "gate": None, "warnings": [],
    }  # fmt: skip
    return {**row, **changes}


def store_accuracy(place: Path, *rows: dict[str, Any]) -> None:
    environment = {**ENVIRONMENT, "data": {"source": "digits/val", "images": 454}}
    write_json(place / "accuracy.json", {"status": "pass", "environment": environment, "results": list(rows)})


MEDIANS = {
    ("xxs", "onnx"): 13.2, ("xxs", "tflite"): 11.2, ("xs", "onnx"): 25.9, ("xs", "tflite"): 22.7,
    ("s", "onnx"): 47.5, ("s", "tflite"): 43.1,
}  # fmt: skip


def make_showcase(folder: Path) -> Path:
    """Six files measured with one and two threads, one of them wrong; a Core ML package that cannot be measured."""
    first = None
    for (variant, fmt), median in MEDIANS.items():
        place = make_artifact(folder, variant, fmt)
        first = first or median
        rows = []
        for threads in (1, 2):
            scaled = median / (1.0 if threads == 1 else 1.72)
            share = scaled / (first / (1.0 if threads == 1 else 1.72))
            to = f"mobilevit_xxs onnx-fp32 {RUNTIMES['onnx']}, same threads"
            ratio = {"to": to, "median": share, "interval": [share * 0.99, share * 1.011]}
            rows.append(timing(place, scaled, threads=threads, ratio=ratio))
        if (variant, fmt) == ("s", "tflite"):
            unsettled = "the time budget ended before the median settled: it is known to within 4.1 % only"
            rows[1].update(settled=False, warnings=["2 threads are 1.68x as fast as 1: [1.66, 1.71]", unsettled])
        store_latency(place, *rows)
        store_parity(place, showcase_verdict(place))
    package = make_artifact(folder, "xxs", "coreml", "fp16")
    store_parity(package, verdict(package, psnr_db=76.3, max_rel=6.8e-4, kl=8e-9))
    store_latency(package, unmeasured(package, "Core ML predicts on macOS only, this is Linux"))
    return folder


def showcase_verdict(place: Path) -> ParityResult:
    if place.parent.name == "mobilevit_xs" and place.name == "tflite-fp32":
        reason = "PSNR 31.4 dB, at least 100 expected; max error 8.1e-02 of the scale, at most 1e-05 expected"
        return verdict(place, "fail", reason, psnr_db=31.4, max_rel=8.1e-2, kl=3.4e-3, top1_agreement=0.89)
    return verdict(place)
