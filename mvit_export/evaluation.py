"""How right is a file on labelled pictures, and how far from its fp32 reference?

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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export import scoring
from mvit_export.artifact import Artifact, Manifest, find_artifacts, now, read_artifact, record_name, write_json
from mvit_export.cases import image_size
from mvit_export.errors import (
    ArtifactError,
    MissingDependencyError,
    MvitExportError,
    RuntimeUnavailable,
    UsageError,
    first_line,
)
from mvit_export.parity import FAIL, NOT_RUN, PASS, TOLERANCES
from mvit_export.pictures import FolderPictures, Labelled, Pictures, UnreadablePicture, open_labelled, spread
from mvit_export.preprocessing import Preprocessing, to_tensor
from mvit_export.processes import spread_over
from mvit_export.runtimes import Session, open_torch, openers

MEASURED = "measured"
PART = 16  # pictures that a process gets at a time
PART_TIMEOUT = 1800.0  # seconds; the Core ML executor takes a second a picture of a large network
TOOLS = ("mvit-export", "torch", "onnxruntime", "ai-edge-litert", "tflite-runtime", "coremltools", "numpy", "pillow")
FIGURES = (
    "top1", "top5", "ece", "agreement", "mean_kl", "mean_delta_p", "max_delta_p", "drop_points", "drop_interval",
    "images_per_s",
)  # fmt: skip

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
    """Score every artifact that `paths` mean on `data`, and write what was found to its accuracy.json.

    `data` is a folder with one folder a class, or a .npz with `images` and `labels`. `reference` is an artifact;
    without one it is the PyTorch model (`weights`: where its checkpoint is now, if it has moved). `limit` takes that
    many pictures, evenly over all. `max_drop` is how many points of top-1 may be lost against the reference: more
    fails. With `jobs` above 1 processes are started, so a script of yours needs `if __name__ == "__main__":`.

    The result is the document of `mvit-export eval --json`. Raises UsageError for data that does not fit, ArtifactError
    for a damaged artifact, WeightsError where the reference cannot be rebuilt.
    """
    check_numbers(limit, max_drop, jobs)
    labelled = open_labelled(data)
    given = [paths] if isinstance(paths, (str, Path)) else paths
    places = dict.fromkeys(place for path in given for place in find_artifacts(path))
    subjects = plan_subjects([read_artifact(place) for place in places], labelled, reference, weights)
    indices = spread(len(labelled.labels), limit)
    jobs = min(jobs, -(-len(indices) // PART))
    found = collect(subjects, labelled, indices, jobs, on_progress)
    report = make_report(subjects, found, labelled, indices, jobs)
    if max_drop is not None:
        for row in report["results"]:
            judge(row, max_drop)
    conclude(report)
    store(report)
    return report


def check_numbers(limit: int | None, max_drop: float | None, jobs: int) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}, expected at least 1 picture")
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise UsageError(f"--max-drop is {max_drop:g}, expected points of top-1 from 0 to 100, such as 1")
    if jobs < 1:
        raise UsageError(f"--jobs is {jobs}, expected at least 1 process")


# What is scored


@dataclass(frozen=True)
class Subject:
    """An artifact in its runtime, or, without one, the PyTorch model that `manifest` came from."""

    manifest: Manifest
    artifact: Artifact | None
    outputs: tuple[int, ...]  # the index among the model's outputs of each of the data's classes
    reference: int | None  # its place among the subjects; None for a reference
    weights: str | Path | None = None

    @property
    def name(self) -> str:
        size = "x".join(map(str, image_size(self.manifest.inputs[0].shape, self.manifest.inputs[0])))
        return str(self.artifact.path) if self.artifact else f"PyTorch {self.manifest.model.name} {size}"

    @property
    def preprocessing(self) -> Preprocessing:
        spec = self.manifest.inputs[0]
        assert self.manifest.preprocessing is not None
        return self.manifest.preprocessing.with_size(image_size(spec.shape, spec))

    @property
    def classes(self) -> dict[int, str]:
        return dict(enumerate(self.manifest.model.labels or ()))

    def open(self) -> Session:
        if self.artifact is not None:
            return openers(self.artifact)[0](self.artifact)
        from mvit_export.models.load import rebuild_model

        return open_torch(rebuild_model(self.manifest, weights=self.weights).module)


def plan_subjects(
    artifacts: Sequence[Artifact], data: Labelled, reference: str | Path | None, weights: str | Path | None
) -> list[Subject]:
    """The references, each followed by what is compared with it. Raises UsageError where data or models do not fit."""
    if reference is not None and weights is not None:
        raise UsageError("--weights is for the PyTorch reference, --reference names another; leave out one")
    fixed = read_reference(reference) if reference is not None else None
    subjects: list[Subject] = []
    known: dict[Any, int] = {}
    for artifact in artifacts:
        outputs = find_outputs(data, artifact.manifest)
        source = fixed or artifact
        if fixed is not None:
            check_comparable(artifact, fixed)
        origin = Subject(source.manifest, fixed, find_outputs(data, source.manifest), None, weights)
        model = source.manifest.model.source, source.manifest.weights.state_sha256
        key = fixed.path if fixed else (*model, origin.preprocessing, origin.outputs)
        if key not in known:
            known[key] = len(subjects)
            subjects.append(origin)
        subjects.append(Subject(artifact.manifest, artifact, outputs, known[key]))
    return subjects


def read_reference(path: str | Path) -> Artifact:
    places = find_artifacts(path)
    if len(places) > 1:
        raise UsageError(f"--reference {path} holds {len(places)} artifacts, expected one of them, such as {places[0]}")
    return read_artifact(places[0])


def check_comparable(artifact: Artifact, reference: Artifact) -> None:
    """Class i must be the same class in both."""
    mine, other = artifact.manifest, reference.manifest
    same_count = mine.outputs[0].shape[1:] == other.outputs[0].shape[1:]
    if not same_count or (mine.model.labels and other.model.labels and mine.model.labels != other.model.labels):
        raise UsageError(f"{artifact.path} has other classes than --reference {reference.path}; name one of its own")


def find_outputs(data: Labelled, manifest: Manifest) -> tuple[int, ...]:
    """The output of each class of the data: by name where both have names, else by position."""
    name, spec = manifest.model.name, manifest.outputs[0]
    if manifest.preprocessing is None:
        raise UsageError(f"{name} takes no pictures, expected a model with an RGB image as input")
    if len(spec.shape) != 2 or spec.shape[1] in (None, 1):
        shape = "x".join("any" if n is None else str(n) for n in spec.shape)
        raise UsageError(f"{name} gives {spec.name} of shape {shape}, expected class scores (B, classes)")
    count, most = int(spec.shape[1] or 0), int(data.labels.max())
    source, classes = data.pictures.source, data.classes
    if classes is not None and most >= len(classes):
        raise UsageError(f"{source}: label {most} has no name among its {len(classes)} classes; write them anew")
    if classes is not None and manifest.model.labels is not None:
        return find_names(classes, manifest.model.labels, source)
    if isinstance(data.pictures, FolderPictures) and len(classes or ()) != count:
        raise UsageError(
            f"{source} has {len(classes or ())} class folders, {name} gives {count} classes and has no labels to match "
            "them by name: export with --labels, or give all folders in the order of the classes"
        )
    if most >= count:
        raise UsageError(f"{source}: label {most} is no class of {name}, which gives {count}, numbered from 0")
    return tuple(range(most + 1))


def find_names(classes: Sequence[str], labels: Sequence[str], source: str) -> tuple[int, ...]:
    for name in classes:
        if labels.count(name) != 1:
            found = "stands twice" if name in labels else "does not stand"
            few = ", ".join(map(repr, labels[:3]))
            raise UsageError(
                f"{source}: class {name!r} {found} among the model's labels ({few}, …); rename one of them"
            )
    return tuple(labels.index(name) for name in classes)


# What a process does


@dataclass(frozen=True)
class Part:
    """Some of the pictures with their labels, as they are handed to a process."""

    pictures: Pictures
    labels: np.ndarray


@dataclass(frozen=True)
class Trouble:
    """Why a subject has no figures."""

    status: str  # not-run or fail
    reason: str


@dataclass(frozen=True)
class Scored:
    """One subject on one part."""

    scores: np.ndarray  # of scoring.SCORES
    seconds: float  # that the runtime took
    runtime: str


@dataclass(frozen=True)
class Outcome:
    """All subjects on one part."""

    results: tuple[Scored | Trouble, ...]
    digests: tuple[bytes, ...]
    skipped: tuple[str, ...]  # pictures that cannot be read


class Evaluator:
    """Holds every subject, ready to run, and scores parts."""

    def __init__(self, subjects: Sequence[Subject]) -> None:
        self.subjects = subjects
        self.sessions: list[Session | Trouble] = [open_subject(subject) for subject in subjects]

    def __call__(self, part: Part) -> Outcome:
        sizes = list(dict.fromkeys(subject.preprocessing for subject in self.subjects))
        shown: dict[Preprocessing, list[np.ndarray]] = {size: [] for size in sizes}
        kept, skipped, digests = [], [], []
        for index, label in enumerate(part.labels):
            try:
                views = [part.pictures.read(index, size) for size in sizes]
            except UnreadablePicture as error:
                skipped.append(str(error))
                continue
            kept.append(index)
            digests.append(hashlib.sha256(part.pictures.digest(index) + str(label).encode()).digest())
            for size, view in zip(sizes, views, strict=True):
                shown[size].append(view)
        with one_torch_thread():
            results = tuple(self.score(shown, part.labels[kept])) if kept else ()
        return Outcome(results, tuple(digests), tuple(skipped))

    def score(self, shown: Mapping[Preprocessing, list[np.ndarray]], labels: np.ndarray) -> Iterator[Scored | Trouble]:
        logits: list[np.ndarray | None] = []
        for index, subject in enumerate(self.subjects):
            session = self.sessions[index]
            base = logits[subject.reference] if subject.reference is not None else None
            logits.append(None)
            if isinstance(session, Trouble):
                yield session
            elif subject.reference is not None and base is None:
                reason = self.sessions[subject.reference].reason  # type: ignore[union-attr]
                yield Trouble(NOT_RUN, f"there is no reference to compare with: {reason}")
            else:
                found = run(subject, session, shown[subject.preprocessing])
                if isinstance(found, Trouble):
                    self.sessions[index] = found
                    yield found
                else:
                    logits[index], seconds = found
                    indices = np.asarray(subject.outputs)[labels]
                    yield Scored(scoring.score(found[0], indices, base), seconds, session.runtime)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """The cores are the processes' own, and pictures are too small to share among threads."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_subject(subject: Subject) -> Session | Trouble:
    try:
        return subject.open()
    except (RuntimeUnavailable, MissingDependencyError) as error:
        hint = "" if subject.artifact else "; --reference ARTIFACT takes another one"
        return Trouble(NOT_RUN, f"{error}{hint}")


