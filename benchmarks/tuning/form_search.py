"""`mvit-export tune --latency`: the form in which a MobileViT is fastest, found by measuring where it will run.

All forms are the same function (`families/mobilevit/forms`); no table says which one a runtime runs fastest on a
processor.

1. The artifact's own form is proven, here and on the device.
2. Every other form of its format is exported with the artifact's own model, weights and options, and proven likewise.
   A form that does not apply to this model is left out, with its reason; one that is not proven is not timed.
3. All are timed in one interleaved run, against the artifact as it is.
4. Its form stays unless the whole interval of another's ratio lies below 1; of several, the smallest ratio wins.

The artifact is not touched before the last step, which puts the kept form in its place whole or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mvit_export import export
from mvit_export.artifact import MANIFEST, Artifact, find_artifacts, now, read_artifact, record_name, write_json
from mvit_export.benchmarks.devices.base import FileRefused
from mvit_export.benchmarks.devices.sessions import checked_on
from mvit_export.benchmarks.devices.table import open_device
from mvit_export.benchmarks.harness.baseline import MACHINE
from mvit_export.benchmarks.harness.bench import Options, run_bench
from mvit_export.benchmarks.harness.configurations import check_runtime, plan_settings
from mvit_export.benchmarks.harness.timing import FEWEST_ROUNDS, Plan
from mvit_export.checks.parity import verify
from mvit_export.errors import ArtifactError, ConversionError, DeviceError, UsageError, printable
from mvit_export.families.load import load_like
from mvit_export.formats.choices import split_list
from mvit_export.formats.table import FORMATS, FULL
from mvit_export.formats.targets import Target
from mvit_export.models.loaded import LoadedModel
from mvit_export.results.latency import LatencyReport, Measurement, Ratio
from mvit_export.results.parity import ParityResult
from mvit_export.results.status import MEASURED, NOT_RUN, PASS, worst_status
from mvit_export.system.reading import RECORDS, read_json
from mvit_export.system.staging import check_free, scratch_directory, staged_directory

LEFT_OUT = "left-out"
PRECISION = 0.01  # of medians and ratios: forms differ by a few per cent, which bench's 2 % would not tell apart
TRIAL_S = 0.1  # seconds; to find out whether a runtime accepts a file at all
Step = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """Where and how the forms are timed; `python` and `binary` as `open_device` takes them."""

    device: str = "local"
    python: str | None = None
    binary: Path | None = None
    runtime: str | None = None  # None: the format's own
    threads: int = 1
    budget_s: float = 30.0  # of each form


@dataclass(frozen=True)
class Tried:
    """What became of one form: PASS once it is proven and timed, else why not, in words."""

    form: str
    status: str  # PASS, FAIL, NOT_RUN or LEFT_OUT
    reason: str = ""
    path: Path | None = None  # in the scratch folder; None if there is no file
    bytes: int | None = None
    checks: tuple[ParityResult, ...] = ()
    row: Measurement | None = None  # bench's

    @property
    def ratio(self) -> Ratio | None:
        """Its time over that of the artifact's own form, from the same rounds; None for that form itself."""
        return replace(self.row.ratio, to=None) if self.row and self.row.ratio else None

    @property
    def psnr_db(self) -> float | None:
        """Of the worst check."""
        return min((check.metrics.psnr_db for check in self.checks if check.metrics), default=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "form": self.form, "status": self.status, "reason": self.reason,
            "parity": worst_status(check.status for check in self.checks) if self.checks else None,
            "psnr_db": self.psnr_db,
            "ratio": self.ratio.to_json() if self.ratio else None,
            "median_ms": self.row.median_ms if self.row else None, "bytes": self.bytes,
        }  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The outcome. `tried` starts with the artifact's own form; `kept` is None if nothing could be compared."""

    base: Artifact
    setup: Setup
    tried: tuple[Tried, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)
    kept: Tried | None = None
    place: Path | None = None  # of the artifact that was written

    @property
    def status(self) -> str:
        """A form that is broken is a failed check, one that could not be proven or timed is NOT-RUN."""
        return worst_status(tried.status for tried in self.tried)

    @property
    def runtime(self) -> str | None:
        """The runtime's own name and version, if it ran."""
        row = self.tried[0].row
        return row.runtime if row else self.setup.runtime

    def record(self) -> dict[str, Any]:
        """What the manifest of the kept artifact says about its choice."""
        return {
            "created": now(),
            "device": self.environment.get("device", self.setup.device),
            "machine": {name: self.environment.get(name) for name in MACHINE},
            "runtime": self.runtime,
            "threads": self.setup.threads,
            "reference": self.base.manifest.form,  # what the ratios are to
            "forms": [tried.to_json() for tried in self.tried],
        }

    def to_json(self) -> dict[str, Any]:
        """The document of `tune --latency --json`."""
        forms = [
            tried.to_json() | {"path": self.path_of(tried), "checks": [brief(check) for check in tried.checks]}
            for tried in self.tried
        ]
        return {
            "status": self.status, "artifact": str(self.base.path), "chosen": self.kept.form if self.kept else None,
            "path": str(self.place) if self.place else None, **self.record(), "forms": forms,
        }  # fmt: skip

    def path_of(self, tried: Tried) -> str | None:
        """Where a form lies now: the candidates' files are gone, and so is what was replaced."""
        if tried is self.kept:
            return str(self.place)
        stays = tried is self.tried[0] and self.place != self.base.path
        return str(self.base.path) if stays else None


