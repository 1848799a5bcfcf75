"""What one process of `eval` does: hold every subject, ready to run, and score parts of the pictures."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from mvit_export.checks.subjects import Subject, scoring_of
from mvit_export.data.pictures import Pictures, UnreadablePicture
from mvit_export.data.preprocessing import Preprocessing, to_tensor
from mvit_export.errors import MissingDependencyError, MvitExportError, RuntimeUnavailable, first_line
from mvit_export.readers.session import Session
from mvit_export.results.status import FAIL, NOT_RUN


@dataclass(frozen=True)
class Part:
    """Some of the pictures with their labels, as given to a process."""

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

    scores: np.ndarray  # one row per picture, as the task's scoring makes it
    seconds: float  # spent in the runtime
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
        outputs: list[np.ndarray | None] = []
        for index, subject in enumerate(self.subjects):
            session = self.sessions[index]
            base = outputs[subject.reference] if subject.reference is not None else None
            outputs.append(None)
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
                    outputs[index], seconds = found
                    scoring, own_labels = scoring_of(subject.manifest), np.asarray(subject.outputs)[labels]
                    yield Scored(scoring.score(found[0], own_labels, base), seconds, session.runtime)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """The processes share the cores, and pictures are too small to split among threads."""
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
        hint = "" if subject.artifact else "; choose another with --reference ARTIFACT"
        return Trouble(NOT_RUN, f"{error}{hint}")


def run(subject: Subject, session: Session, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, float] | Trouble:
    """(The first output of N pictures, (N, …); the seconds spent in the runtime)."""
    spec, expected = subject.manifest.inputs[0], subject.manifest.outputs[0]
    batch, parts, seconds = spec.shape[0] or 1, [], 0.0
    for start in range(0, len(pictures), batch):
        members = list(pictures[start : start + batch])
        array = np.stack([*members, *[members[-1]] * (batch - len(members))])  # the last one fills up a fixed batch
        array = arrange(array, subject)
        begun = time.perf_counter()
        try:
            output = session.run(array)[expected.name]
        except MvitExportError:
            raise
        except Exception as error:  # each runtime has its own exception types; a run that fails is a failed check
            return Trouble(FAIL, f"the runtime failed: {first_line(error)}")
        seconds += time.perf_counter() - begun
        parts.append(output[: len(members)])
    found = np.concatenate(parts)
    if len(found) != len(pictures) or not fits(found.shape[1:], expected.shape[1:]):
        return Trouble(FAIL, f"{expected.name} has shape {parts[0].shape}, the manifest says {expected.shape}")
    return found, seconds


def arrange(pictures: np.ndarray, subject: Subject) -> np.ndarray:
    """uint8 RGB (B, H, W, 3) as the subject takes it: a file may have its preprocessing inside."""
    as_picture = subject.artifact is not None and subject.manifest.inputs[0].layout == "NHWC"
    return pictures if as_picture else to_tensor(pictures, subject.preprocessing)


def fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    """None stands for any length."""
    return len(shape) == len(expected) and all(b in (a, None) for a, b in zip(shape, expected, strict=True))