def run(subject: Subject, session: Session, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, float] | Trouble:
    """((N, classes) scores, the seconds that the runtime took)."""
    spec, name = subject.manifest.inputs[0], subject.manifest.outputs[0].name
    batch, rows, seconds = spec.shape[0] or 1, [], 0.0
    for start in range(0, len(pictures), batch):
        members = list(pictures[start : start + batch])
        array = np.stack([*members, *[members[-1]] * (batch - len(members))])  # the last one fills a fixed batch
        as_picture = subject.artifact is not None and spec.layout == "NHWC"
        array = array if as_picture else to_tensor(array, subject.preprocessing)
        begun = time.perf_counter()
        try:
            output = session.run(array)[name]
        except MvitExportError:
            raise
        except Exception as error:  # each runtime has its own exception types; a run that fails is a failed check
            return Trouble(FAIL, f"the runtime failed: {first_line(error)}")
        seconds += time.perf_counter() - begun
        rows.append(output[: len(members)])
    logits = np.concatenate(rows)
    if logits.shape != (len(pictures), subject.manifest.outputs[0].shape[1]):
        return Trouble(FAIL, f"{name} has shape {rows[0].shape}, the manifest says {subject.manifest.outputs[0].shape}")
    return logits, seconds


# What is made of it


@dataclass
class Found:
    """Everything that the processes gave, by part."""

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
        """One subject over all parts; trouble on one of them is trouble on the whole."""
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
    """Score everything. Raises UsageError where no picture at all can be read."""
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