def brief(check: ParityResult) -> dict[str, Any]:
    metrics = check.metrics
    figures = {name: getattr(metrics, name) if metrics else None for name in ("psnr_db", "max_rel")}
    return {"device": check.device, "runtime": check.runtime, "status": check.status, "reason": check.reason} | figures


def tune_forms(
    path: Path,
    *,
    setup: Setup | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    on_step: Step = lambda _: None,
) -> Choice:
    """Try every form of the artifact `path`, and write the fastest one with a record of the choice in its manifest.

    It goes to `out`; without one, to the artifact's own place with `overwrite`, else beside it under `NAME-tuned`.
    If the artifact itself is not proven or cannot be timed, nothing is written. Raises MvitExportError.
    """
    setup = setup or Setup()
    base = open_base(path)
    check_setup(setup, base)
    place = choose_place(base.path, out, overwrite=overwrite)
    with scratch_directory(place) as scratch:
        with proving(setup, on_step) as prove:
            tried = prove_forms(base, scratch, prove, on_step)
        tried, environment = time_forms(tried, setup, on_step)
        choice = Choice(base, setup, tried, environment, kept=choose(tried), place=place)
        if choice.kept is None:
            return replace(choice, place=None)
        on_step(f"writing {place}")
        keep(choice, place, overwrite=overwrite)
    return choice


# What can be asked


def open_base(path: Path) -> Artifact:
    """Raises UsageError unless `path` is one artifact whose form can be chosen."""
    place, *others = find_artifacts(path)
    if others:
        raise UsageError(f"tune --latency starts from one artifact, {path} holds {1 + len(others)}")
    base = read_artifact(place)
    if base.manifest.precision not in FULL:
        precisions = " and ".join(FULL)
        raise UsageError(
            f"tune --latency is for {precisions}, whose form can be chosen; {path} is {base.manifest.precision}"
        )
    return base


def check_setup(setup: Setup, base: Artifact) -> None:
    """Refuse before any work what the harness would refuse after it."""
    device = open_device(setup.device, python=setup.python, binary=setup.binary)
    if device.latency_refusal:
        raise DeviceError(device.latency_refusal)
    if setup.runtime is not None:
        if len(split_list(setup.runtime)) != 1:
            raise UsageError(f"--runtime is {setup.runtime!r}, tune --latency takes one")
        if check_runtime(setup.runtime) == "pytorch":
            raise UsageError("--runtime pytorch does not run the exported file, so all forms are the same there")
    plan_settings([base], runtimes=runtimes_of(setup), threads=(setup.threads,))


def runtimes_of(setup: Setup) -> tuple[str, ...]:
    return split_list(setup.runtime or ())


def choose_place(base: Path, out: Path | None, *, overwrite: bool) -> Path:
    """Where the kept form goes. Raises ArtifactError if that may not be written."""
    own = base if base.name not in ("", "..") else base.resolve()  # as when the shell is inside it
    place = out or (own if overwrite else own.with_name(f"{own.name}-tuned"))
    if out is None and not overwrite and place.exists():
        raise ArtifactError(f"{place} exists; pass another --out, or --overwrite to replace {own} itself")
    check_free(place, overwrite=overwrite)
    return place


# Proving


Prove = Callable[[Path], tuple[ParityResult, ...]]


@contextmanager
def proving(setup: Setup, on_step: Step) -> Iterator[Prove]:
    """A function that verifies a file where it will be timed, and here. The device stays open meanwhile."""

    def verify_in(path: Path, **elsewhere: Any) -> tuple[ParityResult, ...]:
        where = elsewhere.get("device", "local")
        return verify(
            path, on_case=lambda done, total: on_step(f"verify {path.name} on {where}: {done} of {total}"), **elsewhere
        )

    device = open_device(setup.device, python=setup.python, binary=setup.binary)
    if device.here:
        yield verify_in
        return
    with device:
        yield lambda path: (*verify_in(path, **checked_on(device)), *verify_in(path))


def prove_forms(base: Artifact, scratch: Path, prove: Prove, on_step: Step) -> tuple[Tried, ...]:
    """The artifact's own form, as it is; then, if that one is proven, all others of its format."""
    manifest = base.manifest
    copy = scratch / "own" / base.path.resolve().name
    shutil.copytree(base.path, copy)
    own = judge(manifest.form, copy, prove)
    if own.status != PASS:
        return (own,)
    on_step("loading the model")
    model = load_like(base.path)
    others = [form for form in FORMATS[manifest.format].forms if form != manifest.form]
    return own, *(try_form(form, model, manifest.target, scratch, prove, on_step) for form in others)


