"""A classifier of transformers, built from its settings and filled with a checkpoint's tensors; no code is fetched."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mvit_export.errors import MissingDependencyError, WeightsError, first_line, require
from mvit_export.families.timm import define_torchvision_operators, import_timm
from mvit_export.families.transformers.config import EAGER, FILE, TIMM_WRAPPER, check_depth, choose_class, settings_of
from mvit_export.models.fit import missing
from mvit_export.models.prefixes import COUNTER
from mvit_export.models.settings import Json

WHOLE_NUMBERS = (torch.int8, torch.uint8, torch.int16, torch.int32)  # of quantized weights
SPARE = 2**20  # weights by which a description may exceed a checkpoint before it is said which are missing
UNUSED = ".pooler."  # part of the names of a head that classifiers leave out


class Classifier(nn.Module):
    """Pictures (B, 3, H, W) to logits (B, classes)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=pictures, return_dict=True).logits
        return logits


@contextmanager
def quiet() -> Iterator[None]:
    """Without the reports, progress bars and warnings of transformers and what it imports: we check for ourselves."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def import_transformers() -> ModuleType:
    """transformers, also beside a torchvision of another torch. Raises MissingDependencyError."""
    define_torchvision_operators()
    with quiet():
        library = require("transformers", extra="transformers", purpose="to read a folder of transformers")
        try:
            importlib.import_module("transformers.modeling_utils")
        except ImportError as error:
            raise MissingDependencyError(
                f"transformers does not import ({first_line(error)}): pip install 'mvit-export[transformers]'"
            ) from error
    return library


def build_classifier(values: Json, state: Mapping[str, Tensor]) -> tuple[nn.Module, str, tuple[str, ...]]:
    """The network, the name of its class, and notes. Raises WeightsError for weights that are not exactly its own."""
    library = import_transformers()
    kind = str(values["model_type"])
    if kind == TIMM_WRAPPER:
        check_architecture(values)
    check_tensors(state)
    check_depth(values, len(state))
    names = importlib.import_module("transformers.models.auto.modeling_auto")
    known = names.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(kind)
    if known is None:
        raise WeightsError(f"{FILE} says model_type is {kind}, which transformers {library.__version__} does not have")
    name = choose_class(values, known, state)
    with quiet():
        config, cls = make_config(library, kind, values), getattr(library, name)
        check_size(cls, config, state)
        network, report = fill(cls, config, state)
    return Classifier(network), name, check_report(network, report, name)


def make_config(library: ModuleType, kind: str, values: Json) -> Any:
    try:
        config = library.CONFIG_MAPPING[kind].from_dict(settings_of(values))
    except Exception as error:  # its own checks raise anything
        raise WeightsError(f"{FILE} is not one of a {kind} ({first_line(error)}): download it again") from error
    if not config.num_labels:
        raise WeightsError(f"{FILE} names no classes, expected a classifier: a backbone has no answer to check")
    return config


def check_size(cls: Any, config: Any, state: Mapping[str, Tensor]) -> None:
    """Before memory is taken: a network much larger than the checkpoint is not its own. Raises WeightsError."""
    try:
        with torch.device("meta"):
            described = sum(parameter.numel() for parameter in cls(config).parameters())
    except Exception as error:
        raise WeightsError(f"{FILE} describes no {cls.__name__} ({first_line(error)})") from error
    held = sum(tensor.numel() for tensor in state.values())
    if described > 2 * held + SPARE:
        raise WeightsError(f"{FILE} describes {described:,} weights, the checkpoint holds {held:,}")


def fill(cls: Any, config: Any, state: Mapping[str, Tensor]) -> tuple[nn.Module, Mapping[str, Any]]:
    """The network with the tensors, whose old names transformers renames, and its report on what did not fit."""
    bars = importlib.import_module("transformers.utils.logging")
    shown = bars.is_progress_bar_enabled()
    fused = getattr(cls, "_supports_sdpa", False) and config.model_type not in EAGER
    bars.disable_progress_bar()
    try:
        network, report = cls.from_pretrained(
            None, config=config, state_dict=dict(state), output_loading_info=True, ignore_mismatched_sizes=True,
            local_files_only=True, dtype=torch.float32,
            attn_implementation="sdpa" if fused else "eager",
        )  # fmt: skip
    except Exception as error:
        raise WeightsError(f"{FILE} and the weights make no {cls.__name__} ({first_line(error)})") from error
    finally:
        if shown:
            bars.enable_progress_bar()
    return network.eval(), report


def check_report(network: nn.Module, report: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Every weight must have come from the checkpoint, in its shape, and every tensor must have been used."""
    classes = network.config.num_labels  # type: ignore[union-attr]
    for key, found, expected in sorted(report["mismatched_keys"]):
        message = f"{key} has shape {tuple(found)}, expected {tuple(expected)}"
        if expected[0] == classes != found[0]:
            message += f": {FILE} describes {classes} classes"
        raise WeightsError(message)
    state = network.state_dict()
    lost = sorted(key for key in report["missing_keys"] if not key.endswith(COUNTER))
    if lost:
        raise WeightsError(missing(lost[0], state[lost[0]]) if lost[0] in state else f"{lost[0]} is missing")
    beside = sorted(report["unexpected_keys"])
    extra = next((key for key in beside if UNUSED not in f".{key}"), None)
    if extra is not None:
        raise WeightsError(f"{extra} is in the checkpoint, but a {name} has no such weight")
    return (f"left out: {beside[0]}{', …' if len(beside) > 1 else ''}, which a {name} does not use",) if beside else ()


def check_tensors(state: Mapping[str, Tensor]) -> None:
    """Raises WeightsError for what cannot be weights in floating point: quantized numbers, NaN, Inf."""
    for key, tensor in state.items():
        if tensor.dtype in WHOLE_NUMBERS:
            raise WeightsError(f"{key} has dtype {tensor.dtype}, expected floating point: export it unquantized")
        bad = int((~torch.isfinite(tensor.float())).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise WeightsError(f"{key} has {bad} NaN or Inf of {tensor.numel()} values, expected finite weights")


def check_architecture(values: Json) -> None:
    """timm builds by a name, which may also say `hf-hub:ID` or `local-dir:PATH`: neither is followed."""
    name = values.get("architecture")
    if not isinstance(name, str) or ":" in name or not import_timm().is_model(name.split(".")[0]):
        raise WeightsError(f"{FILE} says architecture is {name!r}, expected a model that timm has")