def make_report(
    subjects: Sequence[Subject], found: Found, data: Labelled, indices: Sequence[int], jobs: int
) -> dict[str, Any]:
    """The document, before it is judged."""
    scored = [found.subject(index) for index in range(len(subjects))]
    references, results = [], []
    for subject, result in zip(subjects, scored, strict=True):
        if subject.reference is None:
            references.append(reference_row(subject, result, jobs))
            continue
        base = subjects[subject.reference]
        results.append(result_row(subject, result, base, scored[subject.reference], jobs))
    return {
        "status": PASS,
        "environment": describe_environment(jobs) | {"data": describe_data(found, data, indices)},
        "references": references,
        "results": results,
    }


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
    """`sha256` is that of the pictures as they are stored, with their classes, in order: equal data, equal digest."""
    digest = hashlib.sha256()
    for stored in itertools.chain.from_iterable(outcome.digests for outcome in found.ordered):
        digest.update(stored)
    return {
        "source": data.pictures.source, "images": found.count, "of": len(data.labels), "asked": len(indices),
        "skipped": len(found.skipped), "first_skipped": found.skipped[0] if found.skipped else None,
        "classes": len(data.classes) if data.classes else int(data.labels.max()) + 1, "sha256": digest.hexdigest(),
    }  # fmt: skip


