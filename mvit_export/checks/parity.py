"""Is the file on disk the same function as the PyTorch model it came from?

The saved file runs in the runtime of its format; the reference is the unmodified PyTorch model, rebuilt from its
weights, or the golden vectors that the export stored (`against="golden"`: no torch needed). First shapes, types,
finiteness and labels are compared, then the numbers, against one table of tolerances.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

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
from mvit_export.checks.figures import FLOAT32_UNIT, measure, violations, worst
from mvit_export.checks.inputs import cases_of
from mvit_export.checks.locate import locate
from mvit_export.errors import ArtifactError, MvitExportError, RuntimeUnavailable, UsageError, first_line
from mvit_export.readers.session import Arrays, Session, open_torch, openers
from mvit_export.results.parity import Metrics, ParityReport, ParityResult
from mvit_export.results.status import FAIL, NOT_RUN, PASS
from mvit_export.tasks.base import Task
from mvit_export.tasks.table import task_of

REFERENCES = ("pytorch", "golden")
Openers = Callable[[Artifact], Sequence[Callable[[Artifact], Session]]]


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
    """Check every artifact that `path` refers to and write the verdicts to its parity.json.

    There is one result for each artifact and runtime: a Core ML package on macOS is checked by Core ML and by the
    reference executor, elsewhere only by the latter.

    `against` is "pytorch" (the model rebuilt from its weights; `weights` if they have moved) or "golden" (the stored
    vectors; needs only numpy, safetensors and the runtime). `find_layer` also names the first layer at which a file
    differs from PyTorch. `on_case(done, total)` is called to report progress.
    `sessions` opens an artifact's runtimes if they are not this machine's own; `device` names where they are, and the
    verdict then goes to a separate file, `record_name`.
    Raises ArtifactError, WeightsError or UsageError if the check itself is impossible.
    """
    if against not in REFERENCES:
        raise UsageError(f"--against is {against!r}, expected one of {', '.join(REFERENCES)}")
    if weights is not None and against == "golden":
        raise UsageError("--weights has no use with --against golden, which reads only the stored vectors")
    if find_layer and against == "golden":
        raise UsageError("--locate compares with PyTorch's layers, which --against golden does without; leave out one")
    if find_layer and device != "local":
        raise UsageError("--locate looks into files with the runtimes of this machine; leave out --device")
    places = find_artifacts(path)
    if find_layer:
        check_layers(places)
    for place in places:
        with suppress(OSError):  # an old verdict must not survive a check that ends in an error
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
    """Refuse files whose layers are fused for good before checking any. The check itself reports damaged ones."""
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
    """The verdict of each runtime on one artifact, as `verify` does, but not stored: that is left to the caller."""
    pairs = functools.cache(lambda: _pairs(artifact, against, weights))  # computed once, and only if a runtime works
    return [_verify_in(opener, artifact, against, pairs, on_case) for opener in sessions(artifact)]


def store_verdicts(artifact: Artifact, verdicts: list[ParityResult]) -> list[ParityResult]:
    """Write the verdicts beside the model; for a read-only artifact they say that they were not stored."""
    try:
        write_json(artifact.path / record_name("parity", verdicts[0].device), ParityReport(tuple(verdicts)).to_json())
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
    tolerance, task = manifest.target.precision_row.tolerance, task_of(manifest)
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
    reasons, metrics = summarise_cases(outcomes, task)
    worst_case = find_worst(outcomes)
    if session.labels != manifest.model.labels:
        reasons.insert(0, describe_labels(manifest.model.labels, session.labels))
    if not reasons and metrics is not None:
        reasons = violations(metrics, tolerance, task)
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
    """The verdict with the first layer that differs, unless no run finished."""
    if result.worst_case is None:
        return result
    limit, passed = artifact.manifest.target.precision_row.tolerance.max_rel, result.status == PASS
    found = locate(artifact, case=result.worst_case, max_rel=limit, passed=passed, weights=weights)
    return replace(result, located=found)


def _pairs(artifact: Artifact, against: str, weights: str | Path | None) -> Sequence[Pair]:
    return _golden_pairs(artifact) if against == "golden" else _reference_pairs(artifact, weights)


Pair = tuple[str, np.ndarray, Arrays]  # case name, the artifact's input, the reference outputs


def _golden_pairs(artifact: Artifact) -> list[Pair]:
    name = artifact.manifest.inputs[0].name
    return [(case, tensors.pop(name), tensors) for case, tensors in load_golden(artifact).items()]


def _reference_pairs(artifact: Artifact, weights: str | Path | None) -> list[Pair]:
    from mvit_export.families.load import rebuild_model

    reference = open_torch(rebuild_model(artifact.manifest, weights=weights))
    cases = cases_of(artifact)
    return [(case.name, case.artifact_input, reference.run(case.model_input)) for case in cases]


@dataclass(frozen=True)
class Outcome:
    """The result on one input: faults or metrics; `broken` if the runtime did not finish its run."""

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
    """Run the inputs, stopping at the first that breaks the runtime."""
    outcomes: list[Outcome] = []
    task = task_of(manifest)
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
            measure(reference[spec.name], outputs[spec.name], task, spread=spreads[spec.name])
            for spec in manifest.outputs
            if not faults
        ]
        outcomes.append(Outcome(case, faults, worst(measured, task) if measured else None))
        if on_case:
            on_case(done, len(pairs))
    return outcomes


def summarise_cases(outcomes: Sequence[Outcome], task: Task) -> tuple[list[str], Metrics | None]:
    """The first faults, and the worst of the metrics."""
    measured = [outcome.metrics for outcome in outcomes if outcome.metrics]
    return [fault for outcome in outcomes for fault in outcome.faults][:3], worst(measured, task) if measured else None


def find_worst(outcomes: Sequence[Outcome]) -> Outcome:
    """The first input with a fault, or else the one with the largest error."""
    faulty = [outcome for outcome in outcomes if outcome.faults]
    return faulty[0] if faulty else max(outcomes, key=lambda outcome: outcome.metrics.max_rel if outcome.metrics else 0)


def constant_reference(pairs: Sequence[Pair]) -> str | None:
    """Why a comparison would prove nothing: the reference ignores its input, as an untrained zero head does."""
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
    """The reference for each input that has the first one's shape: maps of other sizes cannot be compared."""
    every = [row for _, _, outputs in pairs for row in outputs[name]]
    return np.stack([row for row in every if row.shape == every[0].shape])


def structural_faults(case: str, specs: Sequence[TensorSpec], reference: Arrays, outputs: Arrays) -> Iterator[str]:
    """Faults in names, shapes, types and finiteness, which make comparing the numbers pointless."""
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
