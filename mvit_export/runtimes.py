"""One adapter for each runtime that can execute an exported file, behind one small interface.

An opener raises RuntimeUnavailable with the reason where its runtime cannot work, ArtifactError where the runtime
rejects the file; nothing is replaced by something else.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from mvit_export.artifact import Artifact, Manifest
from mvit_export.errors import ArtifactError, RuntimeUnavailable, first_line

if TYPE_CHECKING:
    from torch import nn

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Overflow:
    """The first op of an fp16 program whose result fp16 cannot hold."""

    module: str | None  # of the PyTorch model, where the file says so
    op: str
    op_type: str
    largest: float  # absolute value, before rounding

    def __str__(self) -> str:
        place = self.module or "an unnamed module"
        return f"fp16 overflow first at {place} (op {self.op}, {self.op_type}): {self.largest:.3g}, fp16 ends at 65504"


@dataclass(frozen=True)
class Session:
    """A loaded model. `run` takes the input array and gives every output by name; `labels` are the file's own."""

    runtime: str  # name and version, and what executed
    run: Callable[[np.ndarray], Arrays]
    labels: tuple[str, ...] | None
    note: str = ""  # what a PASS here does not prove
    overflow: Callable[[np.ndarray], Overflow | None] | None = None  # looks for one, where the runtime can