def reference_row(subject: Subject, result: Scored | Trouble, jobs: int) -> dict[str, Any]:
    row = {"name": subject.name, **dict.fromkeys(("runtime", "top1", "top5", "ece", "images_per_s"))}
    if isinstance(result, Trouble):
        return row | {"status": result.status, "reason": result.reason}
    figures = scoring.accuracy(result.scores) | {"images_per_s": throughput(result, jobs)}
    return row | {"status": MEASURED, "reason": "", "runtime": result.runtime} | figures


def result_row(
    subject: Subject, result: Scored | Trouble, base: Subject, base_result: Scored | Trouble, jobs: int
) -> dict[str, Any]:
    manifest, artifact = subject.manifest, subject.artifact
    assert artifact is not None
    row: dict[str, Any] = {
        "path": str(artifact.path), "model": manifest.model.name, "variant": manifest.model.variant,
        "format": manifest.format, "precision": manifest.precision, "status": MEASURED, "reason": "", "runtime": None,
        "reference": base.name, "images": 0, **dict.fromkeys(FIGURES), "per_class": [], "most_confused": [],
        "gate": None, "warnings": [],
    }  # fmt: skip
    if isinstance(result, Trouble):
        return row | {"status": result.status, "reason": result.reason}
    assert isinstance(base_result, Scored)
    drop, interval = scoring.paired_drop(base_result.scores, result.scores)
    row |= scoring.accuracy(result.scores) | scoring.comparison(result.scores)
    row |= {"images": len(result.scores), "runtime": result.runtime, "images_per_s": throughput(result, jobs)}
    row |= {"drop_points": drop, "drop_interval": list(interval)}
    row["per_class"] = scoring.per_class(result.scores, subject.classes)
    row["most_confused"] = scoring.most_confused(result.scores, subject.classes)
    row["warnings"] = list(find_warnings(row, manifest, result.scores))
    return row


def throughput(result: Scored, jobs: int) -> float:
    """Pictures a second of all processes together, by the time that the runtime took; a latency takes `bench`."""
    return len(result.scores) / result.seconds * jobs


def find_warnings(row: Mapping[str, Any], manifest: Manifest, scores: np.ndarray) -> Iterator[str]:
    """What the figures do not say by themselves."""
    if manifest.weights.trained is False:
        yield f"the weights are untrained (seed {manifest.weights.seed}): top-1 says nothing, agreement does"
    if broken := int((scores["predicted"] < 0).sum()):
        yield f"{broken} pictures gave NaN or Inf, which counts as wrong"
    tolerance = TOLERANCES[manifest.format, manifest.precision]
    bounds = {
        "mean KL": (row["mean_kl"], tolerance.kl if tolerance.mean_kl is None else tolerance.mean_kl),
        "mean change of the top class's probability": (row["mean_delta_p"], tolerance.delta_p),
    }
    for words, (value, limit) in bounds.items():
        if value is not None and limit is not None and value > limit:
            yield (
                f"confidence has moved away from the reference: {words} {value:.2g}, at most {limit:g} expected of "
                f"{manifest.precision}, however many answers agree"
            )


def judge(row: dict[str, Any], max_drop: float) -> None:
    """Fail a row that lost more than `max_drop` points, as measured; the interval says how sure that is."""
    if row["status"] != MEASURED:
        return
    lost, (low, high) = row["drop_points"], row["drop_interval"]
    reason = f"{lost:.2f} points of top-1 lost [{low:.2f}, {high:.2f}], at most {max_drop:g} allowed"
    if low <= max_drop < high:
        reason += f"; the interval holds the limit: more pictures than {row['images']} would tell"
    row["gate"] = {"max_drop": max_drop, "status": FAIL if lost > max_drop else PASS, "reason": reason}


def conclude(report: dict[str, Any]) -> None:
    """The status of the whole: FAIL outweighs NOT-RUN, which outweighs PASS."""
    states = {row["status"] for row in report["results"]} | {
        row["gate"]["status"] for row in report["results"] if row["gate"]
    }
    report["status"] = FAIL if FAIL in states else NOT_RUN if NOT_RUN in states else PASS


def store(report: dict[str, Any]) -> None:
    """Write each artifact's row to its accuracy.json; a read-only artifact is scored all the same and says so."""
    for row in report["results"]:
        own = {**report, "references": [r for r in report["references"] if r["name"] == row["reference"]]}
        own["results"] = [row]
        conclude(own)
        try:
            write_json(Path(row["path"]) / record_name("accuracy"), own)
        except ArtifactError as error:
            row["warnings"].append(str(error))
