"""Core ML packages: opened in Core ML or in the reference executor, their layers, their contents, and the matrix
product that shows the runtime's peak."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.artifact import Artifact
from mvit_export.errors import ArtifactError, RuntimeUnavailable, require
from mvit_export.readers.session import (
    Arrays,
    Chains,
    Intermediate,
    Opener,
    Session,
    labels_of,
    make_contents,
    open_in,
)
from mvit_export.results.parity import Overflow
from mvit_export.runner.common import read_labels
from mvit_export.tasks.table import task_of

MIL_NOTE = "proves graph and weights, not Apple's kernels; for those, on a Mac: verify --against golden"


def openers() -> tuple[Opener, ...]:
    """The runtimes that check such a file here: the reference executor, and on macOS Core ML itself."""
    if platform.system() != "Darwin":
        return (open_mil,)
    # Next to the real Core ML the reference is a second opinion: a Mac without torch does without it.
    return (open_coreml, open_mil) if importlib.util.find_spec("torch") else (open_coreml,)


def open_coreml(artifact: Artifact) -> Session:
    """Core ML itself, which exists on macOS only. Of a classifier's outputs, only the tensors."""
    if platform.system() != "Darwin":
        raise RuntimeUnavailable(f"Core ML predicts on macOS only, this is {platform.system()}")
    runtime, opened = open_in("coreml", artifact)

    def run(array: np.ndarray) -> Arrays:
        outputs = opened.call(array)
        return {name: np.asarray(outputs[name]) for name in artifact.manifest.output_names}

    return Session(f"{runtime.name} on {runtime.version}", run, labels_of(opened))


def open_mil(artifact: Artifact) -> Session:
    """The reference executor: the meaning of the saved Core ML package, computed by torch on any machine."""
    for module in ("torch", "coremltools"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            message = f"{module} does not import ({error}): pip install 'mvit-export[coreml]'"
            raise RuntimeUnavailable(message) from error
    from mvit_export import mil

    try:
        program = mil.load(artifact.model_path)
    except mil.UnsupportedOpError as error:  # the file may be right: we cannot tell here
        raise RuntimeUnavailable(str(error)) from error
    (input_name,) = program.inputs

    def run(array: np.ndarray) -> Arrays:
        try:
            outputs = program.run({input_name: array})
        except mil.ExecutionError as error:  # the file's fault, not the user's: a failed check
            raise RuntimeError(str(error)) from error
        task_of(artifact.manifest).check_outputs(outputs, artifact.manifest)
        return {name: outputs[name] for name in artifact.manifest.output_names if name in outputs}

    def overflow(array: np.ndarray) -> Overflow | None:
        first = program.trace(**{input_name: array}).first_overflow
        return Overflow(first.op.module, first.name, first.op.type, first.max_abs) if first else None

    try:
        labels = read_labels(program.metadata.get("labels"))
    except ValueError as error:
        raise ArtifactError(f"{artifact.model_path}: {error}; export again") from error
    return Session("mil-reference", run, None if labels is None else tuple(labels), MIL_NOTE, overflow)


def read_layers(path: Path, array: np.ndarray, chains: Chains) -> Iterator[Intermediate]:
    """The reference executor, on macOS too: Core ML does not show what happens inside a model."""
    from mvit_export import mil

    program = mil.load(path)
    (input_name,) = program.inputs
    for op, name, tensor in program.intermediates(**{input_name: array}):
        modules = () if op.module is None else (op.module,)
        yield Intermediate(name, op.type, modules, tensor.numpy().copy())


def read_contents(path: Path) -> dict[str, Any]:
    require("coremltools", extra="coreml", purpose="to inspect Core ML packages")
    require("torch", extra="coreml", purpose="to inspect Core ML packages")
    from mvit_export.mil.lint import lint
    from mvit_export.mil.listing import list_operations
    from mvit_export.mil.package import read_package

    package = read_package(path)
    operations, spec = list_operations(package), package.spec
    details = {"specification_version": spec.specificationVersion, "functions": sorted(spec.mlProgram.functions)}
    return make_contents(details, Counter(op.type for op in operations)) | {"lint": lint(operations).to_json()}


def write_product(path: Path, weights: np.ndarray) -> None:
    """An ML Program with one linear in fp16, which is what the GPU and the Neural Engine compute in."""
    ct = require("coremltools", extra="coreml", purpose="to measure Core ML's peak")
    from coremltools.converters.mil import Builder

    @Builder.program(input_specs=[Builder.TensorSpec(shape=weights.shape)])
    def product(x: Any) -> Any:
        return Builder.linear(x=x, weight=weights, name="y")

    ct.convert(product, minimum_deployment_target=ct.target.iOS16).save(str(path))