def open_onnx(artifact: Artifact) -> Session:
    """ONNX Runtime on its CPU provider, in one thread: processes that work side by side share the cores."""
    ort = _runtime_module("onnxruntime", "pip install onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    with _rejection(artifact, "ONNX Runtime"):
        session = ort.InferenceSession(artifact.model_path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        (input_name,) = [node.name for node in session.get_inputs()]
    labels = session.get_modelmeta().custom_metadata_map.get("labels")

    def run(array: np.ndarray) -> Arrays:
        return dict(zip(names, session.run(None, {input_name: array}), strict=True))

    return Session(f"onnxruntime {ort.__version__} CPU", run, tuple(json.loads(labels)) if labels else None)


def open_tflite(artifact: Artifact) -> Session:
    """LiteRT on its CPU kernels (XNNPACK): ai-edge-litert, else its predecessor tflite-runtime."""
    name, version, interpreter_class = litert_runtime()
    with _rejection(artifact, name):
        interpreter = interpreter_class(model_path=str(artifact.model_path))
        runner = interpreter.get_signature_runner()
        (input_name,) = runner.get_input_details()

    def run(array: np.ndarray) -> Arrays:
        return dict(runner(**{input_name: array}))

    return Session(f"{name} {version} CPU", run, packed_labels(artifact))


def litert_runtime() -> tuple[str, str, Any]:
    """(distribution, version, Interpreter class) of whichever TFLite runtime is installed, the successor first."""
    reasons = []
    for distribution, module in (("ai-edge-litert", "ai_edge_litert"), ("tflite-runtime", "tflite_runtime")):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        try:
            found = importlib.import_module(f"{module}.interpreter")
        except (ImportError, AttributeError) as error:  # numpy 2 breaks tflite-runtime with either
            reasons.append(f"{distribution} {version} does not import beside numpy {np.__version__} ({error})")
        else:
            return distribution, version, found.Interpreter
    raise RuntimeUnavailable("; ".join(reasons) or "no TFLite runtime is installed: pip install ai-edge-litert")


def packed_labels(artifact: Artifact) -> tuple[str, ...] | None:
    """TFLite metadata packs its label file as a zip at the end of the model."""
    try:
        with zipfile.ZipFile(artifact.model_path) as packed:
            return tuple(packed.read("labels.txt").decode("utf-8").splitlines())
    except (zipfile.BadZipFile, KeyError):
        return None


def open_coreml(artifact: Artifact) -> Session:
    """Core ML itself, which exists on macOS only."""
    if platform.system() != "Darwin":
        raise RuntimeUnavailable(f"Core ML predicts on macOS only, this is {platform.system()}")
    ct = _runtime_module("coremltools", "pip install coremltools")
    with _rejection(artifact, "Core ML"):
        model = ct.models.MLModel(str(artifact.model_path))
    metadata = model.get_spec().description.metadata.userDefined
    spec = artifact.manifest.inputs[0]

    def run(array: np.ndarray) -> Arrays:
        outputs = model.predict({spec.name: _pil_image(array) if spec.layout == "NHWC" else array})
        return {name: np.asarray(outputs[name]) for name in artifact.manifest.output_names}

    labels = tuple(json.loads(metadata["labels"])) if "labels" in metadata else None
    return Session(f"Core ML on macOS {platform.mac_ver()[0]}", run, labels)


def _pil_image(batch: np.ndarray) -> Any:
    """uint8 RGB (1, H, W, 3) -> the PIL image that Core ML's image inputs take."""
    from PIL import Image

    return Image.fromarray(batch[0])


def open_torch(module: nn.Module) -> Session:
    """PyTorch eager: the reference. `run` takes and gives float32 arrays."""
    import torch

    from mvit_export.models.load import name_outputs

    def run(array: np.ndarray) -> Arrays:
        with torch.no_grad():
            outputs = name_outputs(module(torch.from_numpy(array)))
        return {name: value.numpy() for name, value in outputs.items()}

    return Session(f"torch {torch.__version__} CPU eager", run, None)


def open_mil(artifact: Artifact) -> Session:
    """The reference executor: what the saved Core ML package means, computed by torch on any machine."""
    for module in ("torch", "coremltools"):
        _runtime_module(module, "pip install 'mvit-export[coreml]'")
    from mvit_export import mil

    try:
        program = mil.load(artifact.model_path)
    except mil.UnsupportedOpError as error:  # the file may be right: that is not known here
        raise RuntimeUnavailable(str(error)) from error
    (input_name,) = program.inputs

    def run(array: np.ndarray) -> Arrays:
        try:
            outputs = program.run({input_name: array})
        except mil.ExecutionError as error:  # the file's fault, not the user's: a failed check
            raise RuntimeError(str(error)) from error
        if artifact.manifest.model.labels:
            check_classifier(outputs, artifact.manifest)
        return {name: outputs[name] for name in artifact.manifest.output_names if name in outputs}

    def overflow(array: np.ndarray) -> Overflow | None:
        first = program.trace(**{input_name: array}).first_overflow
        return Overflow(first.op.module, first.name, first.op.type, first.max_abs) if first else None

    labels = program.metadata.get("labels")
    return Session("mil-reference", run, tuple(json.loads(labels)) if labels else None, MIL_NOTE, overflow)


def check_classifier(outputs: Mapping[str, Any], manifest: Manifest) -> None:
    """A classifier's own outputs: labels in the manifest's order, their probabilities the softmax of the scores.

    Raises ValueError, which is a failed check.
    """
    scores = np.asarray(outputs[manifest.output_names[0]], np.float64).reshape(-1)
    chosen = next((value for value in outputs.values() if isinstance(value, str)), None)
    given = next((value for value in outputs.values() if isinstance(value, Mapping)), None)
    labels = manifest.model.labels or ()
    if given is None or chosen is None:
        raise ValueError("the manifest has labels, the file is no classifier")
    if tuple(given) != labels:
        raise ValueError("the classifier's labels are not the manifest's, or in another order")
    odds = np.exp(scores - scores.max())
    error = np.abs(np.fromiter(given.values(), np.float64) - odds / odds.sum()).max()
    if error > PROBABILITY_TOLERANCE or chosen != max(given, key=lambda label: given[label]):
        raise ValueError(f"the classifier's probabilities are not the softmax of the scores (off by {error:.1e})")


PROBABILITY_TOLERANCE = 5e-3  # fp16 holds a probability to 5e-4; the softmax before it sums as many roundings
MIL_NOTE = "proves graph and weights, not Apple's kernels; for those, on a Mac: verify --against golden"


def openers(artifact: Artifact) -> tuple[Callable[[Artifact], Session], ...]:
    """The runtimes that check this artifact here: for Core ML the reference executor, and Core ML itself on macOS."""
    fmt = artifact.manifest.format
    if fmt != "coreml":
        return (RUNTIMES[fmt],)
    if platform.system() != "Darwin":
        return (open_mil,)
    # Beside the real Core ML the reference is a second opinion: a Mac without torch does without it.
    return (open_coreml, open_mil) if importlib.util.find_spec("torch") else (open_coreml,)


RUNTIMES: dict[str, Callable[[Artifact], Session]] = {"coreml": open_coreml, "onnx": open_onnx, "tflite": open_tflite}


def _runtime_module(name: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeUnavailable(f"{name} does not import ({error}): {install}") from error


@contextmanager
def _rejection(artifact: Artifact, runtime: str) -> Iterator[None]:
    """Turn whatever a runtime raises while loading into one line; their exception types have no common base."""
    try:
        yield
    except Exception as error:
        reason = first_line(error)
        raise ArtifactError(f"{artifact.model_path} is rejected by {runtime}: {reason}; export again") from error
