"""The artifact directory: the only thing that passes between export, verify, bench and a device.

    artifacts/mobilevit_xxs/onnx-fp32/
        mobilevit_xxs.onnx      one self-contained model
        manifest.json           `Manifest`: what it is, where it came from, the hash of every file
        golden.safetensors      a few inputs with the fp32 reference outputs

Reading needs numpy and safetensors only, so that a device can check a file without torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from mvit_export.data.preprocessing import Preprocessing, Size
from mvit_export.errors import ArtifactError, UsageError, first_line, reason_of
from mvit_export.formats.base import PLAIN
from mvit_export.formats.table import FORMATS
from mvit_export.formats.targets import Target
from mvit_export.system.files import write_whole
from mvit_export.system.reading import ARRAYS, check_regular, parse_json, read_json, sha256_file
from mvit_export.system.records import build, convert

SCHEMA_VERSION = 1
DTYPES = ("float16", "float32", "float64", "uint8", "uint16")  # of inputs and outputs
MOST_SHAPES, MOST_ELEMENTS = 128, 2**28  # of one tensor
MANIFEST = "manifest.json"
GOLDEN = "golden.safetensors"
# A model's settings, as its family needs them. Always written, null if the model has none; other names are ignored.
SETTINGS = {"patch_config": str | None, "output_stride": int | None}


@dataclass(frozen=True)
class TensorSpec:
    """An input or output. A `None` in `shape` is an axis of any size (the batch)."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str  # numpy's name
    layout: str  # NCHW, NHWC, NC or "" if the axes have no names
    enumerated: tuple[tuple[int, ...], ...] = ()  # all shapes if the file accepts several, including `shape`


@dataclass(frozen=True)
class ModelInfo:
    """What the network is. `source` says how to rebuild it: a variant's name, `FILE.py:FACTORY`, `timm:NAME`, or
    `transformers:CLASS:DIGEST` of a folder that the weights name.

    `scores` are "probabilities" if a classifier returns them, else None; written only where it is set.
    """

    name: str
    source: str
    task: str
    params: int
    macs: int
    variant: str | None = None
    num_classes: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # of its family, e.g. patch_config
    labels: tuple[str, ...] | None = None
    scores: str | None = None

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        settings, labels, scores = data.pop("settings"), data.pop("labels"), data.pop("scores")
        known = {**data, **dict.fromkeys(SETTINGS), **settings, "labels": labels}
        return known if scores is None else {**known, "scores": scores}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelInfo:
        found: ModelInfo = build(cls, {key: value for key, value in data.items() if key != "settings"}, "model")
        settings = {name: convert(data[name], kind, f"model.{name}") for name, kind in SETTINGS.items() if name in data}
        return replace(found, settings={name: value for name, value in settings.items() if value is not None})


@dataclass(frozen=True)
class WeightsInfo:
    """Where the weights came from. `sha256` is that of the weights file, `state_sha256` that of the tensors.

    `ema` says, where the file has averaged weights, whether these are they. The JSON has it only there.
    """

    source: str | None
    family: str | None
    sha256: str | None
    state_sha256: str
    trained: bool | None  # None: a user's factory made them, which may have loaded anything
    seed: int | None
    revision: str | None = None
    ema: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if (name, value) != ("ema", None)}


