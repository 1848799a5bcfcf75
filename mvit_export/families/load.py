"""Build the model that a user names: a variant of a family, a function in a file, or one of timm's.

`load_model` is the only entry; `rebuild_model` repeats it from a manifest, for the parity check.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvit_export.artifact import Manifest, ModelInfo, WeightsInfo, find_artifacts, read_artifact
from mvit_export.data.preprocessing import MOST_SIDE, Preprocessing, Size, Stated
from mvit_export.errors import ModelError, UsageError, WeightsError, require
from mvit_export.families.answers import with_outputs
from mvit_export.families.base import Family, Request
from mvit_export.families.given import announce
from mvit_export.families.table import FAMILIES, OF_CHECKPOINTS, OPTIONS, VARIANTS, family_of, titles
from mvit_export.formats.choices import choose, parse_size
from mvit_export.models.loaded import LoadedModel
from mvit_export.system import trust

if TYPE_CHECKING:
    from torch import nn

HUB = "hf:"
Sizes = int | str | Sequence[int | str]


def load_model(
    variant: str | None = None,
    *,
    model: str | nn.Module | None = None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    image_size: Sizes | None = None,
    input_shape: Sequence[int] | None = None,
    labels: str | Path | Sequence[str] | None = None,
    seed: int = 0,
    ema: bool = True,
    preprocessing: Preprocessing | Stated | None = None,
    **options: str | None,
) -> LoadedModel:
    """Build a MobileViT `variant` ("xxs", "xs", "s"), or any `model` ("FILE.py:FACTORY", "timm:NAME", or an nn.Module).

    `weights` that are a folder of transformers, and `model="hf:ID"`, are any of its classifiers with its weights.
    An nn.Module is copied. Only this process has it, so its artifacts are checked against PyTorch here, and elsewhere
    with `against="golden"`.

    `weights` is a file, a folder, `hf:ID` or `timm:ID`; `pretrained` means the official ones; with neither the network
    is untrained, seeded with `seed`. Where a file has the weights as trained and an average of them, the average is
    read, or with `ema=False` the others. `image_size` is 256, "240x272" (height x width) or a list. `options` are the
    family's own: `patch_config` of MobileViT, "A" or "B". `preprocessing` is what the caller knows about it, where the
    model does not bring it.
    Raises children of MvitExportError.
    """
    if variant is not None and not isinstance(variant, str):
        raise UsageError(f"variant is a {type(variant).__name__}, expected a name; pass a module as model=")
    if model is not None and not isinstance(model, str):
        model = announce(model)
    asked = Request(variant, model, weights, pretrained, num_classes, check_options(options), seed, ema)
    family, asked = find_family(asked, input_shape)
    check_size(family, image_size, input_shape)
    code = code_named(family, asked.model)  # as it is before it runs
    loaded = build(family, asked)
    trust.remember([*code, *weights_named(loaded.weights)])
    loaded = with_shapes(loaded, parse_sizes(image_size) if image_size else None, input_shape)
    return with_outputs(with_preprocessing(loaded, preprocessing), labels)


def rebuild_model(manifest: Manifest, *, weights: str | Path | None = None) -> LoadedModel:
    """The reference for parity: rebuilt from what the manifest names, and checked to have the same weights.

    `weights` says where the checkpoint is now, if it has moved. Raises MvitExportError if it cannot be rebuilt, or
    names code or weights that this user has not named himself, see system/trust.py.
    """
    origin, info = manifest.weights, manifest.model
    check_trusted(info, None if weights is not None else origin)
    source = weights if weights is not None else pinned(origin)
    family = family_of(info.source)
    asked = Request(
        # A checkpoint names its own variant: one of ours may have its own sizes ("custom").
        variant=info.variant if source is None else None,
        model=None if family.variants else info.source,
        weights=source,
        num_classes=info.num_classes,
        options=family.settings_of(info),
        seed=origin.seed or 0,
        ema=origin.ema,
    )
    loaded = build(family, asked)
    found = loaded.weights.state_sha256
    if found != origin.state_sha256:
        raise WeightsError(
            f"{source or info.source} gives other weights than were exported (digest {found[:12]}…, the manifest says "
            f"{origin.state_sha256[:12]}…); pass --weights, or check with --against golden"
        )
    return replace(loaded, info=info, preprocessing=manifest.preprocessing, output_names=manifest.output_names)


def code_named(family: Family, source: str | None) -> list[trust.Entry]:
    """The user's file that a source would run, if any, with its sha256."""
    if family.code is None or source is None:
        return []
    path, (_, _, factory) = family.code(source), source.rpartition(":")
    return [(f"code:{path}:{factory}", trust.digest_of(path))]


