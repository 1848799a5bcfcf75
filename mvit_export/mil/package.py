"""A `.mlpackage` on disk: found, checked and parsed before anything in it is trusted.

The layout is Apple's model package: `Manifest.json` lists items by identifier, `rootModelIdentifier` names the one
that is the model (a serialized `Model` of coremltools' Model.proto), and weights are beside it; paths in the manifest
start at `Data/`, paths in the model start at `@model_path/`, the folder of the model file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mvit_export.errors import ArtifactError, printable, require
from mvit_export.system.reading import MODEL, WEIGHTS, open_regular, read_bytes, read_json

if TYPE_CHECKING:
    from coremltools.proto.MIL_pb2 import Function
    from coremltools.proto.Model_pb2 import Model

VERSIONS = {6: "iOS15", 7: "iOS16", 8: "iOS17", 9: "iOS18", 10: "iOS26"}  # specification version: first system
OPSETS = {"CoreML5": 15, "CoreML6": 16, "CoreML7": 17, "CoreML8": 18, "CoreML9": 26}  # opset: iOS version
MODEL_PATH = "@model_path/"


@dataclass(frozen=True)
class Package:
    """A package whose specification was read and is an ML Program of a known version."""

    path: Path
    model_path: Path  # the specification file
    spec: Model

    def function(self, name: str | None) -> tuple[str, Function]:
        """The function `name`, or the default one; ArtifactError lists the existing ones."""
        functions = self.spec.mlProgram.functions
        wanted = name or self.spec.description.defaultFunctionName or "main"
        if wanted not in functions:
            known = ", ".join(printable(each) for each in sorted(functions)) or "none"
            raise ArtifactError(f"{self.path} has no function {wanted!r}; it has: {known}")
        return wanted, functions[wanted]

    def resolve(self, reference: str) -> Path:
        """The file behind a blob reference of the program, which must be inside the package."""
        if not reference.startswith(MODEL_PATH):
            raise ArtifactError(f"{self.path}: weights at {reference!r}, expected a path under {MODEL_PATH}; refused")
        target = inside(self.path, self.model_path.parent, reference.removeprefix(MODEL_PATH))
        if not target.is_file():
            raise ArtifactError(f"{target} is a folder, expected a weight blob; export it again")
        return target

    @property
    def metadata(self) -> dict[str, str]:
        """User-defined metadata of the model."""
        return dict(self.spec.description.metadata.userDefined)


def read_package(path: str | Path) -> Package:
    """Read and check a package. ArtifactError, one line, for anything that is not a complete ML Program package."""
    path = Path(path)
    check_kind(path)
    model_path = find_model(path)
    spec = parse_model(model_path)
    check_model(path, spec)
    return Package(path, model_path, spec)


def check_kind(path: Path) -> None:
    """Refuse anything but a folder with a manifest, and say what it looks like instead."""
    if not path.exists():
        raise ArtifactError(f"{path} does not exist, expected a folder NAME.mlpackage")
    if path.is_file():
        with open_regular(path, WEIGHTS) as file:
            kind = "a zip file: unpack it first" if file.read(4) == b"PK\x03\x04" else "a file"
        if path.suffix == ".mlmodel":
            kind = "a single .mlmodel file (the old neural network format): convert it to an ML Program"
        raise ArtifactError(f"{path} is {kind}, expected a folder NAME.mlpackage")
    if not (path / "Manifest.json").is_file():
        raise ArtifactError(f"{path} is not a .mlpackage: it has no Manifest.json")


def find_model(path: Path) -> Path:
    """The specification file that the manifest names, after checking every item of the manifest."""
    manifest = read_manifest(path)
    items, root = manifest.get("itemInfoEntries"), manifest.get("rootModelIdentifier")
    if not isinstance(items, dict) or not isinstance(root, str) or root not in items:
        raise ArtifactError(f"{path}/Manifest.json is damaged: rootModelIdentifier names no item; export it again")
    files = {}
    for identifier, item in items.items():
        where = item.get("path") if isinstance(item, dict) else None
        if not isinstance(where, str):
            raise ArtifactError(
                f"{path}/Manifest.json is damaged: item {printable(identifier)} has no path; export it again"
            )
        files[identifier] = inside(path, path / "Data", where)
    if not files[root].is_file():
        raise ArtifactError(f"{files[root]} is a folder, expected the model's specification; export it again")
    return files[root]


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_json(path / "Manifest.json")
    except OSError as error:
        raise ArtifactError(f"{path}/Manifest.json cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ArtifactError(f"{path}/Manifest.json is damaged: it is not JSON; export it again") from error
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{path}/Manifest.json is damaged: it is not a JSON object; export it again")
    return manifest


def inside(package: Path, base: Path, reference: str) -> Path:
    """`base / reference` if it exists and is in `package` even after following links; ArtifactError otherwise."""
    parts = PurePosixPath(reference)
    if parts.is_absolute() or ".." in parts.parts or "\\" in reference or "\0" in reference:
        raise ArtifactError(f"{package} refers to {reference!r}, a path outside of the package: refused")
    target = base / parts
    if not target.exists():
        raise ArtifactError(f"{target} is missing: the package is damaged, export it again")
    if not target.resolve().is_relative_to(package.resolve()):
        raise ArtifactError(f"{target} is a link to outside of the package: refused")
    return target


def parse_model(path: Path) -> Model:
    require("coremltools", extra="coreml", purpose="to read Core ML packages")
    from coremltools.proto.Model_pb2 import Model
    from google.protobuf.message import DecodeError

    try:
        return Model.FromString(read_bytes(path, MODEL))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise ArtifactError(f"{path} is damaged: it is not a Core ML specification; export it again") from error


def check_model(path: Path, spec: Model) -> None:
    """The specification must be an ML Program of a known version."""
    kind = spec.WhichOneof("Type")
    if kind is None:
        raise ArtifactError(f"{path} is damaged: its specification holds no model; export it again")
    if kind != "mlProgram":
        raise ArtifactError(f"{path} holds a {kind}, expected an ML Program: convert it for iOS15 or later")
    if spec.specificationVersion not in VERSIONS:
        known = f"{min(VERSIONS)} to {max(VERSIONS)}"
        raise ArtifactError(f"{path} has specification version {spec.specificationVersion}, known here are {known}")
    if spec.mlProgram.version != 1:
        raise ArtifactError(f"{path} has ML Program version {spec.mlProgram.version}, known here is 1")