@dataclass(frozen=True)
class FileInfo:
    path: str  # relative to the artifact directory, with forward slashes
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`, the record of one export."""

    model: ModelInfo
    weights: WeightsInfo
    preprocessing: Preprocessing | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    format: str
    precision: str
    target: Target
    capture: str  # how the graph was captured: torch.export or torch.jit.trace
    files: tuple[FileInfo, ...]
    tools: Mapping[str, str]
    created: str
    schema_version: int = SCHEMA_VERSION
    quantization: Mapping[str, Any] | None = None  # recipe and calibration, if the precision uses them
    form: str = PLAIN  # how the network's blocks are written, see families/mobilevit/forms
    tuning: Mapping[str, Any] | None = None  # what `tune --latency` measured before it chose this form

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.outputs)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        parts = {"model": self.model.to_json(), "weights": self.weights.to_json()}
        if self.preprocessing:
            parts["preprocessing"] = self.preprocessing.to_json()
        return {"schema_version": data.pop("schema_version"), **data, **parts}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Rebuild from `to_json`'s dict. Raises ValueError or UsageError that names what is missing or malformed."""
        found: Manifest = build(cls, data, "")
        return found


def image_size(shape: tuple[int | None, ...], spec: TensorSpec) -> Size:
    """Height and width of an image input of `shape`, laid out as `spec` says."""
    height, width = shape[1:3] if spec.layout == "NHWC" else shape[2:4]
    assert height is not None
    assert width is not None
    return height, width


@dataclass(frozen=True)
class Artifact:
    """An artifact directory whose files were found unchanged."""

    path: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        return self.path / (self.manifest.model.name + self.manifest.target.suffix)

    @property
    def model_bytes(self) -> int:
        """Size of the model without golden vectors."""
        return sum(info.bytes for info in self.manifest.files if info.path != GOLDEN)


def hash_files(directory: Path) -> tuple[FileInfo, ...]:
    """Every file below `directory`, sorted by name."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return tuple(FileInfo(p.relative_to(directory).as_posix(), sha256_file(p), p.stat().st_size) for p in paths)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# Reading


def read_artifact(path: Path) -> Artifact:
    """Open the artifact directory `path` and check every file against the manifest's hashes.

    Raises ArtifactError if the manifest is unreadable or newer, or a file is missing or changed.
    """
    manifest = read_manifest(path)
    for info in manifest.files:
        file = path / info.path
        if ".." in Path(info.path).parts or Path(info.path).is_absolute():
            raise ArtifactError(f"{path / MANIFEST} lists {info.path!r}, which lies outside the artifact; export again")
        if not file.is_file():
            raise ArtifactError(f"{file} is missing but listed in {MANIFEST}; export again with --overwrite")
        try:
            found = sha256_file(file)
        except OSError as error:
            raise ArtifactError(f"{file} cannot be read: {error.strerror}") from error
        if found != info.sha256:
            raise ArtifactError(
                f"{file} was changed after the export: sha256 is {found[:12]}…, {MANIFEST} says {info.sha256[:12]}…; "
                "export again with --overwrite"
            )
    artifact = Artifact(path, manifest)
    model = artifact.model_path.relative_to(path).as_posix()
    if not any(info.path == model or info.path.startswith(f"{model}/") for info in manifest.files):
        raise ArtifactError(f"{path / MANIFEST} lists no {model}, so nothing vouches for the model; export again")
    return artifact


def read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        data = read_json(file)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read ({reason_of(error)}); export again with --overwrite") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{file} has schema_version {version}, expected {SCHEMA_VERSION}; export again, or update")
    try:
        manifest = Manifest.from_json(data)
        _check_values(manifest)
    except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
        raise ArtifactError(
            f"{file} is not a valid manifest ({first_line(error)}); export again with --overwrite"
        ) from error
    return manifest


def _check_values(manifest: Manifest) -> None:
    """Check what readers rely on. Raises KeyError or ValueError."""
    if manifest.format not in FORMATS:
        raise ValueError(f"format {manifest.format!r}")
    if manifest.precision not in FORMATS[manifest.format].precisions:
        raise ValueError(f"precision {manifest.precision!r}")
    if (manifest.format, manifest.precision) != (manifest.target.format, manifest.target.precision):
        raise ValueError(f"format and precision do not agree with target {manifest.target.name}")
    if not manifest.inputs or not manifest.outputs:
        raise ValueError("no inputs or no outputs")
    if re.fullmatch(r"\w+", manifest.model.name) is None:
        raise ValueError(f"name {manifest.model.name!r}")
    for spec in (*manifest.inputs, *manifest.outputs):
        if spec.dtype not in DTYPES or not all(n is None or n > 0 for n in spec.shape) or not spec.shape:
            raise ValueError(f"{spec.name} of type {spec.dtype!r}, shape {spec.shape}")
        if spec.layout in ("NCHW", "NHWC") and len(spec.shape) != 4:
            raise ValueError(f"{spec.name} of layout {spec.layout}, shape {spec.shape}")
        _check_size(spec)


def _check_size(spec: TensorSpec) -> None:
    """Nobody's input takes a gigabyte, and Core ML itself takes at most 128 shapes."""
    if len(spec.enumerated) > MOST_SHAPES:
        raise ValueError(f"{spec.name} has {len(spec.enumerated)} shapes, expected at most {MOST_SHAPES}")
    for shape in (spec.shape, *spec.enumerated):
        if len(shape) != len(spec.shape) or not all(n is None or n > 0 for n in shape):
            raise ValueError(f"{spec.name} has the shape {shape} beside {spec.shape}")
        if math.prod(n or 1 for n in shape) > MOST_ELEMENTS:
            raise ValueError(f"{spec.name} has the shape {shape}, expected at most {MOST_ELEMENTS:,} numbers")


def find_artifacts(path: str | Path) -> tuple[Path, ...]:
    """Artifact directories that `path` refers to: one, a directory of them at any depth, or a model file inside one."""
    path = Path(path)
    if not os.path.exists(path):
        raise ArtifactError(f"{path} does not exist, expected an artifact directory; mvit-export --to … makes one")
    for folder in (path, path.parent):
        # Listed, because a lookup that ignores case would find the Manifest.json inside every .mlpackage.
        if folder.is_dir() and MANIFEST in os.listdir(folder):
            return (folder,)
    found = tuple(_walk_artifacts(path)) if path.is_dir() else ()
    if not found:
        raise ArtifactError(f"{path} holds no {MANIFEST}, expected an artifact directory or a directory of them")
    return found


def _walk_artifacts(path: Path) -> Iterator[Path]:
    for root, directories, files in os.walk(path, onerror=_refuse_unreadable):
        directories[:] = sorted(d for d in directories if not d.startswith("."))  # leftovers of dead runs
        if MANIFEST in files:
            directories.clear()
            yield Path(root)


def _refuse_unreadable(error: OSError) -> None:
    raise ArtifactError(f"{error.filename} cannot be read: {error.strerror}; what lies in it would go unchecked")


# Golden vectors


def save_golden(path: Path, cases: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write `{case: {tensor name: array}}` as `case/tensor` entries of a safetensors file."""
    from safetensors.numpy import save

    flat = {f"{case}/{name}": np.ascontiguousarray(array) for case, t in cases.items() for name, array in t.items()}
    path.write_bytes(save(flat, metadata={"cases": json.dumps(list(cases))}))


def load_golden(artifact: Artifact) -> dict[str, dict[str, np.ndarray]]:
    """Read what `save_golden` wrote, in the same order; every case has all inputs and outputs."""
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(artifact.path / GOLDEN, ARRAYS)
        with safe_open(artifact.path / GOLDEN, framework="numpy") as file:
            cases: dict[str, dict[str, np.ndarray]] = {case: {} for case in parse_json(file.metadata()["cases"])}
            for key in file.keys():  # noqa: SIM118 (safe_open is no dict)
                case, name = key.split("/", 1)
                cases[case][name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{artifact.path / GOLDEN} cannot be read ({error}); export again") from error
    if not cases:
        raise ArtifactError(f"{artifact.path / GOLDEN} holds no cases; export again with --overwrite")
    for case, tensors in cases.items():
        for spec in (*artifact.manifest.inputs, *artifact.manifest.outputs):
            if spec.name not in tensors:
                what = f"case {case!r} has no tensor {spec.name!r}"
                raise ArtifactError(f"{artifact.path / GOLDEN}: {what}; export again with --overwrite")
            found = tensors[spec.name]
            if found.ndim == 0 or not found.size or found.dtype.kind not in "fu":
                what = f"{spec.name!r} of case {case!r} is {found.dtype} {found.shape}, the manifest says {spec.shape}"
                raise ArtifactError(f"{artifact.path / GOLDEN}: {what}; export again with --overwrite")
    return cases


def record_name(kind: str, device: str = "local") -> str:
    """`parity.json` for this machine, `parity.ssh-pi.json` for ssh:pi: neither replaces the other."""
    return f"{kind}.json" if device == "local" else f"{kind}.{re.sub(r'[^A-Za-z0-9.]+', '-', device).strip('-.')}.json"


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all. Bytes of a path that are not UTF-8 become escapes, which JSON reads back."""
    content = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        write_whole(path, content.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error
