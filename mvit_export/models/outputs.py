"""What a model returns: its tensors by name, and the labels of its classes."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvit_export.errors import ModelError, UsageError, reason_of
from mvit_export.system.reading import read_text

if TYPE_CHECKING:
    from torch import Tensor


# Words of MIL, the language of Core ML files, which name no value there.
RESERVED = {
    "any", "bool", "program", "func", "tensor", "list", "dict", "tuple", "true", "false", "string", "state",
    "bf16", "fp16", "fp32", "fp64",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
}  # fmt: skip


def name_outputs(outputs: Any, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """What a module returned -> {name: tensor}, in the names that files have.

    A mapping or dataclass keeps its names, made valid for every format; its entries that are None are left out. `names`
    are for other tensors, in order; without them these are output_0, output_1, … Raises ModelError for anything else,
    and for a wrong count.
    """
    named = by_own_name(outputs)
    if named is not None:
        check_tensors(outputs, named)
        # An artifact of an earlier version has the names as they are.
        own = list(named) if names is not None and list(names) == list(named) else valid_names(list(named))
        return dict(zip(own, named.values(), strict=True))
    values = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
    check_tensors(outputs, dict(enumerate(values)))
    names = names or [f"output_{i}" for i in range(len(values))]
    if len(names) != len(values):
        raise ModelError(f"the model returned {len(values)} tensors, expected {len(names)}: {', '.join(names)}")
    return dict(zip(names, values, strict=True))


def by_own_name(outputs: Any) -> dict[str, Any] | None:
    """What has names of its own, without what is None: a mapping, transformers' too, or a dataclass."""
    if is_dataclass(outputs) and not isinstance(outputs, (Mapping, type)):
        outputs = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    if not isinstance(outputs, Mapping):
        return None
    return {str(key): value for key, value in outputs.items() if value is not None}


def valid_names(names: Sequence[str]) -> list[str]:
    """Names of ASCII letters, digits and underscores that begin with no digit, which every format takes as they are.

    "cls-logits" -> "cls_logits", "0" -> "output_0", "state" -> "output_state". Of two that become the same, the second
    gets a number.
    """
    found: list[str] = []
    for name in names:
        valid = re.sub(r"[^A-Za-z0-9_]", "_", name)
        if valid in RESERVED or re.match(r"[A-Za-z_]", valid) is None:
            valid = f"output_{valid}".rstrip("_")
        # One that is valid as it is keeps its name.
        taken = {*found, *(other for other in names if other != name)}
        numbers = (f"{valid}_{number}" for number in itertools.count(2))
        found.append(valid if valid not in taken else next(each for each in numbers if each not in taken))
    return found


def describe_changes(outputs: Any, named: Mapping[str, Tensor]) -> tuple[str, ...]:
    """A line for each output that files have under another name or in another type than the network."""
    own = by_own_name(outputs)
    renamed = [(old, new) for old, new in zip(own or (), named, strict=False) if old != new]
    lines = [f"output {old!r} is called {new} in the files" for old, new in renamed]
    for name, tensor in named.items():
        if (kind := str(tensor.dtype).removeprefix("torch.")) != "float32":
            lines.append(f"output {name!r} is {kind} in the network and float32 in the files")
    return tuple(lines)


def check_tensors(outputs: Any, elements: Mapping[Any, Any]) -> None:
    """Raises ModelError that names the first element which is no tensor."""
    from torch import Tensor

    kind, expected = type(outputs).__name__, "expected a tensor, or tuple or dict of tensors"
    if (
        not isinstance(outputs, (Mapping, tuple, list))
        and not is_dataclass(outputs)
        and not isinstance(outputs, Tensor)
    ):
        raise ModelError(f"the model returned {kind}, {expected}")
    if not elements:
        raise ModelError(f"the model returned an empty {kind}, {expected}")
    for key, value in elements.items():
        if not isinstance(value, Tensor):
            found = "None" if value is None else f"a {type(value).__name__}"
            raise ModelError(
                f"the model returned a {kind} whose element {key!r} is {found}, expected tensors alone; return what "
                "the files shall hold, without it"
            )


def check_outputs(outputs: Mapping[str, Tensor]) -> None:
    """Refuse what a comparison of numbers cannot judge (integers, booleans, scalars), and the input's name."""
    for name, tensor in outputs.items():
        if odd := odd_kind(tensor):
            raise ModelError(
                f"output {name!r} is a {odd} tensor, expected a dense one on the CPU; convert it in forward"
            )
        if not tensor.is_floating_point() or tensor.ndim == 0:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"output {name!r} is {kind} of shape {list(tensor.shape)}, expected floats with a batch axis"
            )
        if name == "image":
            raise ModelError("an output is named 'image' like the input; rename it")


def odd_kind(tensor: Tensor) -> str:
    """What makes a tensor one that has no plain numbers: "sparse", "nested", "meta"; empty for a usual one."""
    if tensor.is_nested:
        return "nested"
    if not str(tensor.layout).endswith("strided"):
        return "sparse" if "sparse" in str(tensor.layout) else str(tensor.layout).removeprefix("torch.")
    return tensor.device.type if tensor.device.type != "cpu" else ""


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
