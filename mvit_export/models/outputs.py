"""What a model returns: its tensors by name, and the labels of its classes."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvit_export.errors import ModelError, UsageError, reason_of
from mvit_export.system.reading import read_text

if TYPE_CHECKING:
    from torch import Tensor


def name_outputs(outputs: Any, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """What a module returned -> {name: tensor}. A mapping keeps its keys; `names` are for other tensors, in order.

    Without `names` they are output_0, output_1, … Raises ModelError for anything else, and for a wrong count.
    """
    from torch import Tensor

    if isinstance(outputs, Mapping):
        named = {str(key): value for key, value in outputs.items() if value is not None}
    elif isinstance(outputs, (Tensor, tuple, list)):
        values = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        names = names or [f"output_{i}" for i in range(len(values))]
        if len(names) != len(values):
            raise ModelError(f"the model returned {len(values)} tensors, expected {len(names)}: {', '.join(names)}")
        named = dict(zip(names, values, strict=True))
    else:
        named = {}
    if not named or not all(isinstance(value, Tensor) for value in named.values()):
        raise ModelError(f"the model returned {type(outputs).__name__}, expected a tensor, or tuple or dict of tensors")
    return named


def check_outputs(outputs: Mapping[str, Tensor]) -> None:
    """Refuse what a comparison of numbers cannot judge (integers, booleans, scalars), and the input's name."""
    for name, tensor in outputs.items():
        if not tensor.is_floating_point() or tensor.ndim == 0:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"output {name!r} is {kind} of shape {list(tensor.shape)}, expected floats with a batch axis"
            )
        if name == "image":
            raise ModelError("an output is named 'image' like the input; rename it")


def read_labels(labels: str | Path | Sequence[str], num_classes: int | None) -> tuple[str, ...]:
    """Class labels, one per line in a UTF-8 text file or given as a list, in the order of the logits."""
    if isinstance(labels, (str, Path)):
        where = str(labels)
        try:
            names = tuple(line.strip() for line in read_text(labels, encoding="utf-8-sig").rstrip().splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{where} cannot be read as labels ({reason_of(error)}), expected UTF-8 text, one per line"
            ) from error
    else:
        where, names = "labels", tuple(labels)
        check_text(names)
    if num_classes is None:
        raise UsageError("--labels needs a classifier with one output of shape (batch, classes); this model is not one")
    if len(names) != num_classes:
        raise UsageError(f"{where} holds {len(names)} labels, the model has {num_classes} classes")
    if "" in names:
        raise UsageError(f"{where} has an empty label at line {names.index('') + 1}")
    check_printable(names, where)
    return names


def check_text(labels: Sequence[object]) -> None:
    """Labels given from Python must be what a file could hold: text without spaces around it. Raises UsageError."""
    for number, label in enumerate(labels, 1):
        if not isinstance(label, str):
            raise UsageError(f"label {number} is {label!r} ({type(label).__name__}), expected text")
        if label != label.strip():
            raise UsageError(f"label {number} is {label!r}, expected no spaces or line breaks around it; strip it")


def check_printable(labels: Sequence[str], where: str) -> None:
    """Files hold a label a line, in UTF-8. Raises UsageError for control characters, line breaks and surrogates."""
    for number, label in enumerate(labels, 1):
        if any(c != "\t" and unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in label):
            raise UsageError(f"{where}: label {number} is {label!r}, expected text on one line; rename it")


def distinguish(labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Number repeated labels (ImageNet has two "crane"), which a Core ML classifier could not tell apart."""
    if labels is None:
        return None
    return tuple(f"{label} ({i})" if label in labels[:i] else label for i, label in enumerate(labels))