def try_form(form: str, model: LoadedModel, target: Target, scratch: Path, prove: Prove, on_step: Step) -> Tried:
    """Export the form as `target` was, and prove it."""
    on_step(f"convert {form}")
    try:
        (made,) = export(
            model, to=target.format, precision=target.precision, input=target.input, opset=target.opset,
            dynamic_batch=target.dynamic_batch, ort=target.ort, deployment_target=target.deployment_target, form=form,
            out=scratch / "others", verify=False,
        )  # fmt: skip
    except UsageError as error:
        return Tried(form, LEFT_OUT, printable(error.without_advice, 300))
    except ConversionError as error:  # it applies, but cannot be made
        return Tried(form, NOT_RUN, printable(error.without_advice, 300))
    return judge(form, made.artifact.path, prove)


def judge(form: str, path: Path, prove: Prove) -> Tried:
    checks = prove(path)
    status = worst_status(check.status for check in checks)
    reason = next((check.reason for check in checks if check.status == status), "")
    return Tried(form, status, reason, path, read_artifact(path).model_bytes, checks)


# Timing


def time_forms(tried: Sequence[Tried], setup: Setup, on_step: Step) -> tuple[tuple[Tried, ...], Mapping[str, Any]]:
    """The forms, the proven ones with their rows; and what the harness says about the machine.

    Raises ArtifactError if the runtime does not accept the artifact's own form.
    """
    if tried[0].status != PASS:
        return tuple(tried), {}
    try:
        report = bench(tried, setup, on_step)
    except FileRefused:  # a delegate may accept only some forms: which?
        tried = [with_refusal(one, setup, on_step) for one in tried]
        if tried[0].status != PASS:
            raise
        report = bench(tried, setup, on_step)
    rows = iter(report.results)
    return tuple(with_row(one, next(rows)) if one.status == PASS else one for one in tried), report.environment


def bench(tried: Sequence[Tried], setup: Setup, on_step: Step) -> LatencyReport:
    """One interleaved run of the proven forms; ratios are to the first. A row for each, in their order."""
    return run_bench(
        [one.path for one in tried if one.status == PASS and one.path],
        runtimes=runtimes_of(setup),
        threads=(setup.threads,),
        device=setup.device,
        device_python=setup.python,
        options=Options(Plan(budget_s=setup.budget_s, precision=PRECISION), roofline=False, binary=setup.binary),
        on_step=on_step,
    )


def with_refusal(one: Tried, setup: Setup, on_step: Step) -> Tried:
    """Left out, with the runtime's reason, if it does not accept this file."""
    if one.status != PASS:
        return one
    try:
        bench([one], replace(setup, budget_s=TRIAL_S), on_step)
    except FileRefused as error:
        return replace(one, status=LEFT_OUT, reason=f"{one.form} {error.path.name} {error.reason}")
    return one


def with_row(one: Tried, row: Measurement) -> Tried:
    """NOT-RUN if the harness has no figure, or one that means nothing yet."""
    if row.status != MEASURED:
        return replace(one, status=NOT_RUN, reason=row.reason)
    if (row.rounds or 0) < FEWEST_ROUNDS:
        reason = f"{row.rounds} rounds in the time budget are too few for an interval; give a longer --budget"
        return replace(one, status=NOT_RUN, reason=reason)
    return replace(one, row=row)


def choose(tried: Sequence[Tried]) -> Tried | None:
    """The artifact's own form, the first, unless others are shown to be faster; None if that one has no figure."""
    own, *others = tried
    if own.row is None:
        return None
    faster = {one.ratio.median: one for one in others if one.ratio and one.ratio.interval[1] < 1}
    return faster[min(faster)] if faster else own


# Keeping


def keep(choice: Choice, place: Path, *, overwrite: bool) -> None:
    """Put the chosen form at `place`: its file, hashes, golden vectors and verdicts, and the record of the choice."""
    assert choice.kept and choice.kept.path
    source = choice.kept.path
    manifest = replace(read_artifact(source).manifest, tuning=choice.record())
    with staged_directory(place, overwrite=overwrite) as staging:
        shutil.copytree(source, staging, dirs_exist_ok=True)
        write_json(staging / MANIFEST, manifest.to_json())
        for name in fresh_records(choice.kept):
            settle_record(staging / name, place, choice.base.manifest.form)
    read_artifact(place)


def fresh_records(kept: Tried) -> list[str]:
    """The records made in this run, under the path that the file had meanwhile."""
    assert kept.row
    return [*(record_name("parity", check.device) for check in kept.checks), record_name("latency", kept.row.device)]


def settle_record(file: Path, place: Path, reference: str) -> None:
    """Put the artifact's own place into a record, and say in words what its ratio was to: that file is gone."""
    if not file.exists():  # a full disk keeps no record, which the verdict's note says
        return
    record = read_json(file, RECORDS)
    for row in record.get("artifacts") or record["results"]:
        row["path"] = str(place)
        if row.get("ratio"):
            row["ratio"]["to"] = f"its form {reference}"
    write_json(file, record)
