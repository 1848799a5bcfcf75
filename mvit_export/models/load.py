"""Build the model that a user names: a MobileViT variant, a function in a file, or one of timm's.

`load_model` is the one way in; `rebuild_model` walks it again from a manifest, for the parity check.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mvit_export.artifact import Manifest, ModelInfo, WeightsInfo, find_artifacts, read_artifact
from mvit_export.errors import ModelError, UsageError, WeightsError, require
from mvit_export.formats import choose, parse_size
from mvit_export.models.sources import (
    absolute_source,
    build_from_file,
    build_timm,
    call_guarded,
    timm_preprocessing,
    timm_weights,
)
from mvit_export.preprocessing import DEFAULT_PREPROCESSING, Preprocessing, Size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mvit_export.models.mobilevit import MobileViT


VARIANT_NAMES = ("xxs", "xs", "s")
SMALLEST_IMAGE = 32  # below it MobileViT's last stages have no pixels left
Sizes = int | str | Sequence[int | str]


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode with all that an export records of it.

    `input_shapes` are the fixed shapes to export for, (B, C, H, W) for images. `output_names` name what the module
    returns, in order. `preprocessing` is None for models whose input is no RGB image.
    """

    module: nn.Module
    info: ModelInfo
    weights: WeightsInfo
    preprocessing: Preprocessing | None
    input_shapes: tuple[tuple[int, ...], ...]
    output_names: tuple[str, ...]


