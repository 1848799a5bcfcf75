"""The export itself: targets are planned, each is converted into a staged artifact directory, then verified."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mvit_export.artifact import GOLDEN, MANIFEST, Artifact, hash_files, read_artifact, save_golden, write_json
from mvit_export.checks import parity
from mvit_export.converters.capture import Conversion
from mvit_export.converters.golden import golden_vectors
from mvit_export.converters.jobs import Crew, Work, choose_jobs, do_in_turn, order_of, packages_of
from mvit_export.converters.manifest import describe_quantization, draft_manifest, file_metadata
from mvit_export.converters.reasons import explain
from mvit_export.data.calibration import Calibration, open_calibration
from mvit_export.errors import (
    ConversionError,
    MissingDependencyError,
    MvitExportError,
    PartialExportError,
    UsageError,
)
from mvit_export.families.forms import count_blocks, take_form
from mvit_export.families.load import rebuild_model
from mvit_export.families.table import family_of, titles
from mvit_export.formats.base import PLAIN
from mvit_export.formats.table import FULL
from mvit_export.formats.targets import (
    Target,
    check_installed,
    check_size_count,
    find_recipe,
    plan_targets,
    recipe_name,
)
from mvit_export.models.fold import fold_batch_norms
from mvit_export.models.loaded import LoadedModel
from mvit_export.results.parity import ParityResult
from mvit_export.results.status import worst_status
from mvit_export.system import trust
from mvit_export.system.files import NOT_UTF8, is_utf8
from mvit_export.system.limits import find_limit
from mvit_export.system.processes import no_collection
from mvit_export.system.staging import check_free, no_empty_folders, staged_directory
from mvit_export.tasks.classification import CLASSIFICATION

OnStep = Callable[[Target, str], None]
# What a converter raises about its own format. A full disk, little memory and a network that fails concern all.
OF_ONE_TARGET = (ConversionError, MissingDependencyError, UsageError)


@dataclass(frozen=True)
class ExportResult:
    """One artifact and the verdicts on it, one for each runtime; none if verification was not requested."""

    artifact: Artifact
    verdicts: tuple[ParityResult, ...]

    @property
    def parity(self) -> ParityResult | None:
        """The verdict that counts most: a failed one, then one that did not run, then a passed one."""
        worst = worst_status(verdict.status for verdict in self.verdicts)
        return next((verdict for verdict in self.verdicts if verdict.status == worst), None)


def export(
    model: LoadedModel,
    *,
    to: str | Sequence[str] = "all",
    precision: str | Sequence[str] | None = None,
    input: str = "tensor",
    opset: int | None = None,
    dynamic_batch: bool = False,
    ort: bool = False,
    deployment_target: str | None = None,
    recipe: str | Path | None = None,
    form: str | None = None,
    calibration: str | Path | None = None,
    calibration_method: str = "minmax",
    out: str | Path = "artifacts",
    overwrite: bool = False,
    verify: bool = True,
    jobs: int | None = 1,
    on_step: OnStep | None = None,
) -> tuple[ExportResult, ...]:
    """Write one artifact directory `out/NAME/FORMAT-PRECISION` per target, and check each against PyTorch.

    `to` is a format, a list of them or "all"; None for `precision` or `form` means each format's default. With `ort`,
    ONNX is written as an optimized `.ort` file.
    `on_step(target, step)` is called with "convert", "verify" and "done" or "failed" for progress. Raises subclasses of
    MvitExportError; a directory appears whole or not at all, and those finished before an error stay. If a converter
    gives up on one of several targets, the others are made all the same, and PartialExportError carries their results.

    `jobs` is how many targets are worked on at once, each in its own process, so the calling script needs
    `if __name__ == "__main__":`; None means as many as cores and memory allow. A model from a Python file allows 1.
    """
    if not isinstance(model, LoadedModel):
        raise UsageError(
            f"export() was given a {type(model).__name__}, expected what load_model() returns; "
            "call export(load_model(model=module, image_size=224))"
        )
    targets = plan_targets(
        to, precision=precision, input=input, opset=opset, dynamic_batch=dynamic_batch, ort=ort,
        deployment_target=deployment_target, recipe=None if recipe is None else recipe_name(recipe),
        form=form,
    )  # fmt: skip
    check_installed(targets)
    check_model_fits(model, targets)
    ranges = find_calibration(model, targets, calibration, calibration_method)
    recipes = {target: find_recipe(target, recipe) for target in targets}
    folder = Path(out) / model.info.name
    if not is_utf8(folder):
        raise UsageError(f"--out {folder.parent}: {NOT_UTF8}")
    for target in targets:
        check_free(folder / target.name, overwrite=overwrite)
    jobs = choose_jobs(jobs, model, targets)
    order = order_of(targets)
    with open_crew(model, [targets[index] for index in order[:jobs]]) as crew:  # it imports converters in the meantime
        if verify:  # a factory with different weights each time is reported now, not after the work
            rebuild_model(draft_manifest(model, targets[0], {}))
        folded = fold_batch_norms(model.module, torch.zeros(model.input_shapes[0]))
        works = []
        for target in targets:
            learned = ranges if not target.precision_row.full else None
            network, form_taken = choose_network(model, folded, target)
            conversion = Conversion(
                model, network, target, form=form_taken, recipe=recipes[target], calibration=learned
            )
            place = folder / target.name
            works.append(make_result(conversion, place, overwrite=overwrite, verify=verify, on_step=on_step))
        with no_empty_folders(folder):
            return all_made(targets, crew.do(works, order) if crew else do_in_turn(works))


def all_made(targets: Sequence[Target], outcomes: Sequence[Outcome]) -> tuple[ExportResult, ...]:
    """The results; if some are errors instead, PartialExportError carries both, and a single target's own is raised."""
    results = tuple(outcome for outcome in outcomes if isinstance(outcome, ExportResult))
    failures = {
        target.name: outcome
        for target, outcome in zip(targets, outcomes, strict=True)
        if isinstance(outcome, MvitExportError)
    }
    if not failures:
        return results
    if len(targets) == 1:
        raise next(iter(failures.values()))
    reasons = "; ".join(f"{name}: {error.without_advice}" for name, error in failures.items())
    raise PartialExportError(
        f"{len(failures)} of {len(targets)} targets failed, {', '.join(failures)}; {reasons}",
        results=results,
        failures=failures,
    )


