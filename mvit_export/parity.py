"""Is the file on disk the same function as the PyTorch model it came from?

The saved file runs in the runtime of its format; the reference is the unmodified PyTorch model, rebuilt from its
weights, or the golden vectors that the export stored (`against="golden"`: no torch needed). First shapes, types,
finiteness and labels are compared, then the numbers, against one table of tolerances.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.artifact import (
    Artifact,
    Manifest,
    TensorSpec,
    find_artifacts,
    load_golden,
    read_artifact,
    read_manifest,
    record_name,
    write_json,
)
from mvit_export.cases import cases_of
from mvit_export.errors import ArtifactError, MvitExportError, RuntimeUnavailable, UsageError, first_line
from mvit_export.locate import Located, locate
from mvit_export.metrics import FLOAT32_UNIT, Metrics, measure, worst
from mvit_export.runtimes import Arrays, Overflow, Session, open_torch, openers

PASS, FAIL, NOT_RUN = "pass", "fail", "not-run"
REFERENCES = ("pytorch", "golden")
Openers = Callable[[Artifact], Sequence[Callable[[Artifact], Session]]]


@dataclass(frozen=True)
class Tolerance:
    """Bounds on `Metrics`: psnr_db and cosine from below, the others from above. `reason` says why these.

    mean_kl and delta_p catch a collapse of confidence that the argmax hides. max_of_spread: an error of a tenth of
    what the input changes at all is no rounding, however small beside an offset that every output shares.
    """

    psnr_db: float
    max_rel: float
    cosine: float
    kl: float
    reason: str
    max_of_spread: float = 0.1
    mean_kl: float | None = None
    delta_p: float | None = None


# Apple's guidance for Core ML conversions asks for more than 70 dB in fp32 and 50 dB in fp16.
TOLERANCES = {
    ("onnx", "fp32"): Tolerance(100, 1e-5, 1 - 1e-8, 1e-8, "same arithmetic; only the order of sums differs"),
    ("tflite", "fp32"): Tolerance(100, 1e-5, 1 - 1e-8, 1e-8, "same arithmetic; only the order of sums differs"),
    ("coreml", "fp32"): Tolerance(100, 1e-5, 1 - 1e-8, 1e-8, "same arithmetic; only the order of sums differs"),
    ("onnx", "fp16"): Tolerance(50, 2e-2, 1 - 1e-4, 1e-3, "every intermediate has 11 significant bits"),
    ("tflite", "fp16"): Tolerance(50, 2e-2, 1 - 1e-4, 1e-3, "weights have 11 significant bits, sums stay fp32"),
    ("coreml", "fp16"): Tolerance(50, 2e-2, 1 - 1e-4, 1e-3, "every intermediate has 11 significant bits"),
}
# Measured on MobileViT-XXS trained for digits, on one with random weights at 256x256, and on the tests' tiny network,
# which is the most sensitive. The worst is named; about twice its error is let through.
# fmt: off
ONNX_WEIGHTS_8 = Tolerance(
    24, 0.15, 0.99, 0.05, "weights have 8 bits: 27.7 dB on a picture unlike all trained on", 0.3, 0.02, 0.1
)
ONNX_DYNAMIC_8 = Tolerance(
    25, 0.15, 0.99, 0.05, "weights and inputs of linear layers have 8 bits: 27.7 dB", 0.3, 0.02, 0.1
)
ONNX_STATIC_8 = Tolerance(
    27, 0.15, 0.99, 0.05, "weights and activations have 8 bits: 31.5 dB on digits calibrated by entropy, else 34 dB; "
    "0.53 of what the input changes where weights are random and pictures alike", 0.7, 0.02, 0.1
)  # fmt: skip
ONNX_WEIGHTS_4 = Tolerance(
    10, 1.3, 0.65, 0.05, "weights of linear layers and dense convolutions have 16 values, the others 8 bits: 24 dB "
    "trained, 11.5 dB with random weights, whose scores lie close together; KL judges the trained", 1.0, 0.02, 0.15
)  # fmt: skip
TFLITE_WEIGHTS_8 = Tolerance(
    24, 0.15, 0.99, 0.05, "weights have 8 bits: 27.6 dB on a white picture, unlike all trained on", 0.3, 0.02, 0.1
)
TFLITE_DYNAMIC_8 = Tolerance(
    24, 0.15, 0.99, 0.05, "weights and inputs of products have 8 bits: 27.8 dB", 0.3, 0.02, 0.1
)
TFLITE_STATIC_8 = Tolerance(
    20, 0.25, 0.99, 0.1, "weights and activations have 8 bits: 23.8 dB, 0.54 of what the input changes, on the tiny "
    "network; on held-out digits the top class's probability changes by up to 0.11", 0.8, 0.02, 0.2
)
TFLITE_STATIC_16 = Tolerance(
    30, 0.1, 0.995, 0.05, "weights have 8 bits, activations 16: 39.5 dB on calibration's own pictures", 0.3, 0.02, 0.1
)
TFLITE_WEIGHTS_4 = Tolerance(
    18, 0.35, 0.96, 0.1, "weights of linear layers have 16 values, the others 8 bits: 21.3 dB", 0.8, 0.05, 0.15
)
COREML_WEIGHTS_8 = Tolerance(
    28, 0.15, 0.99, 0.05, "weights have 8 bits, sums have 11: 29.8 dB on digits", 0.4, 0.02, 0.1
)
COREML_STATIC_8 = Tolerance(
    20, 0.3, 0.98, 0.1, "weights and activations have 8 bits, symmetric: 26.1 dB on digits; 22.0 dB, 0.65 of what the "
    "input changes, on the tiny network", 0.8, 0.02, 0.2
)
COREML_PALETTE_8 = Tolerance(
    28, 0.15, 0.99, 0.05, "weights have 256 values a tensor: 32.1 dB on digits", 0.3, 0.02, 0.1
)
COREML_PALETTE_6 = Tolerance(
    22, 0.2, 0.99, 0.05, "weights of linear layers and dense convolutions have 64 values, the others 256: 31.0 dB on "
    "digits, 26.7 dB on the tiny network", 0.5, 0.02, 0.1
)
COREML_PALETTE_4 = Tolerance(
    15, 0.35, 0.96, 0.1, "weights of linear layers and dense convolutions have 16 values, the others 256: 28.2 dB on "
    "digits; 19.9 dB, 0.79 of what the input changes, on the tiny network", 1.0, 0.03, 0.15
)
COREML_WEIGHTS_4 = Tolerance(
    15, 0.4, 0.95, 0.1, "weights of linear layers and dense convolutions have 16 values, the others 8 bits: 26.3 dB on "
    "digits; 19.4 dB, 0.91 of what the input changes, on the tiny network", 1.0, 0.03, 0.15
)
# fmt: on
TOLERANCES |= {
    ("onnx", "int8-weight"): ONNX_WEIGHTS_8,
    ("onnx", "int8-dynamic"): ONNX_DYNAMIC_8,
    ("onnx", "int8"): ONNX_STATIC_8,
    ("onnx", "int4-weight"): ONNX_WEIGHTS_4,
    ("tflite", "int8-weight"): TFLITE_WEIGHTS_8,
    ("tflite", "int8-dynamic"): TFLITE_DYNAMIC_8,
    ("tflite", "int8"): TFLITE_STATIC_8,
    ("tflite", "int16"): TFLITE_STATIC_16,
    ("tflite", "int4-weight"): TFLITE_WEIGHTS_4,
    ("coreml", "int8-weight"): COREML_WEIGHTS_8,
    ("coreml", "int8"): COREML_STATIC_8,
    ("coreml", "palette8"): COREML_PALETTE_8,
    ("coreml", "palette6"): COREML_PALETTE_6,
    ("coreml", "palette4"): COREML_PALETTE_4,
    ("coreml", "int4-weight"): COREML_WEIGHTS_4,
}


@dataclass(frozen=True)
class ParityResult:
    """The verdict of one runtime on one artifact. `reason` is empty for PASS; `note` says what a PASS leaves open.

    `worst_case` names the input with a fault or else the largest error, if all could run. `overflow` is the first of
    an fp16 program that failed, where the runtime can tell. `located` is there if it was asked for.
    """

    path: str
    format: str
    precision: str
    status: str
    reason: str
    runtime: str | None
    against: str
    inputs: int
    metrics: Metrics | None
    tolerance: Tolerance
    note: str = ""
    worst_case: str | None = None
    overflow: Overflow | None = None
    located: Located | None = None
    device: str = "local"  # where the runtime was

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["metrics"] = data["metrics"] or dict.fromkeys(Metrics.__dataclass_fields__)
        return data


ADDED = {"mean_kl": "mean KL", "delta_p": "the top class's probability changes by"}


def violations(metrics: Metrics, tolerance: Tolerance) -> list[str]:
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
    if metrics.kl is not None and metrics.kl > tolerance.kl:
        found.append(f"KL {metrics.kl:.1e}, at most {tolerance.kl:g} expected")
    for figure, words in ADDED.items():
        value, limit = getattr(metrics, figure), getattr(tolerance, figure)
        if value is not None and limit is not None and value > limit:
            found.append(f"{words} {value:.2g}, at most {limit:g} expected")
    return found


def verify(
    path: str | Path,
    *,
    against: str = "pytorch",
    weights: str | Path | None = None,
    find_layer: bool = False,
    on_case: Callable[[int, int], None] | None = None,
    device: str = "local",
    sessions: Openers = openers,
) -> tuple[ParityResult, ...]:
    """Check every artifact that `path` means and write the verdicts to its parity.json.

    There is one result for each artifact and runtime: a Core ML package on macOS is checked by Core ML and by the
    reference executor, elsewhere by the latter alone.

    `against` is "pytorch" (the model rebuilt from its weights; `weights` if they have moved) or "golden" (the stored
    vectors; needs numpy, safetensors and the runtime alone). `find_layer` also names the first layer at which a file
    leaves PyTorch. `on_case(done, total)` is called for progress.
    `sessions` gives the runtimes for an artifact where these are not the machine's own; `device` names where they are,
    and the verdict then goes to a file of its own, `record_name`.
    Raises ArtifactError, WeightsError or UsageError where the question itself cannot be asked.
    """
    if against not in REFERENCES:
        raise UsageError(f"--against is {against!r}, expected one of {', '.join(REFERENCES)}")
    if weights is not None and against == "golden":
        raise UsageError("--weights has no use with --against golden, which reads the stored vectors alone")
    if find_layer and against == "golden":
        raise UsageError("--locate compares with PyTorch's layers, which --against golden does without; leave out one")
    if find_layer and device != "local":
        raise UsageError("--locate looks into files with the runtimes of this machine; leave out --device")
    places = find_artifacts(path)
    if find_layer:
        check_layers(places)
    for place in places:
        with suppress(OSError):  # a verdict of yesterday says nothing if today's check ends in an error
            (place / record_name("parity", device)).unlink(missing_ok=True)
    artifacts = [read_artifact(place) for place in places]
    results: list[ParityResult] = []
    for artifact in artifacts:
        verdicts = judge(artifact, against=against, weights=weights, on_case=on_case, sessions=sessions)
        if find_layer:
            verdicts = [with_location(verdict, artifact, weights) for verdict in verdicts]
        results += store_verdicts(artifact, [replace(verdict, device=device) for verdict in verdicts])
    return tuple(results)


def check_layers(places: Sequence[Path]) -> None:
    """Refuse files whose layers are fused for good, before any is checked. What is damaged is told by the check."""
    for place in places:
        with suppress(ArtifactError):
            if read_manifest(place).target.ort:
                raise UsageError(f"--locate: {place} is a .ort file, whose layers are fused; export without --ort")


def judge(
    artifact: Artifact,
    *,
    against: str = "pytorch",
    weights: str | Path | None = None,
    on_case: Callable[[int, int], None] | None = None,
    sessions: Openers = openers,
) -> list[ParityResult]:
    """The verdict of each runtime, written nowhere: `verify` of one artifact, for who stores it himself."""
    pairs = functools.cache(lambda: _pairs(artifact, against, weights))  # computed once, if a runtime works
    return [_verify_in(opener, artifact, against, pairs, on_case) for opener in sessions(artifact)]


def store_verdicts(artifact: Artifact, verdicts: list[ParityResult]) -> list[ParityResult]:
    """Write them beside the model; for a read-only artifact they say that they were not stored."""
    try:
        write_json(artifact.path / record_name("parity", verdicts[0].device), summarise(verdicts))
    except ArtifactError as error:
        return [replace(verdict, note=f"{verdict.note}; {error}".lstrip("; ")) for verdict in verdicts]
    return verdicts


def _verify_in(
    opener: Callable[[Artifact], Session],
    artifact: Artifact,
    against: str,
    pairs: Callable[[], Sequence[Pair]],
    on_case: Callable[[int, int], None] | None,
) -> ParityResult:
    """Run the artifact in one runtime and judge it."""
    manifest = artifact.manifest
    tolerance = TOLERANCES[manifest.format, manifest.precision]
    blank = ParityResult(
        str(artifact.path), manifest.format, manifest.precision, NOT_RUN, "", None, against, 0, None, tolerance
    )
    try:
        session = opener(artifact)
    except RuntimeUnavailable as error:
        return replace(blank, reason=str(error))
    if constant := constant_reference(pairs()):
        return replace(blank, reason=constant, runtime=session.runtime)
    outcomes = run_cases(manifest, session.run, pairs(), on_case)
    reasons, metrics = summarise_cases(outcomes)
    worst_case = find_worst(outcomes)
    if session.labels != manifest.model.labels:
        reasons.insert(0, describe_labels(manifest.model.labels, session.labels))
    if not reasons and metrics is not None:
        reasons = violations(metrics, tolerance)
    overflow = None
    if reasons and session.overflow and manifest.precision == "fp16" and not worst_case.broken:
        overflow = session.overflow(next(array for case, array, _ in pairs() if case == worst_case.case))
    return replace(
        blank,
        status=FAIL if reasons else PASS,
        reason="; ".join([*reasons, *([str(overflow)] if overflow else [])]),
        runtime=session.runtime,
        inputs=len(pairs()),
        metrics=metrics,
        note="" if reasons else session.note,
        worst_case=None if worst_case.broken else worst_case.case,
        overflow=overflow,
    )


def with_location(result: ParityResult, artifact: Artifact, weights: str | Path | None) -> ParityResult:
    """The verdict with the first layer that differs, unless no run came to its end."""
    if result.worst_case is None:
        return result
    limit, passed = result.tolerance.max_rel, result.status == PASS
    found = locate(artifact, case=result.worst_case, max_rel=limit, passed=passed, weights=weights)
    return replace(result, located=found)


def _pairs(artifact: Artifact, against: str, weights: str | Path | None) -> Sequence[Pair]:
    return _golden_pairs(artifact) if against == "golden" else _reference_pairs(artifact, weights)


Pair = tuple[str, np.ndarray, Arrays]  # case name, the artifact's input, the reference outputs


def _golden_pairs(artifact: Artifact) -> list[Pair]:
    name = artifact.manifest.inputs[0].name
    return [(case, tensors.pop(name), tensors) for case, tensors in load_golden(artifact).items()]


def _reference_pairs(artifact: Artifact, weights: str | Path | None) -> list[Pair]:
    from mvit_export.models.load import rebuild_model

    reference = open_torch(rebuild_model(artifact.manifest, weights=weights).module)
    cases = cases_of(artifact)
    return [(case.name, case.artifact_input, reference.run(case.model_input)) for case in cases]


@dataclass(frozen=True)
class Outcome:
    """What one input showed: faults or metrics; `broken` if the runtime did not come to the end of its run."""

    case: str
    faults: tuple[str, ...]
    metrics: Metrics | None = None
    broken: bool = False


def run_cases(
    manifest: Manifest,
    run: Callable[[np.ndarray], Arrays],
    pairs: Sequence[Pair],
    on_case: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Run the inputs, to the first that breaks the runtime."""
    outcomes: list[Outcome] = []
    spreads = {spec.name: spread_of(spec.name, pairs) for spec in manifest.outputs}
    for done, (case, array, reference) in enumerate(pairs, start=1):
        try:
            outputs = run(array)
        except MvitExportError:
            raise
        except Exception as error:  # each runtime has its own exception types; a run that fails is a failed check
            fault = f"{case}: the runtime failed: {first_line(error)}"
            return [*outcomes, Outcome(case, (fault,), broken=True)]
        faults = tuple(structural_faults(case, manifest.outputs, reference, outputs))
        measured = [
            measure(reference[spec.name], outputs[spec.name], spread=spreads[spec.name])
            for spec in manifest.outputs
            if not faults
        ]
        outcomes.append(Outcome(case, faults, worst(measured) if measured else None))
        if on_case:
            on_case(done, len(pairs))
    return outcomes