def load_model(
    variant: str | None = None,
    *,
    model: str | None = None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    patch_config: str | None = None,
    image_size: Sizes | None = None,
    input_shape: Sequence[int] | None = None,
    labels: str | Path | Sequence[str] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Build a MobileViT `variant` ("xxs", "xs", "s"), or any `model` ("FILE.py:FACTORY", "timm:NAME").

    `weights` is a file, a folder, `hf:ID` or `timm:ID`; `pretrained` the official ones; with neither the network is
    untrained, seeded with `seed`. `image_size` is 256 or "240x272" (height x width), or a list of such.
    Raises children of MvitExportError.
    """
    check_model_options(variant, model, weights, pretrained, num_classes, patch_config, image_size, input_shape)
    loaded = _load(variant, model, weights, pretrained, num_classes, patch_config, seed)
    loaded = _with_shapes(loaded, parse_sizes(image_size) if image_size else None, input_shape)
    return _with_outputs(loaded, labels)


def rebuild_model(manifest: Manifest, *, weights: str | Path | None = None) -> LoadedModel:
    """The reference for parity: built anew from what the manifest names, and checked to hold the same weights.

    `weights` says where the checkpoint is now, if it has moved. Raises MvitExportError where it cannot be rebuilt.
    """
    origin, info = manifest.weights, manifest.model
    source: str | Path | None = weights
    if weights is None and origin.source:
        source = f"{origin.source}@{origin.revision}" if origin.revision else origin.source
    loaded = _load(
        None if source else info.variant,  # a checkpoint of ours may have sizes of its own ("custom")
        None if info.variant else info.source,
        source,
        pretrained=False,
        num_classes=info.num_classes,
        patch_config=info.patch_config,
        seed=origin.seed or 0,
    )
    found = loaded.weights.state_sha256
    if found != origin.state_sha256:
        raise WeightsError(
            f"{source or info.source} gives other weights than were exported (digest {found[:12]}…, the manifest says "
            f"{origin.state_sha256[:12]}…); pass --weights, or check with --against golden"
        )
    return replace(loaded, info=info, preprocessing=manifest.preprocessing, output_names=manifest.output_names)


def load_like(path: str | Path) -> LoadedModel:
    """The model that an artifact was exported from, with its weights, input shapes and labels, to export it again.

    Raises MvitExportError where it cannot be rebuilt, as `rebuild_model` does.
    """
    place, *others = find_artifacts(path)
    if others:
        raise UsageError(f"{path} holds {1 + len(others)} artifacts, expected one whose model is to be exported again")
    manifest = read_artifact(place).manifest
    spec = manifest.inputs[0]
    shapes = [tuple(side or 1 for side in shape) for shape in spec.enumerated or (spec.shape,)]
    if spec.layout == "NHWC":
        shapes = [(batch, channels, height, width) for batch, height, width, channels in shapes]
    return replace(rebuild_model(manifest), input_shapes=tuple(shapes))


def _load(
    variant: str | None,
    model: str | None,
    weights: str | Path | None,
    pretrained: bool,
    num_classes: int | None,
    patch_config: str | None,
    seed: int,
) -> LoadedModel:
    require("torch", extra="all", purpose="to build a model")
    if model is not None:
        return _load_any(model, weights, pretrained, seed)
    return _load_mobilevit(variant, weights, pretrained, num_classes, patch_config, seed)


def check_model_options(
    variant: str | None,
    model: str | None,
    weights: str | Path | None,
    pretrained: bool,
    num_classes: int | None,
    patch_config: str | None,
    image_size: Sizes | None,
    input_shape: Sequence[int] | None,
) -> None:
    """Refuse what does not go together, before anything is loaded or downloaded."""
    if variant is not None:
        choose(variant, VARIANT_NAMES, what="variant")
    if patch_config is not None:
        choose(patch_config, ("A", "B"), what="patch configuration")
    if num_classes is not None and num_classes < 1:
        raise UsageError(f"--num-classes is {num_classes}, expected at least 1")
    if weights is not None and pretrained:
        raise UsageError("--weights and --pretrained both say where the weights come from; pass one of them")
    if model is None:
        if variant is None and weights is None:
            raise UsageError(f"no model named; pass --variant {'|'.join(VARIANT_NAMES)}, --weights or --model")
        if variant is None and pretrained:
            raise UsageError(f"--pretrained needs --variant {'|'.join(VARIANT_NAMES)}")
        if input_shape is not None:
            raise UsageError("--input-shape belongs to --model; MobileViT takes --image-size")
    else:
        given = {"--variant": variant, "--num-classes": num_classes, "--patch-config": patch_config}
        for flag, value in given.items():
            if value is not None:
                raise UsageError(f"{flag} belongs to MobileViT; with --model, set it in the model's own factory")
        if image_size is not None and input_shape is not None:
            raise UsageError("--image-size and --input-shape both give the input's shape; pass one of them")
    if image_size is not None:
        smallest = 1 if model else SMALLEST_IMAGE
        for size in parse_sizes(image_size):
            if min(size) < smallest:
                raise UsageError(f"--image-size is {size[0]}x{size[1]}, expected at least {smallest} on each side")


def parse_sizes(image_size: Sizes) -> tuple[Size, ...]:
    """256, "240x272" or a list of such -> ((height, width), ...), without repeats."""
    values = [image_size] if isinstance(image_size, (int, str)) else image_size
    return tuple(dict.fromkeys(parse_size(str(value)) for value in values))


def _load_mobilevit(
    variant: str | None,
    weights: str | Path | None,
    pretrained: bool,
    num_classes: int | None,
    patch_config: str | None,
    seed: int,
) -> LoadedModel:
    variant = choose(variant, VARIANT_NAMES, what="variant") if variant else None
    patch_config = patch_config.upper() if patch_config else None
    if weights is None and not pretrained:
        assert variant is not None
        return _seed_mobilevit(variant, num_classes or 1000, patch_config or "A", seed)
    from mvit_export.models.mobilevit import MobileViT
    from mvit_export.weights import OFFICIAL, load_weights

    source = OFFICIAL[variant] if pretrained and variant else str(weights)
    found = load_weights(source, variant=variant, num_classes=num_classes, patch_config=patch_config)
    module = MobileViT(found.config)
    module.load_state_dict(dict(found.state))
    origin = WeightsInfo(found.source, found.family, found.sha256, state_digest(module), True, None, found.revision)
    info = replace(_describe_mobilevit(module, found.variant), labels=distinguish(found.labels))
    return LoadedModel(module.eval(), info, origin, found.preprocessing, (), ())


def distinguish(labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Number repeated labels (ImageNet has two "crane"), which a Core ML classifier could not tell apart."""
    if labels is None:
        return None
    return tuple(f"{label} ({i})" if label in labels[:i] else label for i, label in enumerate(labels))


def _seed_mobilevit(variant: str, num_classes: int, patch_config: str, seed: int) -> LoadedModel:
    from mvit_export.models.mobilevit import create_mobilevit

    with _seeded(seed):
        module = call_guarded(
            lambda: create_mobilevit(variant, num_classes=num_classes, patch_config=patch_config), f"variant {variant}"
        )
    origin = WeightsInfo(None, None, None, state_digest(module), trained=False, seed=seed)
    return LoadedModel(module.eval(), _describe_mobilevit(module, variant), origin, DEFAULT_PREPROCESSING, (), ())


def _describe_mobilevit(module: MobileViT, variant: str) -> ModelInfo:
    return ModelInfo(
        name=f"mobilevit_{variant}",
        source=variant,
        task="image-classification",
        params=count_parameters(module),
        macs=0,  # counted once the input's shape is known
        variant=variant,
        num_classes=module.config.num_classes,
        patch_config=module.config.patch_config,
        output_stride=module.config.output_stride,
    )


def _load_any(source: str, weights: str | Path | None, pretrained: bool, seed: int) -> LoadedModel:
    """`timm:NAME` or `FILE.py:FACTORY`."""
    is_timm = source.startswith("timm:")
    with _seeded(seed):
        module = build_timm(source) if is_timm else build_from_file(source, pretrained)
    if pretrained:
        weights = timm_weights(source)
    module = call_guarded(lambda: module.eval().float(), f"{source}, made float32,")
    origin = WeightsInfo(None, None, None, "", False if is_timm else None, seed)  # a factory may load its own
    if weights is not None:
        origin = _load_weights_into(module, str(weights))
    origin = replace(origin, state_sha256=call_guarded(lambda: state_digest(module), f"{source}, asked for its state,"))
    preprocessing = timm_preprocessing(module) if is_timm else getattr(module, "preprocessing", None)
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = DEFAULT_PREPROCESSING
    name = source.removeprefix("timm:") if is_timm else source.rpartition(":")[2]
    info = ModelInfo(
        name=re.sub(r"\W+", "_", name),
        source=absolute_source(source),
        task="unknown",
        params=count_parameters(module),
        macs=0,
    )
    return LoadedModel(module, info, origin, preprocessing, (), ())


def _load_weights_into(module: nn.Module, weights: str) -> WeightsInfo:
    """Load a file, folder or hub model strictly into any module."""
    from mvit_export.checkpoints import find_weights
    from mvit_export.weights import load_strict, locate

    path, name, revision = locate(weights)
    sha256 = load_strict(module, find_weights(path) if path.is_dir() else path)
    return WeightsInfo(name, "model", sha256, "", trained=True, seed=None, revision=revision)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and random for the block alone; the caller's streams of random numbers go on undisturbed."""
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


def _with_shapes(loaded: LoadedModel, sizes: tuple[Size, ...] | None, input_shape: Sequence[int] | None) -> LoadedModel:
    preprocessing = loaded.preprocessing
    assert preprocessing is not None
    if input_shape is not None:
        shape = tuple(input_shape)
        if len(shape) == 4 and shape[1] == 3:
            return replace(loaded, input_shapes=(shape,), preprocessing=preprocessing.with_size(shape[2:]))
        return replace(loaded, input_shapes=(shape,), preprocessing=None)
    sizes = sizes or (preprocessing.crop,)
    shapes = tuple((1, 3, *size) for size in sizes)
    return replace(loaded, input_shapes=shapes, preprocessing=preprocessing.with_size(sizes[0]))


def _with_outputs(loaded: LoadedModel, labels: str | Path | Sequence[str] | None) -> LoadedModel:
    """Call the module once per shape: names of the outputs, MACs, number of classes, and that it works at all."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    for shape in reversed(loaded.input_shapes):  # the first shape last, so that its count stays
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            outputs = call_guarded(
                lambda: name_outputs(loaded.module(torch.zeros(shape))),  # noqa: B023 (called at once)
                f"the model, called on a float32 tensor {shape},",
            )
    check_outputs(outputs)
    info = replace(loaded.info, macs=counter.get_total_flops() // 2)  # torch counts a multiply-add as two
    only = next(iter(outputs.values()))
    if info.num_classes is None and len(outputs) == 1 and only.ndim == 2:
        info = replace(info, num_classes=only.shape[1], task="image-classification")
    if labels is not None:
        info = replace(info, labels=read_labels(labels, info.num_classes))
    return replace(loaded, info=info, output_names=tuple(outputs))


def check_outputs(outputs: Mapping[str, Tensor]) -> None:
    """Refuse what no comparison of numbers can judge: integers, booleans, scalars; and the name of the input."""
    for name, tensor in outputs.items():
        if not tensor.is_floating_point() or tensor.ndim == 0:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"output {name!r} is {kind} of shape {list(tensor.shape)}, expected floats with a batch axis"
            )
        if name == "image":
            raise ModelError("an output is named 'image' as the input is; rename it")


def name_outputs(outputs: Any) -> dict[str, Tensor]:
    """What a module returned -> {name: tensor}: one tensor is `logits`, a mapping keeps its keys, a sequence counts."""
    from torch import Tensor

    if isinstance(outputs, Tensor):
        named = {"logits": outputs}
    elif isinstance(outputs, Mapping):
        named = {str(key): value for key, value in outputs.items() if value is not None}
    elif isinstance(outputs, (tuple, list)):
        named = {f"output_{i}": value for i, value in enumerate(outputs)}
        if len(named) == 1:
            named = {"logits": named["output_0"]}
    else:
        named = {}
    if not named or not all(isinstance(value, Tensor) for value in named.values()):
        raise ModelError(f"the model returned {type(outputs).__name__}, expected a tensor, or tuple or dict of tensors")
    return named


def read_labels(labels: str | Path | Sequence[str], num_classes: int | None) -> tuple[str, ...]:
    """Class labels, one a line in a UTF-8 text file or given as a list, in the order of the logits."""
    if isinstance(labels, (str, Path)):
        where = str(labels)
        try:
            names = tuple(line.strip() for line in Path(labels).read_text(encoding="utf-8-sig").rstrip().splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{where} cannot be read as labels ({error}), expected UTF-8 text, one a line") from error
    else:
        where, names = "labels", tuple(labels)
    if num_classes is None:
        raise UsageError("--labels needs a classifier with one output of shape (batch, classes); this model is none")
    if len(names) != num_classes:
        raise UsageError(f"{where} holds {len(names)} labels, the model has {num_classes} classes")
    if "" in names:
        raise UsageError(f"{where} has an empty label at line {names.index('') + 1}")
    return names


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def state_digest(module: nn.Module) -> str:
    """sha256 over the names, types, shapes and bytes of a module's state: two equal digests are equal weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not hasattr(tensor, "detach"):  # get_extra_state may return anything
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