def open_crew(model: LoadedModel, first: Sequence[Target]) -> AbstractContextManager[Crew | None]:
    """A process for each of the targets that start `first`; none for a single one, which runs in this process."""
    if len(first) < 2:
        return nullcontext()
    return Crew([packages_of(target) for target in first], family_of(model.info.source).prepare)


def check_model_fits(model: LoadedModel, targets: Sequence[Target]) -> None:
    """Refuse a model that does not fit one of the targets."""
    labels = (model.info.labels or ()) if model.info.task == CLASSIFICATION.name else ()
    check_size_count(targets, len(model.input_shapes))
    for target in targets:
        if target.input == "image" and model.preprocessing is None:
            raise UsageError("--input image needs a model that takes 3-channel images (B, 3, H, W); use --input tensor")
        batch = model.input_shapes[0][0]
        if target.input == "image" and target.row.one_image and batch != 1:
            raise UsageError(
                f"a {target.row.title} image input holds one image, the model's batch is {batch}; use --input tensor"
            )
        reserved = next((name for name in model.output_names if name in target.row.classifier_outputs), None)
        if labels and reserved:
            raise UsageError(
                f"output {reserved!r} has the name of one that a {target.row.title} classifier adds; rename it in the "
                "network, or leave out the labels"
            )
        if target.row.distinct_labels and len(set(labels)) != len(labels):
            twice = next(label for i, label in enumerate(labels) if label in labels[:i])
            raise UsageError(
                f"label {twice!r} appears twice, which a {target.row.title} classifier cannot tell apart; rename one"
            )


def choose_network(model: LoadedModel, folded: nn.Module, target: Target) -> tuple[nn.Module, str]:
    """The network in the requested or default form, and that form's name.

    A network without a MobileViT block to rewrite keeps its form, and so does one with several sizes, whose blocks are
    written for that. Raises UsageError if a requested form does not apply to every block.
    """
    form = target.form or target.default_form
    if target.form not in (None, PLAIN):
        check_form_fits(model, folded, form)
    batched = target.dynamic_batch or model.input_shapes[0][0] != 1
    taken = None
    if form != PLAIN and len(model.input_shapes) == 1:
        example = torch.rand(model.input_shapes[0], generator=torch.Generator().manual_seed(0))
        taken = take_form(folded, (target.format, form), example, batched=batched, names=model.output_names)
    return (folded, PLAIN) if taken is None else (taken, form)


