"""What an artifact says about itself: its manifest, and what is written inside the model file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mvit_export import __version__
from mvit_export.artifact import Manifest, TensorSpec, now
from mvit_export.converters.capture import INPUT_NAME, Conversion
from mvit_export.formats.targets import Target
from mvit_export.models.loaded import LoadedModel
from mvit_export.readers.session import open_torch


def draft_manifest(model: LoadedModel, target: Target, tools: dict[str, str]) -> Manifest:
    """Everything but the files, which do not exist yet."""
    return Manifest(
        model=model.info,
        weights=model.weights,
        preprocessing=model.preprocessing,
        inputs=(input_spec(model, target),),
        outputs=output_specs(model, target),
        format=target.format,
        precision=target.precision,
        target=target,
        capture="",
        files=(),
        tools={"mvit-export": __version__, "python": ".".join(map(str, sys.version_info[:3])), **tools},
        created=now(),
    )


def input_spec(model: LoadedModel, target: Target) -> TensorSpec:
    """`image`, with every shape if there are several; the first one is the main one."""
    shapes = model.input_shapes
    if target.input == "image":
        shapes = tuple((shape[0], *shape[2:], shape[1]) for shape in shapes)
        return tensor_spec(INPUT_NAME, shapes, target, "uint8", "NHWC")
    return tensor_spec(INPUT_NAME, shapes, target, "float32", "NCHW" if len(shapes[0]) == 4 else "")


AXES = {2: "NC"}  # names of an output's, by their count


def output_specs(model: LoadedModel, target: Target) -> tuple[TensorSpec, ...]:
    """The outputs that the model itself returns for each input shape."""
    reference = open_torch(model)
    runs = [reference.run(np.zeros(shape, np.float32)) for shape in model.input_shapes]
    return tuple(
        tensor_spec(name, tuple(run[name].shape for run in runs), target, str(array.dtype), AXES.get(array.ndim, ""))
        for name, array in runs[0].items()
    )


def tensor_spec(name: str, shapes: Sequence[tuple[int, ...]], target: Target, dtype: str, layout: str) -> TensorSpec:
    distinct = tuple(dict.fromkeys(shapes))
    batch = None if target.dynamic_batch else distinct[0][0]
    return TensorSpec(name, (batch, *distinct[0][1:]), dtype, layout, distinct if len(distinct) > 1 else ())


def describe_quantization(conversion: Conversion) -> dict[str, Any] | None:
    """What the manifest says about a quantized file: the whole recipe, and what the ranges were learned from."""
    if conversion.recipe is None and conversion.calibration is None:
        return None
    return {
        "recipe": conversion.recipe.to_json() if conversion.recipe else None,
        "calibration": conversion.calibration.to_json() if conversion.calibration else None,
    }


def file_metadata(manifest: Manifest) -> dict[str, str]:
    """What is written inside the model file itself, as strings."""
    model, weights = manifest.model, manifest.weights
    trained = {True: "trained", False: f"untrained, seed {weights.seed}", None: "set by the model's factory"}
    return {
        "name": model.name,
        "description": f"{model.name}, {model.task}, {manifest.precision}; weights: {trained[weights.trained]}",
        "author": "exported by mvit-export",
        "license": "the weights are under the licence of their source" if weights.trained else "MIT",
        "version": __version__,
        "mvit_export_version": __version__,
        "weights_source": weights.source or "",
        "weights_sha256": weights.sha256 or "",
        "weights_state_sha256": weights.state_sha256,
        "preprocessing": json.dumps(manifest.preprocessing.to_json()) if manifest.preprocessing else "",
        "input": manifest.target.input,
        "precision": manifest.precision,
        "created": manifest.created,
    }
