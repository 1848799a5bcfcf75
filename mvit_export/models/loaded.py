"""A model that is ready for export, and what every family does to make one."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mvit_export.artifact import ModelInfo, WeightsInfo
from mvit_export.data.preprocessing import Preprocessing
from mvit_export.errors import ModelError, MvitExportError, first_line
from mvit_export.system.silent_end import no_silent_end

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode with all that an export records about it.

    `input_shapes` are the fixed shapes to export for, (B, C, H, W) for images. `output_names` name what the module
    returns, in order. `preprocessing` is None for models whose input is not an RGB image. `notes` say, a line each,
    what was decided for the user.
    """

    module: nn.Module
    info: ModelInfo
    weights: WeightsInfo
    preprocessing: Preprocessing | None
    input_shapes: tuple[tuple[int, ...], ...]
    output_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def call_guarded(call: Callable[[], Any], what: str) -> Any:
    """Run a user's code; anything it raises becomes a one-line ModelError (the traceback is shown with -v).

    That includes SystemExit and os._exit: a script's own exit code must not pass for ours.
    """
    try:
        with no_silent_end():
            return call()
    except (MvitExportError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ModelError(f"{what} raised {type(error).__name__}: {first_line(error)}") from error


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and random for this block only; the caller's random streams continue undisturbed."""
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


REPEATED = 1e-6  # of the scale: two runs of one network in float32 may differ by this where threads share a sum


def check_repeats(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], name: str) -> None:
    """Raises ModelError if two runs of a network on one input differ: no file can be equal to it."""
    for output, array in first.items():
        if not array.size:
            raise ModelError(f"{name}'s output {output} is empty, shape {array.shape}, expected numbers to compare")
        off, scale = np.abs(array - second[output]).max(), np.abs(array).max()
        if off > REPEATED * scale:
            raise ModelError(
                f"{name} gives different answers for the same input, {off / scale:.1e} of the scale of {output}; "
                "is there dropout or noise in its forward?"
            )


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def state_digest(module: nn.Module) -> str:
    """sha256 over the names, types, shapes and bytes of a module's state: equal digests mean equal weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not hasattr(tensor, "detach"):  # get_extra_state may return anything
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
