"""A checkpoint's tensors must be exactly those of a network: every name, shape and kind of number, all finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mvit_export.errors import WeightsError
from mvit_export.models.checkpoints import Checkpoint, blame
from mvit_export.models.prefixes import COUNTER


def fit(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    hint: Callable[[str], str | None] = lambda key: None,
    unchecked: frozenset[str] = frozenset(),
) -> dict[str, Tensor]:
    """Copies of `state`'s tensors in the dtypes of `expected`; names and shapes must match.

    `hint` may give a better message for a key of the wrong shape; keys in `unchecked` may hold NaN and Inf.
    """
    result = {}
    for key, want in expected.items():
        if key in state:
            check_kind(key, state[key], want, hint)
            result[key] = state[key].detach().to(want.dtype, copy=True).contiguous()
        elif key.endswith(COUNTER):
            result[key] = torch.zeros(want.shape, dtype=want.dtype)
        else:
            raise WeightsError(missing(key, want))
    extra = next((key for key in state if key not in expected), None)
    if extra is not None:
        raise WeightsError(
            f"{extra} {tuple(state[extra].shape)} is in the checkpoint, but the network has no such weight"
        )
    for key, tensor in result.items():
        bad = 0 if key in unchecked else int((~torch.isfinite(tensor)).sum())
        if bad:
            raise WeightsError(f"{key} has {bad} NaN or Inf of {tensor.numel()} values, expected finite weights")
    return result


def check_kind(key: str, found: Tensor, want: Tensor, hint: Callable[[str], str | None]) -> None:
    if found.shape != want.shape:
        plain = f"{key} has shape {tuple(found.shape)}, expected {tuple(want.shape)}"
        raise WeightsError(hint(key) or plain)
    if want.is_floating_point() and not found.is_floating_point():
        raise WeightsError(f"{key} has dtype {found.dtype}, expected floating point: export it unquantized")


def missing(key: str, want: Tensor) -> str:
    if "classifier" in key or key.startswith("head.fc."):
        why = "a backbone without classifier, expected a classification checkpoint"
    else:
        why = "absent from the checkpoint"
    return f"{key} is missing, expected shape {tuple(want.shape)}: {why}"


def check_classes(found: int, wanted: int | None) -> None:
    if wanted is not None and wanted != found:
        message = f"the checkpoint has {found} classes, asked for {wanted}"
        raise WeightsError(f"{message}: leave --num-classes out or use --num-classes {found}")


def load_into(module: nn.Module, checkpoint: Checkpoint, source: str | Path, ema: bool | None = True) -> Checkpoint:
    """Load what was read from `source` into any module, key by key as strictly as MobileViT's.

    Returns the checkpoint under the module's names. The module stays as it was if anything does not fit (WeightsError).
    `ema` as in `find_entry`.
    """
    expected = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    masks = frozenset(key for key, value in expected.items() if not torch.isfinite(value).all())  # -inf on purpose
    with blame(source):
        aligned = checkpoint.aligned(expected, ema)
        module.load_state_dict(fit(aligned.tensors, expected, unchecked=masks))
    return aligned
