"""Is the file on disk the same function as the PyTorch model it came from?

The saved file runs in the runtime of its format; the reference is the unmodified PyTorch model, rebuilt from its
weights, or the golden vectors that the export stored (`against="golden"`: no torch needed). First shapes, types,
finiteness and labels are compared, then the numbers, against one table of tolerances.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mvit_export.artifact import (
    GOLDEN,
    Artifact,
    Manifest,
    find_artifacts,
    load_golden,
    read_artifact,
    read_manifest,
    record_name,
    write_json,
)
from mvit_export.checks.comparison import (
    Outcome,
    constant_reference,
    describe_labels,
    describe_noise,
    find_worst,
    judge_outcomes,
    run_cases,
)
from mvit_export.checks.flat import BLACK, WHITE, name_of, weakest_colour
from mvit_export.checks.inputs import Case, cases_of, flat_case
from mvit_export.checks.locate import locate
from mvit_export.checks.reference import FLOAT32_PREFIX, Pair, Reference
from mvit_export.errors import ArtifactError, RuntimeUnavailable, UsageError
from mvit_export.formats.base import SAME_ARITHMETIC
from mvit_export.readers.session import Session, openers
from mvit_export.results.fields import MOST
from mvit_export.results.parity import ParityReport, ParityResult
from mvit_export.results.status import FAIL, NOT_RUN, PASS
from mvit_export.tasks.table import task_of

if TYPE_CHECKING:
    from mvit_export.models.loaded import LoadedModel

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
    known = functools.cache(lambda: _references(artifact, against, weights))  # computed once, and if a runtime works
    return [_verify_in(opener, artifact, against, known, on_case) for opener in sessions(artifact)]


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
    known: Callable[[], References],
    on_case: Callable[[int, int], None] | None,
) -> ParityResult:
    """Run the artifact in one runtime and judge it."""
    manifest = artifact.manifest
    tolerance = manifest.target.precision_row.tolerance
    blank = ParityResult(
        str(artifact.path), manifest.format, manifest.precision, NOT_RUN, "", None, against, 0, None, tolerance
    )
    try:
        session = opener(artifact)
    except RuntimeUnavailable as error:
        return replace(blank, reason=str(error))
    if constant := constant_reference(known().pairs):
        return replace(blank, reason=constant, runtime=session.runtime)
    outcomes = run_cases(manifest, session.run, known().pairs, on_case)
    return _verdict(blank, manifest, session, known(), outcomes)


def _verdict(
    blank: ParityResult, manifest: Manifest, session: Session, known: References, outcomes: Sequence[Outcome]
) -> ParityResult:
    """The verdict on what a runtime computed."""
    judged = judge_outcomes(outcomes, manifest.target.precision_row.tolerance, task_of(manifest))
    reasons, worst_case = judged.reasons, find_worst(outcomes, judged)
    if session.labels != manifest.model.labels:
        reasons = [describe_labels(manifest.model.labels, session.labels), *reasons]
    overflow = None
    if reasons and session.overflow and manifest.precision == "fp16" and not worst_case.broken:
        overflow = session.overflow(next(pair.array for pair in known.pairs if pair.case == worst_case.case))
    own = [outcome.float32.max_rel for outcome in outcomes if outcome.float32]
    return replace(
        blank,
        status=FAIL if reasons else PASS,
        reason="; ".join([*reasons, *([str(overflow)] if overflow else [])]),
        runtime=session.runtime,
        inputs=len(known.pairs),
        metrics=judged.metrics,
        note="" if reasons else "; ".join(filter(None, (session.note, known.note, describe_noise(judged)))),
        worst_case=None if worst_case.broken else worst_case.case,
        overflow=overflow,
        reference_dtype=known.dtype,
        float32_max_rel=min(max(own), MOST) if own else None,
        noisy_inputs=judged.noisy_inputs,
    )


def with_location(result: ParityResult, artifact: Artifact, weights: str | Path | None) -> ParityResult:
    """The verdict with the first layer that differs, unless no run finished."""
    if result.worst_case is None:
        return result
    limit, passed = artifact.manifest.target.precision_row.tolerance.max_rel, result.status == PASS
    found = locate(artifact, case=result.worst_case, max_rel=limit, passed=passed, weights=weights)
    return replace(result, located=found)


@dataclass(frozen=True)
class References:
    """The inputs with their reference; `dtype` is what PyTorch computed in, None for golden vectors, `note` why so."""

    pairs: Sequence[Pair]
    dtype: str | None = None
    note: str = ""


def _references(artifact: Artifact, against: str, weights: str | Path | None) -> References:
    return References(_golden_pairs(artifact)) if against == "golden" else _torch_references(artifact, weights)


def _golden_pairs(artifact: Artifact) -> list[Pair]:
    name, pairs = artifact.manifest.inputs[0].name, []
    for case, tensors in load_golden(artifact).items():
        own = {key: tensors.pop(key) for key in [*tensors] if key.startswith(FLOAT32_PREFIX)}
        float32 = {key.removeprefix(FLOAT32_PREFIX): array for key, array in own.items()}
        for output in artifact.manifest.output_names if float32 else ():
            if output not in float32 or float32[output].shape != tensors[output].shape:
                raise ArtifactError(f"{artifact.path / GOLDEN}: {case!r} has other float32 outputs; export again")
        pairs.append(Pair(case, tensors.pop(name), tensors, float32 or None))
    return pairs


def _torch_references(artifact: Artifact, weights: str | Path | None) -> References:
    from mvit_export.families.load import rebuild_model

    model = rebuild_model(artifact.manifest, weights=weights)
    reference = Reference(model, task_of(artifact.manifest))
    cases = [*cases_of(artifact), *weakest_cases(model, artifact.manifest)]
    pairs = [reference.answer(case.name, case.artifact_input, case.model_input) for case in cases]
    note = f"the reference is float32, the network does not run in float64: {reference.reason}"
    return References(pairs, reference.dtype, note if reference.reason else "")


def weakest_cases(model: LoadedModel, manifest: Manifest) -> list[Case]:
    """The flat picture that shows a wrong eps, where the bounds are narrow enough to see it and no other is as flat."""
    if manifest.preprocessing is None or manifest.target.precision_row.tolerance != SAME_ARITHMETIC:
        return []
    colour = weakest_colour(model.module, manifest.preprocessing, manifest.inputs[0].shape[0] or 1)
    return [] if colour in (None, BLACK, WHITE) else [flat_case(name_of(colour), manifest)]
