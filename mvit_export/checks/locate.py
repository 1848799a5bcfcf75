"""Where does a saved file leave the PyTorch model? The first layer whose output differs, by its module path.

The reference runs with a hook on every module, in the form that the file was written in; the file's own tensors come
from `layers.py`. A module's output is searched for among the file's tensors of that module, in any usual layout. A
file need not have all of them: what a converter fused or dissolved is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mvit_export.artifact import Artifact
from mvit_export.checks.inputs import cases_of, flat_case
from mvit_export.checks.layers import Intermediate, read_intermediates
from mvit_export.checks.reference_layers import Call, ancestors, record
from mvit_export.formats.base import PLAIN
from mvit_export.results.parity import Located

FADING = 10  # how much better than a layer its successors must match to show that it is right


@dataclass(frozen=True, eq=False)
class Check:
    """The file's tensor that is nearest to one output of the reference."""

    call: Call
    paths: tuple[str, ...]  # of the modules whose tensors were examined
    found: Intermediate
    error: float  # inf for NaN or Inf


def comparable(calls: Sequence[Call]) -> Iterator[tuple[Call, tuple[str, ...]]]:
    """The calls whose outputs are informative, with the modules whose tensors may hold them.

    A BatchNorm is folded into the layer before it: that layer's tensors hold the norm's output, and the layer's own
    output does not exist. A constant would match by chance.
    """
    known = {call.node for call in calls}
    norms = [node for node in ancestors(known) if "BatchNorm" in type(node).__name__ and node in known]
    before = {norm: norm.next_functions[0][0] for norm in norms}
    layers = {call.node: call.module for call in reversed(calls)}
    for call in calls:
        if call.node in before.values() or not np.isfinite(call.output).all() or np.ptp(call.output) == 0:
            continue
        layer = layers.get(before.get(call.node))
        yield call, (call.module,) if layer is None else (call.module, layer)


def nearest(call: Call, paths: tuple[str, ...], intermediates: Sequence[Intermediate], max_rel: float) -> Check | None:
    """The best match among the file's tensors of these modules; None if none has this size.

    If none matches, the nearest is so by chance; the last one that belongs to the fewest modules is taken instead.
    """
    checks = [
        Check(call, paths, item, distance(call.output, item.tensor))
        for item in intermediates
        if item.tensor.size == call.output.size and any(belongs(item, path) for path in paths)
    ]
    best = min(checks, key=lambda check: check.error, default=None)
    if best is None or best.error <= max_rel:
        return best
    return min(reversed(checks), key=lambda check: len(check.found.modules))


def belongs(item: Intermediate, path: str) -> bool:
    """Whether a tensor was made by this module or inside it; the network, "", contains everything."""
    return not path or any(module == path or module.startswith(f"{path}.") for module in item.modules)


def distance(reference: np.ndarray, tensor: np.ndarray) -> float:
    """Largest difference over the largest reference value, in the best-fitting layout; inf for NaN or Inf."""
    flat, scale = tensor.astype(np.float32).ravel(), float(np.abs(reference).max())
    if not np.isfinite(flat).all():
        return math.inf
    return min(float(np.abs(form.ravel() - flat).max()) / scale for form in layouts(reference))


def layouts(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array as it is, with channels last instead of first, and with channels first instead of last."""
    yield array
    if array.ndim > 2:
        yield np.moveaxis(array, 1, -1)
        yield np.moveaxis(array, -1, 1)


def first_divergence(
    calls: Sequence[Call], intermediates: Sequence[Intermediate], max_rel: float, *, passed: bool = False
) -> Located | None:
    """The verdict on one run; None if nothing could be compared. In a file that passed, no layer is at fault."""
    outcomes = [(call, nearest(call, paths, intermediates, max_rel)) for call, paths in comparable(calls)]
    checks = [check for _, check in outcomes if check]
    right = [check for check in checks if check.error <= max_rel]
    wrong = [check for check in checks if check.error > max_rel and not is_excused(check, right)]
    if wrong and not passed:
        return describe_fault(wrong, outcomes, right, intermediates)
    return describe(max(right, key=lambda check: check.error)) if right else None


def is_excused(wrong: Check, right: Sequence[Check]) -> bool:
    """Whether a layer computed from this one matches: then a converter only moved a scale or a shift between ops.

    It must match far better than this one, since a real fault also fades when a large residual is added to it.
    """
    return wrong.call.node in ancestors(c.call.node for c in right if c.error * FADING <= wrong.error)


def describe_fault(
    wrong: Sequence[Check],
    outcomes: Sequence[tuple[Call, Check | None]],
    right: Sequence[Check],
    intermediates: Sequence[Intermediate],
) -> Located:
    """The first wrong layer, or one just before it that has no tensor in the file."""
    first, after = wrong[0], next((check for check in wrong[1:] if check.call.leaf), None)
    passed = outcomes[: [call for call, _ in outcomes].index(first.call)]
    matched = [(i, check.error) for i, (_, check) in enumerate(passed) if check and check in right]
    last, before = matched[-1] if matched else (-1, 0.0)
    found = replace(describe(first), diverges=True, error_before=before)
    sources = ancestors([first.call.node])
    hidden = [call for call, check in passed[last + 1 :] if check is None and call.leaf and call.node in sources]
    if hidden:
        return replace(found, module=hidden[0].module, seen_in=found.module)
    if after and are_fused(first, after, intermediates):
        found = replace(describe(after), diverges=True, error_before=before, fused_with=after.call.module)
        return replace(found, module=first.call.module)
    return found


def are_fused(first: Check, second: Check, intermediates: Sequence[Intermediate]) -> bool:
    """Whether an op of the file belongs to both layers, so that the output of the first does not exist."""
    both = [set(check.paths) for check in (first, second)]
    return both[0].isdisjoint(both[1]) and any(all(paths & {*item.modules} for paths in both) for item in intermediates)


def describe(check: Check) -> Located:
    """The record of a layer that does not diverge."""
    error = check.error if math.isfinite(check.error) else None
    return Located(check.call.module, check.found.op, check.found.op_type, None, error, diverges=False)


def locate(
    artifact: Artifact, *, case: str, max_rel: float, passed: bool, weights: str | Path | None = None
) -> Located | None:
    """Compare the file's layers with those of the rebuilt PyTorch model on one of the parity check's inputs.

    Layers differ beyond `max_rel`. None if the file names no tensor's module and its output has another shape.
    Raises what `rebuild_model` raises, and ArtifactError if the file does not expose its tensors.
    """
    from mvit_export.families.load import rebuild_model

    manifest = artifact.manifest
    network = rebuild_model(manifest, weights=weights).module
    if manifest.form != PLAIN:
        from mvit_export.families.forms import write_as

        network = write_as(network, manifest)
    known = {item.name: item for item in cases_of(artifact)}
    chosen = known.get(case) or flat_case(case, manifest)
    recorder = record(network, chosen.model_input)
    intermediates = read_intermediates(artifact, chosen.artifact_input, recorder.chains)
    found = first_divergence(recorder.calls, intermediates, max_rel, passed=passed)
    return None if found is None else replace(found, case=case)
