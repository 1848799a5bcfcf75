"""An exported file in a runtime that can execute it, behind one small interface: see runner/ for the runtimes.

An opener raises RuntimeUnavailable with the reason if its runtime cannot work, ArtifactError if the runtime rejects the
file; nothing is silently substituted.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mvit_export.artifact import Artifact
from mvit_export.errors import ArtifactError, RuntimeUnavailable, first_line
from mvit_export.formats.table import FORMATS
from mvit_export.results.parity import Overflow
from mvit_export.runner.__main__ import find_adapter
from mvit_export.runner.common import Adapter, Opened, Refusal
from mvit_export.runner.run_torch import call_model
from mvit_export.system.files import NOT_UTF8, is_utf8

if TYPE_CHECKING:
    from mvit_export.models.loaded import LoadedModel

Arrays = Mapping[str, np.ndarray]
Chains = Mapping[str, tuple[str, ...]]  # module path -> the attributes of the modules that were called on the way to it


@dataclass(frozen=True)
class Session:
    """A loaded model. `run` maps the input array to every output by name; `labels` are the file's own."""

    runtime: str  # name and version, and what executes
    run: Callable[[np.ndarray], Arrays]
    labels: tuple[str, ...] | None
    note: str = ""  # what a PASS here does not prove
    overflow: Callable[[np.ndarray], Overflow | None] | None = None  # looks for one, if the runtime can


Opener = Callable[[Artifact], Session]


def open_torch(model: LoadedModel) -> Session:
    """PyTorch eager: the reference. `run` takes and returns float32 arrays, of which the network keeps none."""
    import torch

    # Not inference_mode: tensors that a module keeps from a call could not be used when its graph is captured later.
    call = call_model(model, torch.no_grad)

    def run(array: np.ndarray) -> Arrays:
        """With copies: a network may change its input in place, or return a buffer that its next call overwrites."""
        return {name: value.copy() for name, value in call(array.copy()).items()}

    return Session(f"torch {torch.__version__} CPU eager", run, None)


@dataclass(frozen=True)
class Intermediate:
    """One floating tensor. `modules` are paths in the network, "" being the network itself: none if the file does not
    record them, several if a converter fused them."""

    op: str
    op_type: str
    modules: tuple[str, ...]
    tensor: np.ndarray


def open_in(name: str, artifact: Artifact, *, known_as: str = "") -> tuple[Adapter, Opened]:
    """Open in one thread: processes that work side by side share the cores."""
    if not is_utf8(artifact.model_path):
        raise ArtifactError(f"{artifact.model_path}: {NOT_UTF8}")
    with refusals():
        runtime = find_adapter(name, threads=1)
        try:
            return runtime, runtime.open(str(artifact.model_path))
        except Refusal:
            raise
        except Exception as error:  # the runtimes' exception types have no common base
            rejected = f"{artifact.model_path} is rejected by {known_as or runtime.name}"
            raise ArtifactError(f"{rejected}: {first_line(error)}; export again") from error


@contextmanager
def refusals() -> Iterator[None]:
    try:
        yield
    except Refusal as refusal:
        raise RuntimeUnavailable(str(refusal)) from refusal


def labels_of(opened: Opened) -> tuple[str, ...] | None:
    return None if opened.labels is None else tuple(opened.labels)


def make_contents(details: dict[str, Any], operators: Counter[str]) -> dict[str, Any]:
    count, by_type = sum(operators.values()), dict(operators.most_common())
    return {"details": details, "operator_count": count, "operators": by_type}


def reader_of(format: str) -> Any:
    """The module that handles a format's files: it has openers, read_layers, read_contents, write_product."""
    return importlib.import_module(FORMATS[format].reader)


def openers(artifact: Artifact) -> tuple[Opener, ...]:
    """The runtimes that check this artifact here."""
    found: tuple[Opener, ...] = reader_of(artifact.manifest.format).openers()
    return found
