"""Builds one-op programs with coremltools' MIL builder, saves them, and runs the saved package."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types
from coremltools.converters.mil.mil import Program as MilProgram

import mvit_export.mil as mil

TYPES = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32}
Build = Callable[..., Any]


def save_program(
    build: Build, inputs: dict[str, np.ndarray], path: Path, target: ct.target = ct.target.iOS17, keep: bool = True
) -> Path:
    """A package of the program that `build(**vars)` makes; with `keep`, no pass may change or fold an op."""
    placeholders = {name: mb.placeholder(a.shape, dtype=TYPES[str(a.dtype)]) for name, a in inputs.items()}
    with Function(placeholders, opset_version=target) as function:
        outputs = build(**function.inputs)
        function.set_outputs(list(outputs) if isinstance(outputs, (tuple, list)) else [outputs])
    program = MilProgram()
    program.add_function("main", function)
    model = ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=target,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY if keep else ct.PassPipeline.DEFAULT,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


def run_op(
    build: Build, inputs: dict[str, np.ndarray], target: ct.target = ct.target.iOS17, **options: Any
) -> list[np.ndarray]:
    """Outputs of the saved program, in order."""
    with tempfile.TemporaryDirectory() as folder:
        program = mil.load(save_program(build, inputs, Path(folder) / "op.mlpackage", target), **options)
        return list(program(**inputs).values())


def check(
    build: Build,
    inputs: dict[str, np.ndarray],
    expected: Any,
    target: ct.target = ct.target.iOS17,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    **options: Any,
) -> None:
    """Run and compare all outputs: shape, type of number, values."""
    expected = expected if isinstance(expected, (tuple, list)) else [expected]
    outputs = run_op(build, inputs, target, **options)
    assert len(outputs) == len(expected)
    for output, want in zip(outputs, expected, strict=True):
        want = np.asarray(want)
        assert output.shape == want.shape
        assert output.dtype.kind == want.dtype.kind
        np.testing.assert_allclose(output, want, rtol=rtol, atol=atol)


def floats(*shape: int, seed: int = 0, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)