def check_form_fits(model: LoadedModel, folded: nn.Module, form: str) -> None:
    """Raises UsageError if a requested form is not possible, or not for every MobileViT block."""
    standard, count = count_blocks(folded)
    blocks = f"{titles(having='forms')} blocks"
    if len(model.input_shapes) > 1:
        raise UsageError(f"--form {form} needs a single image size; leave it out")
    if count == 0:
        raise UsageError(f"--form {form} needs {blocks}, {model.info.name} has none; leave it out")
    if standard < count:
        raise UsageError(
            f"--form {form}: {count - standard} of {count} {blocks} have a part that was replaced, or a "
            "BatchNorm that could not be folded, and would keep their form; leave it out"
        )


def find_calibration(
    model: LoadedModel, targets: Sequence[Target], path: str | Path | None, method: str
) -> Calibration | None:
    """Open the calibration data of static targets and read it once, so that bad data is reported before any work.

    Other targets that lose bits need none; where it is given, they are checked on its pictures.
    """
    if path is not None and all(target.precision_row.full for target in targets):
        raise UsageError(f"--calibration is for precisions that lose bits, not for {', '.join(FULL)}; leave it out")
    if path is None and not any(target.precision_row.calibrated for target in targets):
        return None
    found = open_calibration(
        path, method=method, preprocessing=model.preprocessing, size=model.input_shapes[0][2:4],  # type: ignore[arg-type]
        trained=model.weights.trained,
    )  # fmt: skip
    found.check()
    return found


Outcome = ExportResult | MvitExportError


@dataclass(frozen=True)
class Convert:
    """One call of a converter; returns how the graph was captured. May run in another process."""

    conversion: Conversion
    file: Path

    def __call__(self) -> str:
        converter = importlib.import_module(self.conversion.target.row.converter)
        with conversion_errors(self.conversion), no_collection():
            capture: str = converter.convert(self.conversion, self.file)
        return capture


@dataclass(frozen=True)
class Judge:
    """The verdicts on a finished artifact, against the model rebuilt from its manifest. Writes nothing."""

    artifact: Artifact
    trusted: tuple[trust.Entry, ...]

    def __call__(self) -> list[ParityResult]:
        trust.remember(self.trusted)
        return parity.judge(self.artifact)


def make_result(
    conversion: Conversion, place: Path, *, overwrite: bool, verify: bool, on_step: OnStep | None
) -> Work[Outcome]:
    """All the work on one target: tasks that another process may do, and what this one does itself.

    An error that says nothing about other targets is returned, so that those are tried.
    """
    target, tell = conversion.target, on_step or (lambda *_: None)
    tell(target, "convert")
    try:
        artifact = yield from write_artifact(conversion, place, overwrite=overwrite)
    except OF_ONE_TARGET as error:
        tell(target, "failed")
        return error
    verdicts: list[ParityResult] = []
    if verify:
        tell(target, "verify")
        found = yield Judge(artifact, trust.remembered())
        verdicts = parity.store_verdicts(artifact, found)
    tell(target, "done")
    return ExportResult(artifact, tuple(verdicts))


def write_artifact(conversion: Conversion, place: Path, *, overwrite: bool) -> Work[Artifact]:
    """Convert, describe, hash and move into place. Only the converter's call is a task.

    The task does not get the model itself: it could not vouch for what it says about it (the manifest, the golden
    vectors).
    """
    model, target = conversion.model, conversion.target
    tools = {name: importlib.metadata.version(name) for name in target.packages}
    manifest = replace(
        draft_manifest(model, target, tools), quantization=describe_quantization(conversion), form=conversion.form
    )
    given = replace(conversion, model=replace(model, module=conversion.module), metadata=file_metadata(manifest))
    with staged_directory(place, overwrite=overwrite) as staging:
        capture = yield Convert(given, staging / (model.info.name + target.suffix))
        save_golden(staging / GOLDEN, golden_vectors(conversion, manifest))
        manifest = replace(manifest, capture=capture, files=hash_files(staging))
        write_json(staging / MANIFEST, manifest.to_json())
    return read_artifact(place)


@contextmanager
def conversion_errors(conversion: Conversion) -> Iterator[None]:
    """One line for whatever a converter raises. It may be the form that the converter cannot take."""
    try:
        yield
    except MvitExportError:
        raise
    except Exception as error:
        if limit := find_limit(error):
            raise limit from error
        target, formed = conversion.target, conversion.form != PLAIN and conversion.target.precision in FULL
        what = f"{target.row.title} {target.precision}: the converter failed"
        hint = f"; it may take --form {PLAIN}, this was {conversion.form}" if formed else ""
        raise ConversionError(f"{what}: {explain(error)}{hint}; -v shows more") from error
