"""What there is to measure: every artifact in every requested runtime that opens its format."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mvit_export.artifact import Artifact, TensorSpec, image_size
from mvit_export.errors import UsageError
from mvit_export.formats.choices import choose
from mvit_export.formats.table import FORMATS

# runtime: its options; one with `=` takes a value. The formats' rows say which files it opens.
RUNTIMES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("cpu", "xnnpack", "coreml", "nnapi", "qnn"),
    "litert": ("builtin", "fp16", "gpu", "nnapi", "delegate=PATH"),
    "coreml": ("all", "cpuOnly", "cpuAndGPU", "cpuAndNeuralEngine"),
    "pytorch": (),  # takes every artifact, and rebuilds its network
}


@dataclass(frozen=True)
class Setting:
    """One row of the result: what runs, in what, with how many threads and on which input."""

    artifact: Artifact
    runtime: str  # name[:option]
    asked: bool  # by name: if it is not available, that is an error
    threads: int
    input_shape: tuple[int, ...]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The input of the PyTorch model, NCHW where the file takes pictures (NHWC)."""
        if self.artifact.manifest.inputs[0].layout != "NHWC":
            return self.input_shape
        batch, height, width, channels = self.input_shape
        return batch, channels, height, width

    @property
    def feed(self) -> tuple[tuple[int, ...], str]:
        """Shape and type of what the runtime is given."""
        if self.runtime == "pytorch":
            return self.tensor_shape, "float32"
        return self.input_shape, self.artifact.manifest.inputs[0].dtype

    @property
    def group(self) -> tuple[int, tuple[int, ...]]:
        """Settings of one group are sampled together; ratios are taken within it."""
        return self.threads, self.input_shape


def plan_settings(
    artifacts: Sequence[Artifact],
    *,
    runtimes: Sequence[str] = (),
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (),
    sizes: Sequence[tuple[int, int]] = (),
) -> list[Setting]:
    """Every combination, those of one group side by side. Refuses what no artifact can satisfy, before any work."""
    named = [check_runtime(runtime) for runtime in runtimes]
    # Where PyTorch itself is measured, one artifact stands for all that were exported from the same weights.
    references = {a.manifest.weights.state_sha256: a for a in reversed(artifacts)}.values()
    found = []
    for count, artifact in itertools.product(dict.fromkeys(threads), artifacts):
        fits = [r for r in named if takes(r, artifact)] or [artifact.manifest.target.row.runtimes[0]]
        for shape in input_shapes(artifact, batches=batches, sizes=sizes):
            found += [
                Setting(artifact, r, r in named, count, shape)
                for r in fits
                if r != "pytorch" or any(artifact is reference for reference in references)
            ]
    for runtime in named:
        if not any(setting.runtime == runtime for setting in found):
            given = ", ".join(sorted({a.manifest.format for a in artifacts}))
            taken = ", ".join(formats_of(runtime))
            raise UsageError(f"--runtime {runtime} takes {taken} files, given: {given}")
    return sorted(found, key=lambda setting: [s.group for s in found].index(setting.group))


def check_runtime(text: str) -> str:
    """`name[:option[=value]]` if there is such a runtime; else an error with the list."""
    name, colon, option = text.partition(":")
    name = choose(name, RUNTIMES, what="--runtime")
    if not colon:
        return name
    key, equals, value = option.partition("=")
    options = {o.partition("=")[0]: o for o in RUNTIMES[name]}
    if key not in options or bool(equals) != ("=" in options[key]) or (equals and not value):
        expected = ", ".join(RUNTIMES[name]) or "none"
        raise UsageError(f"--runtime {text}: {name} has no option {option!r}, expected one of {expected}")
    return f"{name}:{option}"


def takes(runtime: str, artifact: Artifact) -> bool:
    return runtime == "pytorch" or artifact.manifest.format in formats_of(runtime)


def formats_of(runtime: str) -> list[str]:
    """The formats whose files a runtime opens."""
    return [row.name for row in FORMATS.values() if runtime.partition(":")[0] in row.runtimes]


def input_shapes(
    artifact: Artifact, *, batches: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> list[tuple[int, ...]]:
    """The artifact's input shapes for these batches and sizes, by default its own batch, or 1 if it takes any.

    Raises UsageError for others, listing its own.
    """
    spec = artifact.manifest.inputs[0]
    shapes = [shape_of_size(artifact, spec, size) for size in sizes] or [spec.shape]
    if spec.shape[0] is not None and any(batch != spec.shape[0] for batch in batches):
        raise UsageError(
            f"--batch {', '.join(map(str, batches))}: {artifact.path} takes batches of {spec.shape[0]} only; "
            "export ONNX with --dynamic-batch"
        )
    chosen = dict.fromkeys(batches or [spec.shape[0] or 1])
    return [(batch, *(side or 1 for side in shape[1:])) for shape in shapes for batch in chosen]


def shape_of_size(artifact: Artifact, spec: TensorSpec, size: tuple[int, int]) -> tuple[int | None, ...]:
    shapes = spec.enumerated or (spec.shape,)
    for shape in shapes:
        if len(shape) == 4 and image_size(shape, spec) == size:
            return shape
    known = ", ".join("{}x{}".format(*image_size(shape, spec)) for shape in shapes if len(shape) == 4)
    raise UsageError(f"--image-size {size[0]}x{size[1]}: {artifact.path} takes {known or spec.shape} only")
