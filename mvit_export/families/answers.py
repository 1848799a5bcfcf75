"""What a network answers, found by calling it: its task, output names, MACs and classes, and what its scores are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mvit_export.errors import ModelError, UsageError
from mvit_export.models.loaded import LoadedModel, call_guarded, check_repeats
from mvit_export.models.outputs import check_outputs, check_printable, describe_changes, name_outputs, read_labels
from mvit_export.tasks.classification import CLASSIFICATION, LOGITS, PROBABILITIES
from mvit_export.tasks.table import find_task
from mvit_export.tasks.unknown import UNKNOWN

if TYPE_CHECKING:
    from torch import Tensor

SUMS_TO_ONE = 1e-4  # how far the sum of float32 probabilities may be from 1
INDEPENDENT = "independent"  # answers of a sigmoid each, of which several or none may be near 1
STRONG = (100.0, -100.0)  # times noise: logits that lie in [0, 1] by chance leave it


def with_outputs(loaded: LoadedModel, labels: str | Path | Sequence[str] | None) -> LoadedModel:
    """Call the module once per shape, to see that it works at all, and on some noise."""
    returned, macs = run_shapes(loaded)
    named = name_outputs(returned)
    check_outputs(named)
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    task, info = find_task(loaded.info.task, shapes), loaded.info
    samples = run_samples(loaded, next(iter(named.values())))
    scores = kind_of_scores(samples) if task is CLASSIFICATION else None
    if scores == INDEPENDENT:
        task, info = UNKNOWN, replace(info, num_classes=None)
        if labels is not None or info.labels:
            raise UsageError(f"labels need scores of one class among several, but {ONE_BY_ONE}; export without labels")
    names = task.output_names if scores != PROBABILITIES else ("scores",)
    outputs = name_outputs(returned, names if len(names) == len(shapes) else None)
    check_outputs(outputs)
    classes = info.num_classes or task.count_classes(shapes)
    info = replace(
        info, task=task.name, num_classes=classes, macs=macs, scores=scores if scores == PROBABILITIES else None
    )
    if labels is not None:
        info = replace(info, labels=read_labels(labels, classes))
    check_printable(info.labels or (), "the checkpoint")
    notes = (*loaded.notes, *describe_changes(returned, outputs), *describe_scores(scores))
    return replace(loaded, info=info, output_names=tuple(outputs), notes=notes)


ONE_BY_ONE = "the outputs lie in [0, 1] without a sum of 1, as after a sigmoid"


def describe_scores(scores: str | None) -> Iterator[str]:
    """What is said of scores that are no logits."""
    if scores == PROBABILITIES:
        yield "the outputs are probabilities: no softmax is added, and KL and calibration take them as they are"
    elif scores == INDEPENDENT:
        yield f"{ONE_BY_ONE}: compared as numbers, not as scores of one class among several"


def run_shapes(loaded: LoadedModel) -> tuple[Any, int]:
    """What the module returns for zeros of its first shape, and its MACs there; it is called on every shape."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    for shape in reversed(loaded.input_shapes):  # the first shape last, so that its count is kept
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            returned = call_guarded(
                lambda: loaded.module(torch.zeros(shape)),  # noqa: B023 (called at once)
                f"the model, called on a float32 tensor {shape},",
            )
    return returned, counter.get_total_flops() // 2  # torch counts a multiply-add as two


def run_samples(loaded: LoadedModel, zeros: Tensor) -> list[np.ndarray]:
    """The first output for zeros, which is known, and for noise; for strong noise only if that says something new.

    Raises ModelError for a network that gives other outputs for the same input.
    """
    import torch

    noise = torch.rand(loaded.input_shapes[0], generator=torch.Generator().manual_seed(0))

    def run(amplitude: float) -> Mapping[str, np.ndarray]:
        with torch.no_grad():
            outputs = name_outputs(
                call_guarded(lambda: loaded.module(noise * amplitude), "the model, called on noise,")
            )
        return {name: tensor.float().numpy() for name, tensor in outputs.items()}

    first = run(1.0)
    check_repeats(first, run(1.0), loaded.info.name)
    samples = [zeros.float().numpy(), next(iter(first.values()))]
    if all(in_unit_range(sample) for sample in samples):
        with suppress(ModelError):  # a network may refuse what no picture holds
            samples += [next(iter(run(amplitude).values())) for amplitude in STRONG]
    return samples


def in_unit_range(scores: np.ndarray) -> bool:
    finite = scores[np.isfinite(scores)]
    return bool(((finite >= 0) & (finite <= 1)).all())


def kind_of_scores(samples: Sequence[np.ndarray]) -> str:
    """What scores (B, classes) are, by their values on several inputs: no module needs to say so."""
    finite = [sample for sample in samples if np.isfinite(sample).all()]
    if not finite or not all(in_unit_range(sample) for sample in finite):
        return LOGITS
    if all(np.abs(sample.sum(axis=1) - 1).max() <= SUMS_TO_ONE for sample in finite):
        return PROBABILITIES
    return LOGITS if all(np.ptp(sample) == 0 for sample in finite) else INDEPENDENT
