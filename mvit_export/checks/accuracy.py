"""How accurate is a file on labelled pictures, and how far is it from its fp32 reference?

All artifacts see the same pictures, each through its own preprocessing. The reference is the PyTorch model rebuilt from
its weights, or an artifact that the user names. Pictures are streamed in small parts, over several processes if asked.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.artifact import find_artifacts, now, read_artifact, record_name, write_json
from mvit_export.checks.evaluator import Evaluator, Outcome, Part, Scored, Trouble
from mvit_export.checks.subjects import Subject, plan_subjects, scoring_of
from mvit_export.data.pictures import Labelled, open_labelled, spread
from mvit_export.data.preprocessing import UNSTATED, describe_unstated
from mvit_export.errors import ArtifactError, UsageError
from mvit_export.results.accuracy import AccuracyReport, ArtifactAccuracy, Gate, ReferenceAccuracy
from mvit_export.results.status import FAIL, MEASURED, PASS
from mvit_export.system.processes import spread_over

PART = 16  # pictures that a process gets at a time
PART_TIMEOUT = 1800.0  # seconds; the Core ML executor takes a second per picture on a large network
TOOLS = ("mvit-export", "torch", "onnxruntime", "ai-edge-litert", "tflite-runtime", "coremltools", "numpy", "pillow")

Progress = Callable[[int, int], None]


def evaluate(
    paths: str | Path | Sequence[str | Path],
    *,
    data: str | Path,
    reference: str | Path | None = None,
    weights: str | Path | None = None,
    limit: int | None = None,
    max_drop: float | None = None,
    jobs: int = 1,
    on_progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Score every artifact that `paths` refer to on `data`, and write the results to its accuracy.json.

    `data` is a folder with one folder per class, or a .npz with `images` and `labels`. `reference` is an artifact;
    without one it is the PyTorch model (`weights`: where its checkpoint is now, if it has moved). `limit` uses that
    many pictures, spread evenly. `max_drop` is how many points of top-1 may be lost against the reference: more fails.
    With `jobs` above 1 processes are started, so your script needs `if __name__ == "__main__":`.

    The result is the document of `mvit-export eval --json`. Raises UsageError for data that does not fit, ArtifactError
    for a damaged artifact, WeightsError if the reference cannot be rebuilt.
    """
    check_numbers(limit, max_drop, jobs)
    labelled = open_labelled(data)
    given = [paths] if isinstance(paths, (str, Path)) else paths
    places = dict.fromkeys(place for path in given for place in find_artifacts(path))
    subjects = plan_subjects([read_artifact(place) for place in places], labelled, reference, weights)
    indices = spread(len(labelled.labels), limit)
    jobs = min(jobs, -(-len(indices) // PART))
    found = collect(subjects, labelled, indices, jobs, on_progress)
    report = make_report(
        subjects, found, describe_environment(jobs) | {"data": describe_data(found, labelled, indices)}
    )
    if max_drop is not None:
        report = report.with_results(judge(row, max_drop) for row in report.results)
    return store(report).to_json()


def check_numbers(limit: int | None, max_drop: float | None, jobs: int) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}, expected at least 1 picture")
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise UsageError(f"--max-drop is {max_drop:g}, expected points of top-1 from 0 to 100, such as 1")
    if jobs < 1:
        raise UsageError(f"--jobs is {jobs}, expected at least 1 process")


# From the results to the document


@dataclass
class Found:
    """Everything that the processes returned, by part."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)

    @property
    def ordered(self) -> list[Outcome]:
        return [self.outcomes[index] for index in sorted(self.outcomes)]

    @property
    def skipped(self) -> list[str]:
        return [text for outcome in self.ordered for text in outcome.skipped]

    @property
    def count(self) -> int:
        return sum(len(outcome.digests) for outcome in self.ordered)

    def subject(self, index: int) -> Scored | Trouble:
        """One subject over all parts; trouble with one part is trouble with the whole."""
        results = [outcome.results[index] for outcome in self.ordered if outcome.results]
        for result in results:
            if isinstance(result, Trouble):
                return result
        parts = [result for result in results if isinstance(result, Scored)]
        scores = np.concatenate([part.scores for part in parts])
        return Scored(scores, sum(part.seconds for part in parts), parts[0].runtime)


def collect(
    subjects: Sequence[Subject], data: Labelled, indices: Sequence[int], jobs: int, on_progress: Progress
) -> Found:
    """Score everything. Raises UsageError if no picture can be read."""
    make = functools.partial(Evaluator, subjects)
    parts = (indices[start : start + PART] for start in range(0, len(indices), PART))
    tasks = (Part(data.pictures.take(part), data.labels[list(part)]) for part in parts)
    found, done = Found(), 0
    on_progress(0, len(indices))
    with closing(spread_over(make, tasks, jobs=jobs, timeout=PART_TIMEOUT)) as results:
        for index, outcome in results:
            found.outcomes[index] = outcome
            done += len(outcome.digests) + len(outcome.skipped)
            on_progress(done, len(indices))
    if not found.count:
        raise UsageError(f"{data.pictures.source}: none of its pictures can be read, the first: {found.skipped[0]}")
    return found


def make_report(subjects: Sequence[Subject], found: Found, environment: dict[str, Any]) -> AccuracyReport:
    """The document, before it is judged."""
    jobs = environment["processes"]
    scored = [found.subject(index) for index in range(len(subjects))]
    references, results = [], []
    for subject, result in zip(subjects, scored, strict=True):
        if subject.reference is None:
            references.append(describe_reference(subject, result, jobs))
        else:
            base = subjects[subject.reference].name, scored[subject.reference]
            results.append(describe_artifact(subject, result, *base, jobs))
    return AccuracyReport.of(environment, references, results)


def describe_environment(jobs: int) -> dict[str, Any]:
    tools = {}
    for name in TOOLS:
        with suppress(importlib.metadata.PackageNotFoundError):
            tools[name] = importlib.metadata.version(name)
    return {
        "created": now(), "system": f"{platform.system()} {platform.release()}", "machine": platform.machine(),
        "python": ".".join(map(str, sys.version_info[:3])), "processes": jobs, "tools": tools,
    }  # fmt: skip


def describe_data(found: Found, data: Labelled, indices: Sequence[int]) -> dict[str, Any]:
    """`sha256` covers the stored pictures with their classes, in order: equal data, equal digest."""
    digest = hashlib.sha256()
    for stored in itertools.chain.from_iterable(outcome.digests for outcome in found.ordered):
        digest.update(stored)
    return {
        "source": data.pictures.source, "images": found.count, "of": len(data.labels), "asked": len(indices),
        "skipped": len(found.skipped), "first_skipped": found.skipped[0] if found.skipped else None,
        "classes": len(data.classes) if data.classes else int(data.labels.max()) + 1, "sha256": digest.hexdigest(),
    }  # fmt: skip


def describe_reference(subject: Subject, result: Scored | Trouble, jobs: int) -> ReferenceAccuracy:
    if isinstance(result, Trouble):
        return ReferenceAccuracy(subject.name, status=result.status, reason=result.reason)
    figures = scoring_of(subject.manifest).accuracy(result.scores)
    return ReferenceAccuracy(subject.name, result.runtime, **figures, images_per_s=throughput(result, jobs))


def describe_artifact(
    subject: Subject, result: Scored | Trouble, base: str, base_result: Scored | Trouble, jobs: int
) -> ArtifactAccuracy:
    manifest, artifact = subject.manifest, subject.artifact
    assert artifact is not None
    row = ArtifactAccuracy(
        path=str(artifact.path), model=manifest.model.name, variant=manifest.model.variant, format=manifest.format,
        precision=manifest.precision, reference=base,
    )  # fmt: skip
    if isinstance(result, Trouble):
        return replace(row, status=result.status, reason=result.reason)
    assert isinstance(base_result, Scored)
    scoring = scoring_of(manifest)
    figures = scoring.compare(base_result.scores, result.scores, subject.classes)
    warnings = list(scoring.find_warnings(result.scores, figures, manifest))
    if manifest.weights.trained is False:
        warnings.insert(
            0, f"the weights are untrained (seed {manifest.weights.seed}): top-1 says nothing, agreement does"
        )
    if subject.preprocessing.source == UNSTATED:
        warnings.append(describe_unstated(subject.preprocessing))
    measured = replace(row, images=len(result.scores), runtime=result.runtime, images_per_s=throughput(result, jobs))
    return replace(measured, **figures, warnings=tuple(warnings))


def throughput(result: Scored, jobs: int) -> float:
    """Pictures per second of all processes together, by the time spent in the runtime; for latency use `bench`."""
    return len(result.scores) / result.seconds * jobs


def judge(row: ArtifactAccuracy, max_drop: float) -> ArtifactAccuracy:
    """Add a gate, which fails if more than `max_drop` points are lost, as measured; the interval says how sure."""
    if row.status != MEASURED:
        return row
    assert row.drop_points is not None and row.drop_interval is not None
    lost, (low, high) = row.drop_points, row.drop_interval
    reason = f"{lost:.2f} points of top-1 lost [{low:.2f}, {high:.2f}], at most {max_drop:g} allowed"
    if low <= max_drop < high:
        reason += f"; the interval contains the limit: more than {row.images} pictures are needed to tell"
    return replace(row, gate=Gate(max_drop, FAIL if lost > max_drop else PASS, reason))


def store(report: AccuracyReport) -> AccuracyReport:
    """Write each artifact's row to its accuracy.json; a read-only artifact is scored anyway and says so."""
    return report.with_results([store_row(report, row) for row in report.results])


def store_row(report: AccuracyReport, row: ArtifactAccuracy) -> ArtifactAccuracy:
    references = [reference for reference in report.references if reference.name == row.reference]
    own = AccuracyReport.of(report.environment, references, [row])
    try:
        write_json(Path(row.path) / record_name("accuracy"), own.to_json())
    except ArtifactError as error:
        return replace(row, warnings=(*row.warnings, str(error)))
    return row