def pinned(origin: WeightsInfo) -> str | None:
    """Where the weights came from, at the very commit where they are on a hub, whatever revision was asked for."""
    if origin.source is None or origin.revision is None:
        return origin.source
    return f"{origin.source.partition('@')[0]}@{origin.revision}"


def weights_named(origin: WeightsInfo) -> list[trust.Entry]:
    """By name alone: whether they are still the same is checked once they are read."""
    source = pinned(origin)
    return [] if source is None else [(f"weights:{source}", "")]


def check_trusted(info: ModelInfo, origin: WeightsInfo | None) -> None:
    """Raises ModelError or WeightsError for what the manifest names and this user has not. `origin`: if it is read."""
    for name, digest in code_named(family_of(info.source), info.source):
        if not trust.is_trusted(name, digest):
            raise ModelError(
                f"the manifest names {info.source}, Python code that you have not exported, or that has changed since; "
                "--trust-code runs it, --against golden does without"
            )
    for name, digest in weights_named(origin) if origin else ():
        if not trust.is_trusted(name, digest):
            found = name.removeprefix("weights:")
            raise WeightsError(
                f"the manifest names the weights {found}, which you have not exported; pass "
                f"--weights {shlex.quote(found)}, --trust-code, or --against golden"
            )


def load_like(path: str | Path) -> LoadedModel:
    """The model that an artifact was exported from, with its weights, input shapes and labels, to export it again.

    Raises MvitExportError if it cannot be rebuilt, as `rebuild_model` does.
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


def build(family: Family, asked: Request) -> LoadedModel:
    require("torch", extra="all", purpose="to build a model")
    return family.load(asked)


# What goes together, checked before anything is loaded or downloaded


def check_options(options: dict[str, Any]) -> dict[str, str]:
    """The family options that were given. Raises TypeError for an unknown name, as Python itself does."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"load_model() got an unexpected keyword argument {name!r}")
    return {name: value for name, value in options.items() if value is not None}


def find_family(asked: Request, input_shape: Sequence[int] | None) -> tuple[Family, Request]:
    """The family of the requested model, and the request in the table's spelling. Raises UsageError."""
    variant = None if asked.variant is None else choose(asked.variant, VARIANTS, what="variant")
    options = {
        name: choose(value, OPTIONS[name].values, what=OPTIONS[name].title) for name, value in asked.options.items()
    }
    asked = replace(asked, variant=variant, options=options)
    if asked.num_classes is not None and asked.num_classes < 1:
        raise UsageError(f"--num-classes is {asked.num_classes}, expected at least 1")
    if asked.weights is not None and asked.pretrained:
        raise UsageError("--weights and --pretrained both say where the weights come from; pass one of them")
    asked = with_hub_model(asked)
    if asked.model is not None:
        return family_of_model(asked, asked.model), asked
    if variant is None and asked.weights is None:
        raise UsageError(f"no model named; pass --variant {'|'.join(VARIANTS)}, --weights or --model")
    if input_shape is not None:
        title = VARIANTS[variant].title if variant else "a checkpoint's own model"
        raise UsageError(f"--input-shape belongs to --model; {title} takes --image-size")
    family, asked = (VARIANTS[variant], asked) if variant else find_in_checkpoint(asked)
    for name in options:
        if name not in family.options:
            raise UsageError(f"{flag(name)} is not an option of {family.title}; leave it out")
    return family, asked