def summarise_cases(outcomes: Sequence[Outcome]) -> tuple[list[str], Metrics | None]:
    """The first faults, and the worst of the metrics."""
    measured = [outcome.metrics for outcome in outcomes if outcome.metrics]
    return [fault for outcome in outcomes for fault in outcome.faults][:3], worst(measured) if measured else None


def find_worst(outcomes: Sequence[Outcome]) -> Outcome:
    """The first input with a fault, else the one with the largest error."""
    faulty = [outcome for outcome in outcomes if outcome.faults]
    return faulty[0] if faulty else max(outcomes, key=lambda outcome: outcome.metrics.max_rel if outcome.metrics else 0)


def constant_reference(pairs: Sequence[Pair]) -> str | None:
    """Why a comparison would prove nothing: a reference that ignores its input, as an untrained zero head does."""
    for name in pairs[0][2]:
        rows = reference_rows(name, pairs)
        if len(rows) > 1 and spread_of(name, pairs) <= FLOAT32_UNIT * np.abs(rows).max():
            return f"the reference gives the same {name} for all {len(rows)} inputs, which proves nothing; load weights"
    return None


def spread_of(name: str, pairs: Sequence[Pair]) -> float:
    """The largest difference of an output's reference between the first input and any other; 0 for one input."""
    rows = reference_rows(name, pairs)
    with np.errstate(invalid="ignore"):  # NaN and Inf are reported by the comparison
        return float(np.abs(rows - rows[0]).max())