def with_hub_model(asked: Request) -> Request:
    """`--model hf:ID` is what `--weights hf:ID` is: a model on a hub brings its weights. Raises UsageError."""
    if asked.model is None or not asked.model.startswith(HUB):
        return asked
    for name, value in {"weights": asked.weights, "pretrained": asked.pretrained}.items():
        if value:
            raise UsageError(f"--model {asked.model} brings its own weights; leave {flag(name)} out")
    return replace(asked, model=None, weights=asked.model)


def find_in_checkpoint(asked: Request) -> tuple[Family, Request]:
    """The family that claims a checkpoint, and the request with what was read. Raises WeightsError and HubError."""
    require("torch", extra="all", purpose="to read weights")
    from mvit_export.models.stored import read_stored

    stored = read_stored(str(asked.weights), ema=asked.ema)
    found = next((family for family in OF_CHECKPOINTS if family.claims(stored)), OF_CHECKPOINTS[-1])
    return found, replace(asked, stored=stored)


def family_of_model(asked: Request, source: str) -> Family:
    """The family that `--model` refers to. Raises UsageError for options that its networks do not have."""
    family = next(family for family in FAMILIES if not family.variants and family.owns(source))
    classes = None if family.counts_classes else asked.num_classes
    for name, value in {"variant": asked.variant, "num_classes": classes, **asked.options}.items():
        if value is not None:
            owner = titles(having="counts_classes" if name == "num_classes" else "variants")
            raise UsageError(f"{flag(name)} belongs to {owner}; with --model, set it in the model's own factory")
    return family


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_size(family: Family, image_size: Sizes | None, input_shape: Sequence[int] | None) -> None:
    """Raises UsageError for a size below the family's smallest, or given twice."""
    if image_size is None:
        return
    if input_shape is not None:
        raise UsageError("--image-size and --input-shape both give the input's shape; pass one of them")
    for size in parse_sizes(image_size):
        if min(size) < family.smallest_image:
            least = family.smallest_image
            raise UsageError(f"--image-size is {size[0]}x{size[1]}, expected at least {least} on each side")


def parse_sizes(image_size: Sizes) -> tuple[Size, ...]:
    """256, "240x272" or a list of such -> ((height, width), ...), without repeats."""
    values = [image_size] if isinstance(image_size, (int, str)) else image_size
    return tuple(dict.fromkeys(parse_size(str(value)) for value in values))


# Filled in for every family


def with_preprocessing(loaded: LoadedModel, said: Preprocessing | Stated | None) -> LoadedModel:
    """Raises UsageError for a model that takes no pictures."""
    known = loaded.preprocessing
    if said is None or said == Stated():
        return loaded
    if known is None:
        raise UsageError("--mean, --std, --scale, --channels and --resize are for a model that takes RGB pictures")
    return replace(loaded, preprocessing=said.on(known) if isinstance(said, Stated) else said.with_size(known.crop))


def with_shapes(loaded: LoadedModel, sizes: tuple[Size, ...] | None, input_shape: Sequence[int] | None) -> LoadedModel:
    preprocessing = loaded.preprocessing
    assert preprocessing is not None
    if input_shape is not None:
        shape = tuple(input_shape)
        if len(shape) == 4 and shape[1] == 3 and max(shape) <= MOST_SIDE:
            return replace(loaded, input_shapes=(shape,), preprocessing=preprocessing.with_size(shape[2:]))
        return replace(loaded, input_shapes=(shape,), preprocessing=None)
    sizes = sizes or (preprocessing.crop,)
    shapes = tuple((1, 3, *size) for size in sizes)
    return replace(loaded, input_shapes=shapes, preprocessing=preprocessing.with_size(sizes[0]))