def reference_rows(name: str, pairs: Sequence[Pair]) -> np.ndarray:
    """The reference for every single input, where it has the first one's shape: maps of other sizes do not compare."""
    every = [row for _, _, outputs in pairs for row in outputs[name]]
    return np.stack([row for row in every if row.shape == every[0].shape])


def structural_faults(case: str, specs: Sequence[TensorSpec], reference: Arrays, outputs: Arrays) -> Iterator[str]:
    """Names, shapes, types and finiteness: what makes the numbers not worth comparing."""
    for spec in specs:
        if spec.name not in outputs:
            yield f"{case}: no output {spec.name!r}, the file has {', '.join(sorted(outputs))}"
            continue
        expected, found = reference[spec.name], outputs[spec.name]
        if not np.isfinite(expected).all():
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


def overall_status(results: Sequence[ParityResult]) -> str:
    """FAIL outweighs NOT-RUN, which outweighs PASS. No result at all is NOT-RUN."""
    statuses = {result.status for result in results}
    return FAIL if FAIL in statuses else NOT_RUN if NOT_RUN in statuses or not statuses else PASS


def summarise(results: Sequence[ParityResult]) -> Mapping[str, Any]:
    """The JSON document of `mvit-export verify --json`."""
    return {"status": overall_status(results), "artifacts": [result.to_json() for result in results]}
